//! `celeriac events`: watches the workers, as lines or as a live table.
//!
//! Answers for `celery.bin.events`. A broker that goes away is waited for. Workers are asked
//! for a heartbeat first, so that nobody looks at an empty table.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::args::{Events, Global};
use super::dumper::Dumper;
use super::table::Table;
use super::terminal::{self, Terminal};
use super::{connect, output, remote};
use crate::config::Settings;
use crate::events::{self, Received, Receiver};
use crate::pidbox::Request;
use crate::protocol::clock::Clock;
use crate::transport::Transport;
use crate::worker::heart;

/// A table that changes more often cannot be read.
const REDRAW: Duration = Duration::from_millis(100);

/// What comes from the broker.
enum News {
    Event(Box<Received>),
    Connected,
    Lost,
    /// Why, and in how many seconds it is tried again.
    Away(String, u64),
}

/// Watches until the user has seen enough; returns the exit code.
pub(super) fn run(global: &Global, options: &Events) -> anyhow::Result<i32> {
    if options.camera.is_some() {
        let text = "cameras are Python classes and cannot be loaded here; use --dump and read its \
                    lines, or run Celery's own `celery events --camera`";
        return Ok(remote::wrong_usage("events", "", text));
    }
    let settings = remote::settings(global)?;
    let transport = connect::transport(&settings, "celeriac")?;
    let on_terminal = std::io::stdout().is_terminal();
    let colours = !global.no_color;
    remote::runtime()?.block_on(async {
        let (sender, news) = mpsc::channel(1024);
        let address = transport.display_url();
        let listening = tokio::spawn(listen(settings, transport, sender));
        let outcome = if on_terminal && !options.dump {
            watch(news, &address, colours).await
        } else {
            dump(news, &address).await
        };
        listening.abort();
        outcome
    })?;
    Ok(0)
}

/// Connects, and again when the connection is lost; tells what comes.
async fn listen(settings: Settings, transport: Arc<dyn Transport>, news: mpsc::Sender<News>) {
    let mut wait = 0;
    loop {
        let failed = match capture(&settings, transport.as_ref(), &news).await {
            Ok(()) => {
                wait = 0;
                news.send(News::Lost).await
            }
            Err(reason) => {
                wait = (wait + 2).min(30);
                let told = news.send(News::Away(reason, wait)).await;
                tokio::time::sleep(Duration::from_secs(wait)).await;
                told
            }
        };
        if failed.is_err() {
            return;
        }
    }
}

/// Tells events until the connection is lost; the error is why there was none.
async fn capture(
    settings: &Settings,
    transport: &dyn Transport,
    news: &mpsc::Sender<News>,
) -> Result<(), String> {
    let channel = transport
        .connect()
        .await
        .map_err(|error| error.to_string())?;
    let exchange = events::exchange(&settings.event_exchange, transport.driver());
    let mut receiver = Receiver::subscribe(
        &channel,
        exchange,
        &heart::ear(settings),
        &["#".to_owned()],
        Clock::default(),
        None,
    )
    .await
    .map_err(|error| error.to_string())?;
    // Nobody who listens any more needs to know.
    drop(news.send(News::Connected).await);
    let mailbox =
        remote::mailbox(settings, Arc::clone(&channel)).map_err(|error| error.to_string())?;
    if let Err(error) = mailbox.cast(&Request::new("heartbeat")).await {
        log::debug!("the workers were not asked for a heartbeat: {error}");
    }
    while let Some(event) = receiver.next().await {
        if news.send(News::Event(Box::new(event))).await.is_err() {
            drop(channel.close().await);
            return Ok(());
        }
    }
    Ok(())
}

async fn dump(mut news: mpsc::Receiver<News>, address: &str) -> anyhow::Result<()> {
    let mut dumper = Dumper::default();
    let mut stop = Box::pin(stopped()?);
    output::print("-> evdump: starting capture...\n");
    loop {
        let line = tokio::select! {
            line = news.recv() => line,
            () = &mut stop => return Ok(()),
        };
        let line = match line {
            Some(News::Event(event)) => format!("{}\n", dumper.line(*event)),
            Some(News::Connected) => continue,
            Some(News::Lost) => "-> Connection lost, attempting reconnect\n".to_owned(),
            Some(News::Away(reason, wait)) => format!(
                "-> Cannot connect to {address}: {reason}.\nTrying again in {wait}.00 seconds\n\n"
            ),
            None => return Ok(()),
        };
        // Whoever reads the lines may have had enough of them.
        if !output::try_print(&line) {
            return Ok(());
        }
    }
}

async fn watch(mut news: mpsc::Receiver<News>, address: &str, colours: bool) -> anyhow::Result<()> {
    let mut table = Table::new(address, colours);
    let mut stop = Box::pin(stopped()?);
    let mut keys = terminal::keys();
    let terminal = Terminal::open();
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut resized = signal(SignalKind::window_change())?;
    let mut changed = true;
    let mut drawn = Instant::now();
    loop {
        if changed && drawn <= Instant::now() {
            let (columns, rows) = terminal.size();
            terminal.draw(&table.lines(columns, rows));
            changed = false;
            drawn = Instant::now() + REDRAW;
        }
        tokio::select! {
            some = news.recv() => {
                match some {
                    Some(News::Event(event)) => table.event(&event),
                    Some(News::Connected) => table.connection(None),
                    Some(News::Lost) => table.connection(Some("connection lost".to_owned())),
                    Some(News::Away(reason, wait)) => {
                        table.connection(Some(format!("{reason}; trying again in {wait} s")));
                    }
                    None => return Ok(()),
                }
                changed = true;
            }
            key = keys.recv() => {
                // q, and what ends things in shells: Ctrl-C, Ctrl-D.
                if matches!(key, Some(b'q' | b'Q' | 3 | 4)) {
                    return Ok(());
                }
            }
            () = tokio::time::sleep_until(drawn), if changed => {}
            _ = ticks.tick() => changed = true,
            _ = resized.recv() => changed = true,
            () = &mut stop => return Ok(()),
        }
    }
}

/// Waits for a signal that asks to end.
fn stopped() -> anyhow::Result<impl Future<Output = ()>> {
    let mut signals = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ]
    .into_iter()
    .map(signal)
    .collect::<Result<Vec<_>, _>>()?;
    Ok(async move {
        let any = signals.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures::future::select_all(any).await;
    })
}
