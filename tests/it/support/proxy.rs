//! A TCP proxy that misbehaves on request: the network between a worker and its servers.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex};

/// Forwards connections to one server; ends with the test's process.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    server: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Bytes are neither forwarded nor refused: a dead peer behind an open connection.
    stalled: bool,
    /// New connections are closed at once.
    refusing: bool,
    /// So many more bytes of the server's reach a client, then all connections are closed.
    answer_bytes_left: Option<usize>,
    connections: Vec<TcpStream>,
    accepted: usize,
    /// Connections accepted before this one are dead and do not know it.
    stranded: usize,
}

impl Proxy {
    /// A proxy before the server that the URL names.
    pub fn before(url: &str) -> Self {
        let url = url::Url::parse(url).expect("the server's URL");
        let port = url.port().expect("the server's port");
        let server = (url.host_str().expect("the server's host"), port)
            .to_socket_addrs()
            .ok()
            .and_then(|mut addresses| addresses.next())
            .expect("the server's address");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            server,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                accepting.forward(client);
            }
        });
        Self { address, shared }
    }

    /// The same URL, through this proxy.
    pub fn url(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).expect("the server's URL");
        url.set_host(Some("127.0.0.1")).expect("a host");
        url.set_port(Some(self.address.port())).expect("a port");
        url.into()
    }

    /// From now on nothing gets through, and nobody is told.
    pub fn stall(&self) {
        self.change(|state| state.stalled = true);
    }

    /// Nothing gets through the connections of today any more, and nobody is told; new ones work.
    pub fn strand(&self) {
        self.change(|state| state.stranded = state.accepted);
    }

    /// Closes all connections and refuses new ones.
    pub fn cut(&self) {
        self.change(|state| {
            state.refusing = true;
            state.close_all();
        });
    }

    /// Closes all connections; new ones are welcome.
    pub fn reset(&self) {
        self.change(State::close_all);
    }

    /// Closes all connections after so many more bytes from the server.
    pub fn cut_after_answer_bytes(&self, bytes: usize) {
        self.change(|state| state.answer_bytes_left = Some(bytes));
    }

    /// Everything gets through again.
    pub fn heal(&self) {
        self.change(|state| {
            state.stalled = false;
            state.refusing = false;
            state.answer_bytes_left = None;
        });
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> usize {
        self.shared.state.lock().expect("the proxy").accepted
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state.lock().expect("the proxy"));
        self.shared.changed.notify_all();
    }
}

impl State {
    fn close_all(&mut self) {
        for connection in self.connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn forward(self: &Arc<Self>, client: TcpStream) {
        let mut state = self.state.lock().expect("the proxy");
        if state.refusing {
            return;
        }
        let Ok(server) = TcpStream::connect(self.server) else {
            return;
        };
        let _ = client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        let number = state.accepted;
        state.accepted += 1;
        let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
        state.connections.extend([clone(&client), clone(&server)]);
        drop(state);
        for (from, to, answers) in [
            (clone(&client), clone(&server), false),
            (server, client, true),
        ] {
            let shared = Arc::clone(self);
            std::thread::spawn(move || shared.pump(number, from, to, answers));
        }
    }

    fn pump(&self, number: usize, mut from: TcpStream, mut to: TcpStream, answers: bool) {
        let mut buffer = vec![0; 65536];
        while let Ok(size @ 1..) = from.read(&mut buffer) {
            let Some(allowed) = self.allowed(number, size, answers) else {
                return;
            };
            if to.write_all(&buffer[..allowed]).is_err() {
                break;
            }
            if allowed < size {
                self.state.lock().expect("the proxy").close_all();
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    /// Waits while stalled, then says how many of the bytes may pass.
    fn allowed(&self, number: usize, size: usize, answers: bool) -> Option<usize> {
        let state = self.state.lock().ok()?;
        let dead = |state: &mut State| state.stalled || number < state.stranded;
        let mut state = self.changed.wait_while(state, dead).ok()?;
        match &mut state.answer_bytes_left {
            Some(left) if answers => {
                let allowed = size.min(*left);
                *left -= allowed;
                Some(allowed)
            }
            _ => Some(size),
        }
    }
}
