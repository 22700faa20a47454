//! The live table of `celeriac events`: workers above, their latest tasks below.
//!
//! Made of events alone, with bounded memory; makes lines for a given size and knows nothing
//! of terminals.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{SystemTime, UNIX_EPOCH};

use console::{measure_text_width, truncate_str};
use serde_json::{Map, Value};

use crate::events::Received;
use crate::protocol::saferepr;

/// How many tasks are kept.
const TASKS: usize = 2000;
/// Without a sign of life for so many heartbeats, a worker counts as offline.
const MISSED: f64 = 2.5;

/// What is known of a worker.
#[derive(Default)]
struct Node {
    stopped: bool,
    heartbeat: f64,
    freq: f64,
    active: Option<u64>,
    processed: Option<u64>,
    load: String,
    software: String,
}

/// What is known of a task.
#[derive(Default)]
struct Task {
    number: u64,
    name: String,
    state: String,
    worker: String,
    seen: f64,
    started: Option<f64>,
    runtime: Option<f64>,
    detail: String,
}

/// See the module's page.
pub(super) struct Table {
    address: String,
    colours: bool,
    trouble: Option<String>,
    workers: BTreeMap<String, Node>,
    tasks: HashMap<String, Task>,
    order: VecDeque<String>,
    seen: u64,
    /// When the last tasks ended.
    ended: VecDeque<f64>,
}

impl Table {
    /// An empty one.
    pub(super) fn new(address: &str, colours: bool) -> Self {
        Self {
            address: address.to_owned(),
            colours,
            trouble: Some("connecting".to_owned()),
            workers: BTreeMap::new(),
            tasks: HashMap::new(),
            order: VecDeque::new(),
            seen: 0,
            ended: VecDeque::new(),
        }
    }

    /// Why nothing comes at the moment.
    pub(super) fn connection(&mut self, trouble: Option<String>) {
        self.trouble = trouble;
    }

    /// Takes note of an event.
    pub(super) fn event(&mut self, event: &Received) {
        let fields = &event.fields;
        let now = number(fields, "local_received").unwrap_or_else(unix_time);
        if event.kind.starts_with("worker-") {
            self.worker_event(event, now);
        } else if let Some(kind) = event.kind.strip_prefix("task-")
            && let Some(Value::String(id)) = fields.get("uuid")
        {
            if !self.tasks.contains_key(id) {
                self.add(id, now);
            }
            if kind != "sent" {
                let node = self.workers.entry(event.hostname.clone()).or_default();
                node.heartbeat = node.heartbeat.max(now);
            }
            if let Some(task) = self.tasks.get_mut(id) {
                task.event(kind, event, now);
                if ["succeeded", "failed", "revoked", "rejected"].contains(&kind) {
                    self.ended.push_back(now);
                    self.ended.truncate(10_000);
                }
            }
        }
    }

    fn worker_event(&mut self, event: &Received, now: f64) {
        let fields = &event.fields;
        let node = self.workers.entry(event.hostname.clone()).or_default();
        node.heartbeat = now;
        node.stopped = event.kind == "worker-offline";
        node.freq = number(fields, "freq").unwrap_or(node.freq);
        node.active = fields.get("active").and_then(Value::as_u64).or(node.active);
        node.processed = fields
            .get("processed")
            .and_then(Value::as_u64)
            .or(node.processed);
        if let Some(Value::Array(load)) = fields.get("loadavg") {
            let load: Vec<String> = load
                .iter()
                .filter_map(Value::as_f64)
                .map(|load| format!("{load:.2}"))
                .collect();
            node.load = load.join(" ");
        }
        let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
        if fields.contains_key("sw_ident") {
            node.software = clean(&format!("{} {}", text("sw_ident"), text("sw_ver")));
        }
    }

    fn add(&mut self, id: &str, now: f64) {
        self.seen += 1;
        let task = Task {
            number: self.seen,
            seen: now,
            ..Task::default()
        };
        self.tasks.insert(id.to_owned(), task);
        self.order.push_back(id.to_owned());
        if self.order.len() > TASKS
            && let Some(oldest) = self.order.pop_front()
        {
            self.tasks.remove(&oldest);
        }
    }

    /// The page for a terminal of this size.
    pub(super) fn lines(&mut self, columns: usize, rows: usize) -> Vec<String> {
        self.lines_at(columns, rows, unix_time())
    }

