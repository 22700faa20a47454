//! Settings of Celery about the broker and its queues, each by what it changes.

use std::net::TcpListener;
use std::sync::mpsc;
use std::time::Duration;

use redis::Commands;
use serde_json::{Value, json};

use super::support::raw::envelope;
use super::support::{
    Broker, GitServer, RabbitServer, Repository, Worker, on_brokers, unique, wait_for,
};

const PATIENCE: Duration = Duration::from_secs(40);

on_brokers!(a_server_that_is_silent_is_given_up_after_the_time_that_is_said);
fn a_server_that_is_silent_is_given_up_after_the_time_that_is_said(broker: &Broker) {
    // Connections to it are made by the system and nobody answers on them.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut url = url::Url::parse(&broker.url).unwrap();
    url.set_port(Some(silent.local_addr().unwrap().port()))
        .unwrap();
    let worker = Worker::on(url.as_str())
        .env("CELERY_BROKER_CONNECTION_TIMEOUT", "0.25")
        .start_without_waiting();
    worker.wait_log("within 250ms (broker_connection_timeout)");
}

/// Servers that close every connection at once, and the order in which they were asked.
fn doors(count: usize) -> (Vec<u16>, mpsc::Receiver<usize>) {
    let (asked, order) = mpsc::channel();
    let ports = (0..count).map(|number| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = asked.clone();
        std::thread::spawn(move || {
            for _ in listener.incoming() {
                if asked.send(number).is_err() {
                    return;
                }
            }
        });
        port
    });
    (ports.collect(), order)
}

on_brokers!(servers_are_asked_in_the_order_that_is_said);
fn servers_are_asked_in_the_order_that_is_said(broker: &Broker) {
    for strategy in ["round-robin", "shuffle"] {
        // So many that shuffling does not leave them as they are.
        let (ports, order) = doors(20);
        let urls: Vec<String> = ports
            .iter()
            .map(|port| {
                let mut url = url::Url::parse(&broker.url).unwrap();
                url.set_port(Some(*port)).unwrap();
                url.to_string()
            })
            .collect();
        let worker = Worker::on(&urls.join(";"))
            .backend(&broker.results)
            .env("CELERY_BROKER_FAILOVER_STRATEGY", strategy)
            .start_without_waiting();
        let mut found = Vec::new();
        while found.len() < ports.len() {
            let number = order.recv_timeout(PATIENCE).unwrap();
            // More than one connection may be tried with each.
            if !found.contains(&number) {
                found.push(number);
            }
        }
        drop(worker);
        let sorted = found.is_sorted();
        assert_eq!(found[0], 0, "{strategy}: {found:?}");
        assert_eq!(sorted, strategy == "round-robin", "{strategy}: {found:?}");
    }
}

#[test]
fn a_worker_logs_in_and_beats_as_is_said() {
    // One that takes no other login, and tells what was agreed upon with each connection.
    let broker = RabbitServer::with(
        "[{rabbit, [{auth_mechanisms, ['AMQPLAIN']}]}, \
          {rabbitmq_management_agent, [{disable_metrics_collector, false}]}].",
    );
    let mut refused = Worker::on(&broker.url)
        .env("CELERY_BROKER_LOGIN_METHOD", "GUESS")
        .start_without_waiting();
    assert!(!refused.wait().success());
    let said = refused.log();
    assert!(said.contains("GUESS is none of PLAIN"), "{said}");
    let worker = Worker::on(&broker.url)
        .env("CELERY_BROKER_LOGIN_METHOD", "AMQPLAIN")
        .env("CELERY_BROKER_HEARTBEAT", "7")
        .start();
    let mut api = broker.api();
    let found = wait_for("its connections in RabbitMQ's list", PATIENCE, || {
        let all = api.request("GET", "connections", &Value::Null);
        let known = |connection: &&Value| !connection["timeout"].is_null();
        let known = all.as_array().unwrap().iter().filter(known);
        let found: Vec<Value> = known
            .map(|connection| json!([connection["auth_mechanism"], connection["timeout"]]))
            .collect();
        (!found.is_empty()).then_some(found)
    });
    for connection in found {
        assert_eq!(connection, json!(["AMQPLAIN", 7]), "{}", worker.log());
    }
}

#[test]
fn queues_have_the_types_that_are_said() {
    for (own, delayed) in [("classic", "quorum"), ("quorum", "classic")] {
        let broker = Broker::rabbitmq();
        let (mut api, vhost) = broker.rabbit().unwrap();
        let queue = unique("q");
        let worker = broker
            .worker()
            .queue(&queue)
            .env("CELERY_TASK_DEFAULT_QUEUE", &queue)
            .env("CELERY_TASK_DEFAULT_QUEUE_TYPE", own)
            .env("CELERY_BROKER_NATIVE_DELAYED_DELIVERY_QUEUE_TYPE", delayed)
            .start();
        let mut raw = broker.raw(&queue);
        let id = raw.send("test_task", json!(["a"]));
        raw.value(&id);
        let all = api.request(
            "GET",
            &format!("queues/{vhost}?disable_stats=true&enable_queue_totals=true"),
            &Value::Null,
        );
        let kind = |name: &str| {
            let named = all.as_array().unwrap().iter();
            let mut named = named.filter(|queue| queue["name"] == name);
            named.next().map(|queue| queue["type"].as_str().unwrap())
        };
        assert_eq!(kind(&queue), Some(own), "{}", worker.log());
        // Messages are delayed by the broker only where there are quorum queues.
        let expected = (own == "quorum").then_some(delayed);
        assert_eq!(kind("celery_delayed_0"), expected, "{}", worker.log());
    }
}

