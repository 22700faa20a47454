//! Events as a monitor sees them, on Redis.

use std::time::Duration;

use serde_json::Value;

use super::{raw, wait_for};

/// Everything told since it was made.
pub struct Events(redis::Connection);

impl Events {
    /// Listens to an exchange of a database.
    pub fn new(url: &str, exchange: &str) -> Self {
        let client = redis::Client::open(url).expect("a Redis URL");
        let mut connection = client.get_connection().expect("a connection");
        let database = client.get_connection_info().redis_settings().db();
        let channels = format!("/{database}.{exchange}/*");
        let _: () = redis::cmd("PSUBSCRIBE")
            .arg(channels)
            .query(&mut connection)
            .expect("a subscription");
        // Workers tell at least that they are there.
        connection
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a time-out");
        Self(connection)
    }

    /// Waits for so many events of a kind.
    #[track_caller]
    pub fn wait(&mut self, kind: &str, count: usize) -> Vec<Value> {
        let mut found = Vec::new();
        wait_for(&format!("{count} {kind}"), Duration::from_secs(40), || {
            let told = self.next().into_iter();
            found.extend(told.filter(|event| event["type"] == kind));
            (found.len() >= count).then_some(())
        });
        found
    }

    fn next(&mut self) -> Vec<Value> {
        let pushed = self.0.recv_response().expect("an event");
        let message = redis::Msg::from_value(&pushed).expect("a message");
        let envelope: Value =
            serde_json::from_slice(message.get_payload_bytes()).expect("an envelope is JSON");
        match raw::body(&envelope) {
            Value::Array(events) => events,
            event => vec![event],
        }
    }
}