    fn lines_at(&mut self, columns: usize, rows: usize, now: f64) -> Vec<String> {
        while self.ended.front().is_some_and(|at| *at < now - 10.0) {
            self.ended.pop_front();
        }
        let mut lines = vec![self.headline(columns, now), String::new()];
        // A third of the page for workers, as long as there are more than that.
        let most = self.workers.len().min((rows / 3).max(1));
        lines.push(self.title(
            &worker_row([
                "WORKER",
                "STATE",
                "ACTIVE",
                "PROCESSED",
                "LOAD",
                "SEEN",
                "SOFTWARE",
            ]),
            columns,
        ));
        for (name, node) in self.workers.iter().take(most) {
            lines.push(self.worker_line(name, node, columns, now));
        }
        if self.workers.len() > most {
            lines.push(self.dim(&format!(" and {} more", self.workers.len() - most)));
        }
        lines.push(String::new());
        let with_id = columns >= 150;
        lines.push(self.title(
            &task_row(
                ["AT", "STATE", "RUNTIME", "TASK", "ID", "WORKER", ""],
                with_id,
            ),
            columns,
        ));
        let left = rows.saturating_sub(lines.len());
        let mut tasks: Vec<(&String, &Task)> = self.tasks.iter().collect();
        // What runs stands above, then the latest.
        tasks.sort_by_key(|(_, task)| (!task.is_running(), std::cmp::Reverse(task.number)));
        for (id, task) in tasks.into_iter().take(left) {
            lines.push(self.task_line(id, task, columns, with_id, now));
        }
        lines.truncate(rows);
        lines
    }

    fn headline(&self, columns: usize, now: f64) -> String {
        let online = self
            .workers
            .values()
            .filter(|node| node.is_online(now))
            .count();
        let running = self.tasks.values().filter(|task| task.is_running()).count();
        let left = match &self.trouble {
            Some(trouble) => format!(" {}  {}", self.address, clean(trouble)),
            None => format!(
                " {}  {online} of {} workers online  {running} running  {} tasks seen  {:.1}/s",
                self.address,
                self.workers.len(),
                self.seen,
                self.ended.len() as f64 / 10.0
            ),
        };
        let right = format!("{}  q quits ", chrono::Local::now().format("%H:%M:%S"));
        let room = columns.saturating_sub(measure_text_width(&right));
        let left = cell(&left, room);
        if self.colours {
            format!("\x1b[7m{left}{right}\x1b[0m")
        } else {
            format!("{left}{right}")
        }
    }

    fn worker_line(&self, name: &str, node: &Node, columns: usize, now: f64) -> String {
        let (state, colour) = match node.is_online(now) {
            true => ("online", "32"),
            false => ("offline", "31"),
        };
        let count = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let row = worker_row([
            &clean(name),
            state,
            &count(node.active),
            &count(node.processed),
            &node.load,
            &ago(now - node.heartbeat),
            &node.software,
        ]);
        self.coloured(&row, columns, 30, 8, colour)
    }

    fn task_line(&self, id: &str, task: &Task, columns: usize, with_id: bool, now: f64) -> String {
        let at = chrono::DateTime::from_timestamp(task.seen as i64, 0).unwrap_or_default();
        let runtime = match (task.runtime, task.started) {
            (Some(runtime), _) => seconds(runtime),
            (None, Some(started)) if task.is_running() => seconds((now - started).max(0.0)),
            _ => String::new(),
        };
        let colour = match task.state.as_str() {
            "SUCCESS" => "32",
            "FAILURE" | "REJECTED" => "31",
            "REVOKED" | "RETRY" => "35",
            "STARTED" | "PROGRESS" => "36",
            _ => "33",
        };
        let row = task_row(
            [
                &at.with_timezone(&chrono::Local)
                    .format("%H:%M:%S")
                    .to_string(),
                &task.state,
                &runtime,
                &task.name,
                &clean(id),
                &clean(&task.worker),
                &task.detail,
            ],
            with_id,
        );
        self.coloured(&row, columns, 10, 9, colour)
    }

    /// The row cut to the page, its cell at `from` painted.
    fn coloured(
        &self,
        row: &str,
        columns: usize,
        from: usize,
        width: usize,
        colour: &str,
    ) -> String {
        let row = truncate_str(row, columns, "…").into_owned();
        // The cells before it hold one column a character only where nobody has a wide name.
        let start = position(&row, from);
        let end = position(&row, from + width);
        if !self.colours || start >= end {
            return row;
        }
        format!(
            "{}\x1b[{colour}m{}\x1b[0m{}",
            &row[..start],
            &row[start..end],
            &row[end..]
        )
    }

    fn title(&self, row: &str, columns: usize) -> String {
        let row = truncate_str(row, columns, "").into_owned();
        if self.colours {
            format!("\x1b[1m{row}\x1b[0m")
        } else {
            row
        }
    }