#[test]
fn quorum_queues_are_looked_for_unless_they_are_not_to_be() {
    let start = |broker: &Broker, detect: &str| {
        broker
            .worker()
            .env("CELERY_TASK_CREATE_MISSING_QUEUE_TYPE", "quorum")
            .env("CELERY_WORKER_DETECT_QUORUM_QUEUES", detect)
            .start_without_waiting()
    };
    let broker = Broker::rabbitmq();
    let worker = start(&broker, "true");
    worker.wait_log("Global QoS is disabled");
    let id = broker.raw(&worker.queue).send("test_task", json!(["a"]));
    broker.raw(&worker.queue).value(&id);
    // A limit for the whole channel is what such a queue does not take.
    let other = Broker::rabbitmq();
    let worker = start(&other, "false");
    worker.wait_log("global qos");
    assert!(!worker.log().contains("Global QoS is disabled"));
}

on_brokers!(the_default_queue_hangs_on_the_exchange_that_is_said);
fn the_default_queue_hangs_on_the_exchange_that_is_said(broker: &Broker) {
    let (queue, exchange) = (unique("q"), unique("exchange"));
    let worker = broker
        .worker()
        .queue(&queue)
        .env("CELERY_TASK_DEFAULT_QUEUE", &queue)
        .env("CELERY_TASK_DEFAULT_EXCHANGE", &exchange)
        .env("CELERY_TASK_DEFAULT_EXCHANGE_TYPE", "topic")
        .env("CELERY_TASK_DEFAULT_ROUTING_KEY", "work.#")
        .start();
    let mut raw = broker.raw(&queue);
    // A client that sends to the exchange by a key that only a topic exchange takes there.
    let value = worker.ask(
        "
from kombu import Exchange
with app.amqp.producer_pool.acquire(block=True) as producer:
    Exchange(sys.argv[1], type='topic')(producer.channel).declare()
    answer(app.send_task('test_task', args=['by topic'], exchange=sys.argv[1], producer=producer,
                         routing_key='work.hard.and.long').id)
",
        &[&exchange],
    );
    assert_eq!(
        raw.value(value.as_str().unwrap()),
        "celeriac received: by topic"
    );
    match broker.rabbit() {
        Some((mut api, vhost)) => {
            let body = envelope(&queue, "test_task", "t", &json!(["a"]), &json!({}));
            let body = body["body"].as_str().unwrap().as_bytes();
            assert!(!api.publish(&vhost, &exchange, "play", &json!({}), body));
        }
        None => {
            let mut connection = redis::Client::open(broker.url.as_str())
                .and_then(|client| client.get_connection())
                .unwrap();
            let bound: Vec<String> = connection
                .smembers(format!("_kombu.binding.{exchange}"))
                .unwrap();
            assert_eq!(bound.len(), 1, "{bound:?}");
            assert!(bound[0].starts_with("work.#\u{6}\u{16}"), "{bound:?}");
        }
    }
}

#[test]
fn prefetch_is_reduced_by_what_runs_unless_it_is_not_to_be() {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let git = GitServer::start();
    for reduced in [true, false] {
        let broker = Broker::rabbitmq();
        let worker = broker
            .worker()
            .env(
                "CELERY_WORKER_ENABLE_PREFETCH_COUNT_REDUCTION",
                &reduced.to_string(),
            )
            .start();
        let mut raw = broker.raw(&worker.queue);
        let (url, gate) = git.gated(&repository);
        let id = raw.send("analyze_repo_task", json!([1, url]));
        gate.wait_arrivals(1);
        wait_for("a new connection", PATIENCE, || {
            broker.close_connections();
            (worker.log().matches("Connected to").count() > 1).then_some(())
        });
        // One of them is for the message that came again while its task runs.
        let wanted = if reduced { 1 + 1 } else { 2 + 1 };
        // The mailbox lost its connection, too, and nothing keeps what is sent to it meanwhile.
        let ask = "
nodes = app.control.inspect([sys.argv[1]], timeout=2, limit=1).stats() or {}
answer([node['prefetch_count'] for node in nodes.values()])";
        wait_for("the prefetch count", PATIENCE, || {
            let counts = worker.ask(ask, &[&worker.node]);
            (counts == json!([wanted])).then_some(())
        });
        let told = worker
            .log()
            .contains("Temporarily reducing the prefetch count to 1 ");
        assert_eq!(told, reduced, "{}", worker.log());
        gate.open();
        raw.value(&id);
        if reduced {
            worker.wait_log("Prefetch count has been restored to the maximum of 2");
        }
    }
}

#[test]
fn a_control_exchange_of_ones_own_keeps_others_out() {
    let broker = Broker::redis();
    let worker = broker
        .worker()
        .env("CELERY_CONTROL_EXCHANGE", "ours")
        .start();
    let ask = "
def pongs(exchange):
    app.conf.control_exchange = exchange
    control = type(app.control)(app)
    return [list(pong) for pong in control.ping(timeout=3)]
answer([pongs('celery'), pongs('ours')])
";
    assert_eq!(worker.ask(ask, &[]), json!([[], [[worker.node]]]));
}
