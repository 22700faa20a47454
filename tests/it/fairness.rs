//! Limits and turns of users.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::git_server::Gate;
use crate::support::raw::envelope;
use crate::support::{
    Broker, GitServer, Proxy, Raw, Repository, Shared, Worker, on_brokers, services, unique,
    wait_for,
};

const TASK: &str = "analyze_repo_task";

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\ntwo\n")]);
    repository
}

fn reason(meta: &Value) -> String {
    meta["result"]["exc_message"][0]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

/// Waits until the task is told to wait; returns why.
fn wait_waiting(raw: &mut Raw, id: &str) -> String {
    wait_for(
        &format!("RETRY of {id}"),
        Duration::from_secs(20),
        || match raw.meta(id)? {
            meta if meta["status"] == "RETRY" => Some(reason(&meta)),
            _ => None,
        },
    )
}

on_brokers!(a_users_limit_holds_over_two_workers_and_a_killed_one_gives_back);
fn a_users_limit_holds_over_two_workers_and_a_killed_one_gives_back(broker: &Broker) {
    let shared = Shared::new(broker);
    let (queue, repository, server) = (unique("q"), repository(), GitServer::start());
    let start = || {
        shared
            .worker()
            .queue(&queue)
            .env("USER_MAX_RUNNING", "2")
            // One slot more than one worker can use: nobody asks for a task without a slot.
            .concurrency(3)
            .start()
    };
    let mut workers = [start(), start()];
    let mut raw = shared.raw(&workers[0]);
    let user = unique("u");
    let tasks: Vec<(String, Gate)> = (0..6)
        .map(|_| {
            let (url, gate) = server.gated(&repository);
            (raw.send(TASK, json!([user, url])), gate)
        })
        .collect();
    let begun = |tasks: &[(String, Gate)]| -> Vec<usize> {
        let has = |place: &usize| tasks[*place].1.arrivals() > 0;
        (0..tasks.len()).filter(has).collect()
    };
    wait_for("two to run", Duration::from_secs(20), || {
        (begun(&tasks).len() == 2).then_some(())
    });
    for place in (0..6).filter(|place| !begun(&tasks).contains(place)) {
        let why = wait_waiting(&mut raw, &tasks[place].0);
        assert!(
            why.contains("USER_MAX_RUNNING=2") && why.contains("not before 20"),
            "{why}"
        );
    }
    // Everybody was asked for by now, both workers have free slots, and still:
    let first = begun(&tasks);
    assert_eq!((first.len(), shared.running(&user)), (2, 2));

    // A worker that runs at least one of them dies.
    let runs_any = |worker: &Worker| {
        let label = |place: &usize| format!("{TASK}[{}] received", tasks[*place].0);
        first
            .iter()
            .any(|place| worker.log().contains(&label(place)))
    };
    let dying = workers
        .iter()
        .position(runs_any)
        .expect("one of them runs it");
    let lost = first
        .iter()
        .filter(|place| {
            let line = format!("{TASK}[{}] received", tasks[**place].0);
            workers[dying].log().contains(&line)
        })
        .count();
    let killed = Instant::now();
    workers[dying].kill();
    // As many start anew (or again) as were lost.
    let arrived =
        |tasks: &[(String, Gate)]| -> usize { tasks.iter().map(|(_, gate)| gate.arrivals()).sum() };
    let most = wait_for("others to start", Duration::from_secs(20), || {
        let alive = shared.running(&user);
        assert!(alive <= 2, "{alive} permits");
        (arrived(&tasks) >= 2 + lost).then_some(alive)
    });
    let recovered = killed.elapsed();
    println!("{lost} lost, started anew after {recovered:?}, {most} permits");
    for (_, gate) in &tasks {
        gate.open();
    }
    for (id, _) in &tasks {
        let mut alive = 0;
        wait_for("the end", Duration::from_secs(60), || {
            alive = alive.max(shared.running(&user));
            (raw.status(id) == "SUCCESS").then_some(())
        });
        assert!(alive <= 2, "{alive} permits");
    }
    // Given back after the message, not by the end of their leases.
    wait_for("no permit to be left", Duration::from_secs(3), || {
        (shared.kept(&user) == 0).then_some(())
    });
}

on_brokers!(two_users_limits_hold_through_kills_and_no_permit_of_the_dead_outlives_its_lease);
fn two_users_limits_hold_through_kills_and_no_permit_of_the_dead_outlives_its_lease(
    broker: &Broker,
) {
    let shared = Shared::new(broker);
    let (repository, server) = (repository(), GitServer::start());
    let users = [unique("u"), unique("v")];
    let queues = [unique("q"), unique("q")];
    let start = |queue: &str| {
        shared
            .worker()
            .queue(queue)
            .env("USER_MAX_RUNNING", "2")
            .concurrency(5)
            .start()
    };
    let mut workers = queues.each_ref().map(|queue| start(queue));
    let mut raws = workers.each_ref().map(|worker| shared.raw(worker));
    // Each worker has as many tasks as both users may run: either one or the other runs them.
    let mut send = |place: usize| -> Vec<(String, Gate)> {
        let of_both = users.iter().chain(&users);
        of_both
            .map(|user| {
                let (url, gate) = server.gated(&repository);
                (raws[place].send(TASK, json!([user, url])), gate)
            })
            .collect()
    };
    let arrivals =
        |tasks: &[(String, Gate)]| -> usize { tasks.iter().map(|(_, gate)| gate.arrivals()).sum() };
    let first = send(0);
    wait_for("four to run", Duration::from_secs(20), || {
        (arrivals(&first) == 4).then_some(())
    });
    let tasks = [first, send(1)];
    let within_limits = || {
        users.each_ref().map(|user| {
            let permits = shared.permits(user);
            assert!(permits.len() <= 2, "{permits:?}");
            permits.into_iter().max().unwrap_or(0)
        })
    };
    for dying in [0, 1, 0] {
        let next = 1 - dying;
        // Every task of the other worker waits for the limits.
        wait_for("the other's tasks to wait", Duration::from_secs(40), || {
            within_limits();
            let waits = |(id, _): &(String, Gate)| {
                let line = format!("{TASK}[{id}] waits: user");
                workers[next].log().contains(&line)
            };
            tasks[next].iter().all(waits).then_some(())
        });
        let before = arrivals(&tasks[next]);
        workers[dying].kill();
        let killed = Instant::now();
        let longest = within_limits();
        assert!(
            longest.iter().all(|left| *left <= 4000),
            "permits that end in {longest:?} ms"
        );
        wait_for("the other's to start", Duration::from_secs(40), || {
            within_limits();
            (arrivals(&tasks[next]) == before + 4).then_some(())
        });
        println!(
            "permits ended in {longest:?} ms; all places used again after {:?}",
            killed.elapsed()
        );
        workers[dying] = start(&queues[dying]);
    }
    for (_, gate) in tasks.iter().flatten() {
        gate.open();
    }
    let mut raws = workers.each_ref().map(|worker| shared.raw(worker));
    for (raw, tasks) in raws.iter_mut().zip(&tasks) {
        for (id, _) in tasks {
            wait_for("the end", Duration::from_secs(60), || {
                within_limits();
                (raw.status(id) == "SUCCESS").then_some(())
            });
        }
        raw.wait_drained();
    }
}

on_brokers!(two_messages_of_one_id_are_two_tasks_of_their_user_who_is_shown_on_one_line);
fn two_messages_of_one_id_are_two_tasks_of_their_user_who_is_shown_on_one_line(broker: &Broker) {
    let shared = Shared::new(broker);
    let (repository, server) = (repository(), GitServer::start());
    let worker = shared.worker().env("USER_MAX_RUNNING", "1").start();
    let mut raw = shared.raw(&worker);
    let user = format!("{}\n[ERROR] forged", unique("u"));
    let (first, held) = server.gated(&repository);
    let id = raw.send(TASK, json!([user, first]));
    held.wait_arrivals(1);
    let (second, gate) = server.gated(&repository);
    raw.push_envelope(&envelope(
        &worker.queue,
        TASK,
        &id,
        &json!([user, second]),
        &json!({}),
    ));
    worker.wait_log("waits: user");
    let shown = user.replace('\n', "\u{fffd}");
    assert!(worker.log().contains(&shown) && !worker.log().contains("\n[ERROR]"));
    assert_eq!(gate.arrivals(), 0, "the user has one running");
    held.open();
    // It is another repository, so the first one's answer is not its own.
    gate.wait_arrivals(1);
    gate.open();
    raw.wait_drained();
    let rows = shared.postgres.rows("SELECT repo_url FROM analyses");
    assert_eq!(rows, [[Some(second)]], "the later request has the row");
    // As in Celery, where a success is not written over.
    assert_eq!(raw.value(&id)["repo_url"], json!(first));
}

on_brokers!(one_users_thousand_tasks_do_not_keep_another_users_first_waiting);
fn one_users_thousand_tasks_do_not_keep_another_users_first_waiting(broker: &Broker) {
    let (repository, server) = (repository(), GitServer::start());
    let (shared, queue) = (Shared::new(broker), unique("q"));
    let start = || {
        shared
            .worker()
            .queue(&queue)
            .env("USER_MAX_RUNNING", "1")
            .start()
    };
    let (worker, _other) = (start(), start());
    let mut raw = broker.raw(&worker.queue);
    let (held, gate) = server.gated(&repository);
    let many: Vec<String> = (0..1000)
        .map(|_| raw.send(TASK, json!(["many", held])))
        .collect();
    gate.wait_arrivals(1);
    let sent = Instant::now();
    let one = raw.send(TASK, json!(["one", server.open(&repository)]));
    assert_eq!(raw.value(&one)["total_contributors"], 1);
    println!("behind a thousand: {:?}", sent.elapsed());
    assert_eq!(gate.arrivals(), 1, "the user with many is at the limit");
    let last = wait_waiting(&mut raw, &many[999]);
    assert!(last.contains("user many has 1 running"), "{last}");
    // What waits can be revoked and does not outlive it.
    let revoked = worker.ask(
        "app.control.revoke(sys.argv[1])\nresult = AsyncResult(sys.argv[1], app=app)\n\
         try:\n    result.get(timeout=60)\nexcept Exception as error:\n    answer([result.state, type(error).__name__])",
        &[&many[500]],
    );
    assert_eq!(revoked, json!(["REVOKED", "TaskRevokedError"]));
}

on_brokers!(a_rate_counts_starts_over_all_workers);
fn a_rate_counts_starts_over_all_workers(broker: &Broker) {
    let shared = Shared::new(broker);
    let (queue, repository, server) = (unique("q"), repository(), GitServer::start());
    let start = || {
        shared
            .worker()
            .queue(&queue)
            .env("USER_RATE_LIMIT", "3/h")
            .start()
    };
    let workers = [start(), start()];
    let mut raw = shared.raw(&workers[0]);
    let url = server.open(&repository);
    let sent: Vec<String> = (0..7).map(|_| raw.send(TASK, json!([7, url]))).collect();
    let states = wait_for("3 done and 4 waiting", Duration::from_secs(30), || {
        let states: Vec<String> = sent.iter().map(|id| raw.status(id)).collect();
        let count = |state: &str| states.iter().filter(|one| *one == state).count();
        (count("SUCCESS") == 3 && count("RETRY") == 4).then_some(states)
    });
    let waits = states.iter().position(|state| state == "RETRY").unwrap();
    let why = wait_waiting(&mut raw, &sent[waits]);
    assert!(why.contains("USER_RATE_LIMIT=3/h"), "{why}");
    // Others are not touched by it.
    let other = raw.send(TASK, json!([8, url]));
    assert_eq!(raw.value(&other)["status"], "success");
}

#[test]
fn while_the_database_that_counts_is_away_its_users_tasks_wait_and_others_run() {
    let broker = Broker::rabbitmq();
    let (repository, server) = (repository(), GitServer::start());
    let mut postgres = services::postgres();
    let proxy = Proxy::before(&postgres.url);
    let direct = std::mem::take(&mut postgres.url);
    postgres.url = proxy.url(&direct);
    let worker = broker
        .worker()
        .database(&postgres)
        .env("USER_MAX_RUNNING", "1")
        .start();
    postgres.url = direct;
    let mut raw = broker.raw(&worker.queue);
    let url = server.open(&repository);
    let counted = raw.send(TASK, json!(["u", url]));
    assert_eq!(raw.value(&counted)["status"], "success");
    for (away, who) in [("cut", "v"), ("stalled", "w")] {
        match away {
            "cut" => proxy.cut(),
            _ => proxy.stall(),
        }
        let waits = raw.send(TASK, json!([who, url]));
        let why = wait_waiting(&mut raw, &waits);
        assert!(why.contains("the database that counts"), "{away}: {why}");
        let other = raw.send("test_task", json!(["beside it"]));
        assert!(raw.value(&other).to_string().contains("beside it"));
        assert_eq!(raw.status(&waits), "RETRY");
        proxy.heal();
        assert_eq!(raw.value(&waits)["status"], "success", "{away}");
    }
}

#[test]
fn workers_that_share_a_file_count_together() {
    let broker = Broker::rabbitmq();
    let (repository, server) = (repository(), GitServer::start());
    let directory = tempfile::tempdir().unwrap();
    let file = format!("sqlite:///{}/shared.db", directory.path().display());
    let queue = unique("q");
    let workers = [(), ()].map(|()| {
        let worker = broker.worker().queue(&queue);
        let worker = worker.env("USER_MAX_RUNNING", "1");
        worker.env("DATABASE_URL", &file).start()
    });
    let mut raw = broker.raw(&queue);
    let (url, gate) = server.gated(&repository);
    let tasks: Vec<String> = (0..4).map(|_| raw.send(TASK, json!(["u", url]))).collect();
    gate.wait_arrivals(1);
    wait_for("three to wait", Duration::from_secs(20), || {
        let states = tasks.iter().map(|id| raw.status(id));
        (states.filter(|state| state == "RETRY").count() == 3).then_some(())
    });
    assert_eq!(gate.arrivals(), 1);
    let told = |worker: &Worker| worker.log().contains("count over the workers that share");
    assert!(workers.iter().any(told), "it is said how far that goes");
    gate.open();
    for id in &tasks {
        assert_eq!(raw.value(id)["status"], "success");
    }
}
