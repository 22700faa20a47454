//! What a child does in these tests: whatever the job's name says.

use std::sync::atomic::Ordering;
use std::time::Duration;

use celeriac::pool::child::Reporter;
use celeriac::pool::{Failure, Job};
use serde_json::{Value, json};

pub(crate) fn handle(job: &Job, reporter: &Reporter) -> Result<Value, Failure> {
    let payload = &job.payload;
    match job.name.as_str() {
        "echo" => Ok(payload.clone()),
        "progress" => {
            for step in 0..payload.as_u64().unwrap_or(0) {
                reporter.progress(json!(step));
            }
            log::info!(target: "celeriac::test", "half done");
            log::info!(target: "library", "of no interest");
            reporter.log(log::Level::Warn, "done reporting");
            Ok(json!("reported"))
        }
        "until_interrupt" => {
            reporter.progress(json!("waiting"));
            while !reporter.interrupt().load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(failure("SoftTimeLimitExceeded", reporter.soft_limit_hit()))
        }
        "forever" => {
            reporter.progress(json!("waiting"));
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
        "chatter" => loop {
            reporter.progress(json!("still here"));
        },
        "fail" => Err(failure("ValueError", payload.clone())),
        "panic" => panic!("could not use {}", payload["token"]),
        "exit" => std::process::exit(3),
        "abort" => std::process::abort(),
        "allocate" => {
            let mut memory = vec![0_u8; payload.as_u64().unwrap_or(0) as usize];
            memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
            // Resident when the job ends, gone with the child.
            std::mem::forget(memory);
            Ok(json!("allocated"))
        }
        "environment" => Ok(std::env::vars()
            .map(|(name, value)| json!([name, value]))
            .collect()),
        "descriptors" => Ok(descriptors()),
        "large" => Ok(json!("x".repeat(payload.as_u64().unwrap_or(0) as usize))),
        "jobs" => Ok(json!(reporter.jobs())),
        "canary" => Ok(canary(payload)),
        other => Err(failure("LookupError", other)),
    }
}

fn failure(exc_type: &str, argument: impl Into<Value>) -> Failure {
    Failure {
        exc_type: exc_type.to_owned(),
        exc_message: vec![argument.into()],
        traceback: String::from("test\n"),
        ..Failure::default()
    }
}

fn descriptors() -> Value {
    let list = std::fs::read_dir("/proc/self/fd").expect("proc is mounted");
    list.filter_map(|entry| {
        let target = std::fs::read_link(entry.ok()?.path()).ok()?;
        Some(json!(target.to_string_lossy()))
    })
    .collect()
}

/// What a hostile repository would make a hijacked child try: each attempt's outcome by name.
fn canary(payload: &Value) -> Value {
    let path = |name: &str| payload[name].as_str().unwrap_or_default().to_owned();
    let own = std::env::current_dir().expect("a child has a directory");
    let outcome = |result: std::io::Result<()>| match result {
        Ok(()) => json!("done"),
        Err(error) => json!(error.kind().to_string()),
    };
    let connect = |port: &Value| {
        let port = port.as_u64().unwrap_or(0) as u16;
        outcome(std::net::TcpStream::connect(("127.0.0.1", port)).map(drop))
    };
    json!({
        "write own": outcome(std::fs::write(own.join("file"), "x")),
        "read own": outcome(std::fs::read(own.join("file")).map(drop)),
        "write foreign": outcome(std::fs::write(path("foreign"), "x")),
        "read foreign": outcome(std::fs::read(path("foreign")).map(drop)),
        "read parent": outcome(std::fs::read(path("parent")).map(drop)),
        "read hosts": outcome(std::fs::read("/etc/hosts").map(drop)),
        "start a program": outcome(std::process::Command::new("/bin/true").status().map(drop)),
        "start a thread": outcome(std::thread::Builder::new().spawn(|| ()).map(drop)),
        "open a unix socket": outcome(std::os::unix::net::UnixDatagram::unbound().map(drop)),
        "listen": outcome(std::net::TcpListener::bind("127.0.0.1:0").map(drop)),
        "connect allowed": connect(&payload["allowed"]),
        "connect denied": connect(&payload["denied"]),
        "resolve": outcome(
            std::net::ToSocketAddrs::to_socket_addrs(&("localhost", 80)).map(drop)
        ),
        "processors": std::thread::available_parallelism().map_or(0, |count| count.get()),
    })
}