    fn dim(&self, text: &str) -> String {
        if self.colours {
            format!("\x1b[2m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

impl Node {
    fn is_online(&self, now: f64) -> bool {
        let freq = if self.freq > 0.0 { self.freq } else { 2.0 };
        !self.stopped && now - self.heartbeat < freq * MISSED
    }
}

impl Task {
    fn is_running(&self) -> bool {
        self.state == "STARTED" || self.state == "PROGRESS"
    }

    fn event(&mut self, kind: &str, event: &Received, now: f64) {
        let fields = &event.fields;
        let text = |name: &str| fields.get(name).map(|value| clean(&saferepr::str(value)));
        if let Some(name) = text("name") {
            self.name = name;
        }
        if kind == "sent" {
            // Events overtake each other: what a worker said counts more.
            if self.state.is_empty() {
                self.state = "SENT".to_owned();
            }
            return;
        }
        self.worker = event.hostname.clone();
        let ended = ["SUCCESS", "FAILURE", "REVOKED", "REJECTED"].contains(&self.state.as_str());
        let arguments = || {
            let shown =
                |name| text(name).filter(|text| !["()", "{}", "[]"].contains(&text.as_str()));
            [shown("args"), shown("kwargs")]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(" ")
        };
        let (state, detail) = match kind {
            "received" if ended || self.started.is_some() => return,
            "started" | "progress" if ended => return,
            "received" => ("RECEIVED", Some(arguments())),
            "started" => ("STARTED", None),
            "progress" => {
                let known = |name: &&str| fields.get(*name).is_some_and(|value| !value.is_null());
                let shown = ["status", "progress", "percent"]
                    .iter()
                    .find(|name| known(name));
                ("PROGRESS", shown.and_then(|name| text(name)))
            }
            "succeeded" => ("SUCCESS", text("result")),
            "failed" => ("FAILURE", text("exception")),
            "retried" => ("RETRY", text("exception")),
            "revoked" => ("REVOKED", Some(String::new())),
            "rejected" => ("REJECTED", Some(String::new())),
            other => {
                self.state = clean(&other.to_uppercase());
                return;
            }
        };
        if kind == "started" {
            self.started = number(fields, "timestamp").or(Some(now));
            self.runtime = None;
        } else if let Some(runtime) = number(fields, "runtime") {
            self.runtime = Some(runtime);
        } else if kind == "failed"
            && let Some(started) = self.started
        {
            self.runtime = Some((number(fields, "timestamp").unwrap_or(now) - started).max(0.0));
        }
        self.state = state.to_owned();
        if let Some(detail) = detail {
            self.detail = detail;
        }
    }
}

fn worker_row([name, state, active, processed, load, heartbeat, software]: [&str; 7]) -> String {
    format!(
        " {} {} {active:>6} {processed:>9}  {} {heartbeat:>8}  {software}",
        cell(name, 28),
        cell(state, 8),
        cell(load, 17),
    )
}

fn task_row([at, state, runtime, name, id, worker, detail]: [&str; 7], with_id: bool) -> String {
    let id = if with_id {
        format!("{} ", cell(id, 36))
    } else {
        String::new()
    };
    format!(
        " {} {} {runtime:>8}  {} {id}{} {detail}",
        cell(at, 8),
        cell(state, 9),
        cell(name, 24),
        cell(worker, 24),
    )
}

/// Text cut or filled to a width on screen, where some characters take two columns.
fn cell(text: &str, width: usize) -> String {
    let text = truncate_str(text, width, "…");
    let room = width.saturating_sub(measure_text_width(&text));
    format!("{text}{}", " ".repeat(room))
}

/// Where the column stands in the text.
fn position(text: &str, column: usize) -> usize {
    let mut width = 0;
    for (at, character) in text.char_indices() {
        if width >= column {
            return at;
        }
        width += measure_text_width(character.encode_utf8(&mut [0; 4]));
    }
    text.len()
}

/// Text of strangers: nothing in it may move the cursor.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(400)
        .collect()
}

fn number(fields: &Map<String, Value>, name: &str) -> Option<f64> {
    fields.get(name).and_then(Value::as_f64)
}

fn ago(seconds: f64) -> String {
    match seconds.max(0.0) {
        seconds if seconds < 120.0 => format!("{seconds:.0}s ago"),
        seconds if seconds < 7200.0 => format!("{:.0}m ago", seconds / 60.0),
        seconds => format!("{:.0}h ago", seconds / 3600.0),
    }
}

fn seconds(runtime: f64) -> String {
    match runtime {
        runtime if runtime < 10.0 => format!("{runtime:.3}s"),
        runtime if runtime < 100.0 => format!("{runtime:.1}s"),
        runtime => format!(
            "{}:{:02.0}",
            (runtime / 60.0).floor(),
            (runtime % 60.0).floor()
        ),
    }
}

fn unix_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn table(events: &[Value]) -> Table {
        let mut table = Table::new("redis://h/0", false);
        table.connection(None);
        for event in events {
            let fields = event.as_object().cloned().unwrap();
            let text = |name: &str| fields[name].as_str().unwrap().to_owned();
            let (kind, hostname) = (text("type"), text("hostname"));
            table.event(&Received {
                kind,
                hostname,
                fields,
            });
        }
        table
    }

    fn page(table: &mut Table) -> String {
        table.lines_at(120, 24, 1000.0).join("\n")
    }

    fn task(kind: &str, id: &str, more: Value) -> Value {
        let mut event = json!({"type": format!("task-{kind}"), "hostname": "w@h", "uuid": id,
            "timestamp": 999.0, "local_received": 999.0});
        for (name, value) in more.as_object().unwrap() {
            event[name] = value.clone();
        }
        event
    }

    #[test]
    fn workers_and_their_tasks_are_seen() {
        let mut table = table(&[
            json!({"type": "worker-heartbeat", "hostname": "w@h", "freq": 2.0, "active": 1, "processed": 7,
                "loadavg": [1.0, 0.5, 0.25], "sw_ident": "celeriac", "sw_ver": "1", "local_received": 999.0}),
            json!({"type": "worker-heartbeat", "hostname": "old@h", "freq": 2.0, "local_received": 900.0}),
            task(
                "received",
                "a",
                json!({"name": "test_task", "args": "('x',)", "kwargs": "{}"}),
            ),
            task("started", "a", json!({})),
            task(
                "succeeded",
                "a",
                json!({"runtime": 0.25, "result": "'done'"}),
            ),
            task(
                "received",
                "b",
                json!({"name": "analyze", "args": "()", "kwargs": "{}"}),
            ),
            task("started", "b", json!({"timestamp": 997.0})),
        ]);
        let page = page(&mut table);
        assert!(
            page.contains("1 of 2 workers online  1 running  2 tasks seen"),
            "{page}"
        );
        let line = |text: &str| {
            page.lines()
                .find(|line| line.contains(text))
                .unwrap()
                .to_owned()
        };
        let worker = line("celeriac 1");
        assert!(
            worker.contains("online") && worker.contains("1.00 0.50 0.25"),
            "{worker}"
        );
        assert!(line("old@h").contains("offline"));
        assert!(line("test_task").contains("SUCCESS") && line("test_task").contains("0.250s"));
        assert!(line("analyze").contains("STARTED") && line("analyze").contains("3.000s"));
        let place = |text: &str| page.find(text).unwrap();
        assert!(
            place("analyze") < place("test_task"),
            "what runs stands above\n{page}"
        );
    }

    #[test]
    fn a_page_never_exceeds_the_terminal() {
        let mut events = vec![];
        for number in 0..50 {
            events.push(json!({"type": "worker-online", "hostname": format!("일꾼{number}@아주-긴-이름의-호스트"),
                "local_received": 999.0}));
            events.push(task(
                "failed",
                &number.to_string(),
                json!({"exception": "분석 실패 ".repeat(30)}),
            ));
        }
        let mut table = table(&events);
        for colours in [false, true] {
            table.colours = colours;
            for (columns, rows) in [(80, 24), (20, 4), (200, 60), (33, 7)] {
                let lines = table.lines_at(columns, rows, 1000.0);
                assert!(lines.len() <= rows);
                for line in &lines {
                    assert!(
                        measure_text_width(line) <= columns.max(20),
                        "{columns}: {line}"
                    );
                }
            }
        }
    }

    #[test]
    fn text_of_strangers_moves_no_cursor() {
        let mut table = table(&[
            json!({"type": "worker-online", "hostname": "w\u{1b}[2J@h", "sw_ident": "x\n", "local_received": 999.0}),
            task(
                "received",
                "\u{1b}c",
                json!({"name": "n\r\u{1b}]0;title\u{7}", "args": "\u{9b}2J"}),
            ),
            task("odd\u{1b}", "z", json!({})),
        ]);
        let lines = table.lines_at(200, 24, 1000.0);
        assert!(
            lines.iter().all(|line| !line.contains(char::is_control)),
            "{lines:?}"
        );
    }

    #[test]
    fn late_events_do_not_undo_the_end() {
        let mut table = table(&[
            task("succeeded", "a", json!({"result": "1", "runtime": 0.5})),
            task("started", "a", json!({})),
            task("received", "a", json!({"name": "late"})),
            task("sent", "a", json!({"name": "late"})),
        ]);
        assert!(
            page(&mut table)
                .lines()
                .any(|line| line.contains("SUCCESS") && line.contains("late"))
        );
    }

    #[test]
    fn memory_is_bounded() {
        let events: Vec<Value> = (0..TASKS + 100)
            .map(|n| task("started", &n.to_string(), json!({})))
            .collect();
        let table = table(&events);
        assert_eq!((table.tasks.len(), table.order.len()), (TASKS, TASKS));
    }
}
