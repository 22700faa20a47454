//! Celery's banner: people and scripts look for its lines.

use crate::worker::controller::Blueprint;

/// The banner for a worker that is about to start.
pub(super) fn text(worker: &Blueprint, level: log::LevelFilter, events: bool) -> String {
    let node = &worker.node;
    let version = env!("CARGO_PKG_VERSION");
    let system = nix::sys::utsname::uname().map_or_else(
        |_| "Linux".to_owned(),
        |name| {
            format!(
                "{}-{}-{}",
                name.sysname().to_string_lossy(),
                name.release().to_string_lossy(),
                name.machine().to_string_lossy()
            )
        },
    );
    let now = chrono::Local::now().format("%Y-%m-%d %H:%M:%S");
    let transport = worker.transport.display_url();
    let results = worker.backend.display_url();
    let database = worker.database.url();
    let concurrency = match worker.autoscale {
        Some(range) => range.to_string(),
        None => worker.pool.size.to_string(),
    };
    let events = if events || worker.settings.worker_send_task_events {
        "ON"
    } else {
        "OFF (enable -E to monitor tasks in this worker)"
    };
    let mut text = format!(
        "\n -------------- {node} v{version} (celeriac)\n\
         --- ***** ----- \n\
         -- ******* ---- {system} {now}\n\
         - *** --- * --- \n\
         - ** ---------- [config]\n\
         - ** ---------- .> app:         celeriac\n\
         - ** ---------- .> transport:   {transport}\n\
         - ** ---------- .> results:     {results}\n\
         - ** ---------- .> database:    {database}\n\
         - *** --- * --- .> concurrency: {concurrency} (prefork)\n\
         -- ******* ---- .> task events: {events}\n\
         --- ***** ----- \n \
         -------------- [queues]\n"
    );
    for queue in &worker.queues {
        let exchange = &queue.exchange;
        let (name, key) = (&queue.name, &queue.routing_key);
        let kind = exchange.kind.as_str();
        text.push_str(&format!(
            "                .> {name:<16} exchange={}({kind}) key={key}\n",
            exchange.name
        ));
    }
    text.push_str("                \n");
    if level >= log::LevelFilter::Info {
        text.push_str("[tasks]\n");
        for entry in crate::tasks::Registry::new(&worker.settings).iter() {
            text.push_str(&format!("  . {}\n", entry.name));
        }
        text.push('\n');
    }
    text
}
