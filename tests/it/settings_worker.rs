//! Settings of Celery about what a worker does by itself, each by what it changes.

use std::time::{Duration, Instant};

use celeriac::config::Settings;
use celeriac::protocol::envelope::Envelope;
use celeriac::transport::redis::{Options, RedisTransport};
use celeriac::transport::url::BrokerUrl;
use celeriac::transport::{Exchange, Publication, Transport};
use celeriac::worker::link::Link;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::control::call;
use super::support::raw::Raw;
use super::support::redis_server::RedisServer;
use super::support::worker::Worker;
use super::support::{Broker, GitServer, Repository, services, wait_for};

const PATIENCE: Duration = Duration::from_secs(40);

#[test]
fn no_more_ids_are_remembered_and_no_longer_than_is_said() {
    // Remote control reaches everybody on a database.
    let broker = Broker::redis();
    let worker = broker
        .worker()
        .env("CELERY_WORKER_REVOKES_MAX", "3")
        .start();
    for id in ["r1", "r2", "r3", "r4", "r5"] {
        call(&worker, "revoke", json!({"task_id": id}));
    }
    assert_eq!(
        call(&worker, "revoked", json!({})),
        json!(["r3", "r4", "r5"])
    );
    drop(worker);
    let worker = broker
        .worker()
        .env("CELERY_WORKER_REVOKE_EXPIRES", "1")
        .start();
    call(&worker, "revoke", json!({"task_id": "r6"}));
    wait_for("nothing revoked", PATIENCE, || {
        (call(&worker, "revoked", json!({})) == json!([])).then_some(())
    });
}

#[test]
fn the_pool_starts_anew_where_that_is_allowed() {
    let broker = Broker::redis();
    let worker = broker
        .worker()
        .env("CELERY_WORKER_POOL_RESTARTS", "true")
        .start();
    let children = || {
        let stats = call(&worker, "stats", json!({}));
        stats["pool"]["processes"].as_array().unwrap().clone()
    };
    let before = children();
    let said = call(&worker, "pool_restart", json!({}));
    assert_eq!(said, json!({"ok": "reload started"}));
    wait_for("two other children", PATIENCE, || {
        let now = children();
        let new = now.iter().all(|pid| !before.contains(pid));
        (now.len() == 2 && new).then_some(())
    });
}

#[test]
fn slots_and_colours_are_as_is_said() {
    let broker = Broker::redis();
    let log = |worker: &Worker| {
        let id = Raw::new(&broker.url, &worker.queue).send("test_task", json!([]));
        worker.wait_log(&format!("{id}] raised"));
        worker.log()
    };
    let plain = broker.worker().start();
    assert!(!log(&plain).contains('\u{1b}'), "{}", plain.log());
    drop(plain);
    let worker = broker
        .worker()
        // No number on the command line.
        .concurrency(0)
        .env("CELERY_WORKER_CONCURRENCY", "3")
        .env("CELERY_WORKER_LOG_COLOR", "true")
        .env("CELERY_WORKER_HIJACK_ROOT_LOGGER", "false")
        .start();
    assert!(log(&worker).contains('\u{1b}'), "{}", worker.log());
    let stats = call(&worker, "stats", json!({}));
    assert_eq!(stats["pool"]["max-concurrency"], 3);
    assert_eq!(stats["pool"]["processes"].as_array().unwrap().len(), 3);
    let conf = call(&worker, "conf", json!({}));
    assert_eq!(conf["worker_hijack_root_logger"], false, "{conf}");
}

#[test]
fn rate_limits_count_for_nothing_where_they_are_switched_off() {
    let redis = services::redis();
    let worker = Worker::on(&redis.url)
        .env("CELERY_TASK_DEFAULT_RATE_LIMIT", "1/h")
        .env("CELERY_WORKER_DISABLE_RATE_LIMITS", "true")
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let ids = [(); 4].map(|()| raw.send("test_task", json!(["a"])));
    for id in &ids {
        raw.value(id);
    }
}

#[test]
fn limits_and_children_are_as_the_settings_say_without_any_option() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let git = GitServer::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("kept");
    let mut worker = Worker::on(&redis.url)
        .concurrency(1)
        .env("CELERY_TASK_SOFT_TIME_LIMIT", "1")
        .env("CELERY_WORKER_MAX_MEMORY_PER_CHILD", "1")
        .env("CELERY_WORKER_STATE_DB", &file.to_string_lossy())
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let (url, _never_opened) = git.gated(&repository);
    let slow = raw.send("analyze_repo_task", json!([1, url]));
    assert_eq!(
        raw.wait(&slow)["result"]["exc_type"],
        "SoftTimeLimitExceeded"
    );
    let before = worker.descendants();
    let ids = [(); 3].map(|()| {
        let address = format!("file://{}", repository.path().display());
        raw.send("analyze_repo_task", json!([1, address]))
    });
    for id in &ids {
        raw.value(id);
    }
    // Any child is too large for that.
    wait_for("other children", PATIENCE, || {
        let now = worker.descendants();
        now.iter().all(|pid| !before.contains(pid)).then_some(())
    });
    worker.stop();
    assert!(file.exists());
}

#[test]
fn an_idle_worker_takes_its_time_to_stop_where_it_is_to() {
    let redis = services::redis();
    for wanted in [true, false] {
        let mut worker = Worker::on(&redis.url)
            .env("CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT", "1.5")
            .env(
                "CELERY_WORKER_ENABLE_SOFT_SHUTDOWN_ON_IDLE",
                &wanted.to_string(),
            )
            .start();
        let mut raw = Raw::new(&redis.url, &worker.queue);
        let far = json!({"eta": "2999-01-01T00:00:00"});
        let id = raw.send_with("test_task", json!(["later"]), &far);
        worker.wait_log(&format!("{id}] received"));
        worker.signal(Signal::SIGQUIT);
        assert_eq!(worker.wait().code(), Some(0));
        let told = worker
            .log()
            .contains("Initiating Soft Shutdown, terminating in 1.5 seconds");
        assert_eq!(told, wanted, "{}", worker.log());
        assert_eq!((raw.waiting(), raw.unacked()), (1, 0));
    }
}

#[tokio::test]
async fn a_publication_is_tried_again_as_is_said() {
    let mut server = RedisServer::start();
    let url = BrokerUrl::parse(&server.url).unwrap();
    let transport = RedisTransport::new(&[url], Options::default()).unwrap();
    let channel = transport.connect().await.unwrap();
    server.kill();
    let took = async |retry: bool, policy: Value| {
        let link = Link::new(&Settings {
            task_publish_retry: retry,
            task_publish_retry_policy: policy.as_object().unwrap().clone(),
            ..Settings::default()
        });
        // A broker that has just gone away, which the worker does not know yet.
        link.connect(channel.clone());
        let began = Instant::now();
        let published = link.publish(Publication {
            exchange: Exchange::default_exchange(),
            routing_key: "q".to_owned(),
            envelope: Envelope::default(),
        });
        assert!(published.await.is_err());
        began.elapsed().as_secs_f64()
    };
    let hour = json!({"max_retries": 5, "interval_start": 3600, "interval_max": 3600});
    assert!(took(false, hour).await < 60.0);
    let none = json!({"max_retries": 0, "interval_start": 3600, "interval_max": 3600});
    assert!(took(true, none).await < 60.0);
    // 0.5, then twice the most.
    let policy = json!({"max_retries": 3, "interval_start": 0.5, "interval_step": 0.5,
        "interval_max": 0.75});
    let three = took(true, policy).await;
    assert!((2.0..60.0).contains(&three), "{three}");
}
