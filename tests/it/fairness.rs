//! Limits and turns of users, and work that is done once.

use std::time::{Duration, Instant};

use redis::Commands;
use serde_json::{Value, json};

use crate::support::git_server::Gate;
use crate::support::raw::envelope;
use crate::support::{
    Broker, GitServer, Raw, Repository, Worker, on_brokers, services, unique, wait_for,
};

const TASK: &str = "analyze_repo_task";

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\ntwo\n")]);
    repository
}

fn raw_of(worker: &Worker) -> Raw {
    Raw::new(worker.broker(), &worker.queue)
}

/// How many permits of a user are alive at the server.
fn running(raw: &mut Raw, user: &str) -> usize {
    let key = format!("celeriac.running.{user}");
    raw.with(|connection| connection.zcard(&key))
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

#[test]
fn a_users_limit_holds_over_two_workers_and_a_killed_one_gives_back() {
    let redis = services::redis();
    let (queue, repository, server) = (unique("q"), repository(), GitServer::start());
    let start = || {
        Worker::on(&redis.url)
            .queue(&queue)
            .env("USER_MAX_RUNNING", "2")
            // One slot more than one worker can use: nobody asks for a task without a slot.
            .concurrency(3)
            .start()
    };
    let mut workers = [start(), start()];
    let mut raw = raw_of(&workers[0]);
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
    assert_eq!((first.len(), running(&mut raw, &user)), (2, 2));

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
        let alive = running(&mut raw, &user);
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
            alive = alive.max(running(&mut raw, &user));
            (raw.status(id) == "SUCCESS").then_some(())
        });
        assert!(alive <= 2, "{alive} permits");
    }
    // Given back after the message, not by the end of their leases.
    let key = format!("celeriac.running.{user}");
    let _: bool = raw.with(|connection| connection.persist(&key));
    wait_for("no permit to be left", Duration::from_secs(3), || {
        (running(&mut raw, &user) == 0).then_some(())
    });
}

/// When a user's last permit ends unless it is renewed, in milliseconds from now, by the
/// server's clock.
fn longest_permit(raw: &mut Raw, user: &str) -> i64 {
    let key = format!("celeriac.running.{user}");
    raw.with(|connection| {
        let (seconds, micros): (i64, i64) = redis::cmd("TIME").query(connection)?;
        let last: Vec<(String, f64)> = connection.zrevrange_withscores(&key, 0, 0)?;
        let until = last.first().map_or(0.0, |(_, until)| *until) as i64;
        Ok(until - (seconds * 1000 + micros / 1000))
    })
}

#[test]
fn two_users_limits_hold_through_kills_and_no_permit_of_the_dead_outlives_its_lease() {
    let (redis, repository, server) = (services::redis(), repository(), GitServer::start());
    let users = [unique("u"), unique("v")];
    let queues = [unique("q"), unique("q")];
    let start = |queue: &str| {
        Worker::on(&redis.url)
            .queue(queue)
            .env("USER_MAX_RUNNING", "2")
            .concurrency(5)
            .start()
    };
    let mut workers = queues.each_ref().map(|queue| start(queue));
    let mut raws = workers.each_ref().map(raw_of);
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
    let mut raws = workers.each_ref().map(raw_of);
    let mut within_limits = move || {
        for user in &users {
            let alive = running(&mut raws[0], user);
            assert!(alive <= 2, "{alive} permits");
        }
        users
            .each_ref()
            .map(|user| longest_permit(&mut raws[0], user))
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
    let mut raws = workers.each_ref().map(raw_of);
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

#[test]
fn two_messages_of_one_id_are_two_tasks_of_their_user_who_is_shown_on_one_line() {
    let redis = services::redis();
    let (repository, server) = (repository(), GitServer::start());
    let worker = Worker::on(&redis.url).env("USER_MAX_RUNNING", "1").start();
    let mut raw = raw_of(&worker);
    let user = format!("{}\n[ERROR] forged", unique("u"));
    let (first, held) = server.gated(&repository);
    let id = raw.send(TASK, json!([user, first]));
    held.wait_arrivals(1);
    // Its turn comes when the first has ended, or it would be cloned.
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
    held.open();
    raw.wait_drained();
    assert_eq!(gate.arrivals(), 0, "the first one's answer is stored");
}

on_brokers!(one_users_thousand_tasks_do_not_keep_another_users_first_waiting);
fn one_users_thousand_tasks_do_not_keep_another_users_first_waiting(broker: &Broker) {
    let (repository, server) = (repository(), GitServer::start());
    let queue = unique("q");
    let start = || {
        broker
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
    // Without a Redis each worker counts alone.
    let most = if broker.is_redis() { 1 } else { 2 };
    let arrivals = gate.arrivals();
    assert!(
        arrivals <= most,
        "the user with many is at the limit: {arrivals}"
    );
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

#[test]
fn a_rate_counts_starts_over_all_workers() {
    let redis = services::redis();
    let (queue, repository, server) = (unique("q"), repository(), GitServer::start());
    let start = || {
        Worker::on(&redis.url)
            .queue(&queue)
            .env("USER_RATE_LIMIT", "3/h")
            .start()
    };
    let workers = [start(), start()];
    let mut raw = raw_of(&workers[0]);
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

on_brokers!(a_stored_analysis_answers_while_head_stays_and_the_token_is_good);
fn a_stored_analysis_answers_while_head_stays_and_the_token_is_good(broker: &Broker) {
    let postgres = services::postgres();
    let (mut repository, server) = (repository(), GitServer::start());
    let worker = broker
        .worker()
        .database(&postgres)
        .env("RESULT_REUSE_TTL", "3600")
        .start();
    let mut raw = broker.raw(&worker.queue);
    let token = unique("secret");
    let url = server.with_token(&repository, &token);
    let packs = || {
        let asked = server.requests();
        asked
            .iter()
            .filter(|request| request.method == "POST" && request.body_has("command=fetch"))
            .count()
    };
    let mut ask = |user: &str, token: Value| {
        let id = raw.send(TASK, json!([user, url, token]));
        raw.wait(&id)
    };
    let first = ask("a", json!(token));
    assert_eq!((&first["status"], packs()), (&json!("SUCCESS"), 1));
    let again = ask("b", json!(token));
    assert_eq!(again["result"], first["result"]);
    assert_eq!(packs(), 1, "the second one needed no pack");
    // Whoever may not read the repository now learns nothing of it.
    for token in [json!("wrong"), Value::Null] {
        let refused = ask("c", token);
        assert_eq!(refused["status"], "FAILURE", "{refused}");
        assert!(
            !refused.to_string().contains("ada@example.com"),
            "{refused}"
        );
    }
    repository.commit("Bob <bob@example.com>", &[("b.txt", "three\n")]);
    let moved = ask("a", json!(token));
    assert_eq!(moved["result"]["total_contributors"], 2, "{moved}");
    assert_eq!(packs(), 2);
    let rows = postgres
        .rows("SELECT count(*), count(DISTINCT head_commit) FROM analyses WHERE state = 'SUCCESS'");
    let row: Vec<&str> = rows[0].iter().flatten().map(String::as_str).collect();
    assert_eq!(row, ["3", "2"], "every task has its row");
}

on_brokers!(tasks_for_the_same_repository_at_once_do_the_work_once);
fn tasks_for_the_same_repository_at_once_do_the_work_once(broker: &Broker) {
    let (repository, server) = (repository(), GitServer::start());
    let worker = broker.worker().start();
    let mut raw = broker.raw(&worker.queue);
    let idle = prefetch(&worker);
    let (url, gate) = server.gated(&repository);
    let sent: Vec<String> = (0..5)
        .map(|number| raw.send(TASK, json!([number, url])))
        .collect();
    gate.wait_arrivals(1);
    wait_for("four to wait", Duration::from_secs(20), || {
        let log = worker.log();
        let waiting = log.matches("waits for the analysis of the same repository");
        (waiting.count() == 4).then_some(())
    });
    // One message more is fetched for each that waits or runs, and not two.
    wait_for("the prefetch count", Duration::from_secs(20), || {
        (prefetch(&worker) == idle + 5).then_some(())
    });
    // They hold no slot: something else runs beside them.
    let other = raw.send(TASK, json!([9, server.open(&repository)]));
    assert_eq!(raw.value(&other)["status"], "success");
    // One that waits can be ended.
    let ended = worker.ask(
        "app.control.terminate(sys.argv[1])\nresult = AsyncResult(sys.argv[1], app=app)\n\
         try:\n    result.get(timeout=60)\nexcept Exception as error:\n    answer(result.state)",
        &[&sent[4]],
    );
    assert_eq!(ended, json!("REVOKED"));
    gate.open();
    let values: Vec<Value> = sent[..4].iter().map(|id| raw.value(id)).collect();
    assert!(values.iter().all(|value| *value == values[0]));
    let asked = server.requests();
    let packs: Vec<_> = asked
        .iter()
        .filter(|request| request.target.contains(path_of(&url)))
        .filter(|request| request.body_has("command=fetch"))
        .collect();
    assert_eq!(packs.len(), 1, "one clone for four tasks");
    raw.wait_drained();
}

/// The worker's prefetch count.
fn prefetch(worker: &Worker) -> u64 {
    let stats = worker.ask(
        "answer([node['prefetch_count'] for node in inspect.stats().values()])",
        &[],
    );
    stats[0].as_u64().expect("a count")
}

fn path_of(url: &str) -> &str {
    let rest = url.strip_prefix("http://").unwrap_or(url);
    rest.find('/').map_or("", |at| &rest[at..])
}

on_brokers!(a_task_whose_leader_fails_does_the_work_itself);
fn a_task_whose_leader_fails_does_the_work_itself(broker: &Broker) {
    let (repository, server) = (repository(), GitServer::start());
    let worker = broker.worker().start();
    let mut raw = broker.raw(&worker.queue);
    let (url, gate) = server.gated(&repository);
    let limited = raw.send_with(TASK, json!([1, url]), &json!({"timelimit": [8, null]}));
    gate.wait_arrivals(1);
    let follower = raw.send(TASK, json!([2, url]));
    worker.wait_log("waits for the analysis of the same repository");
    assert_eq!(
        raw.wait(&limited)["result"]["exc_type"],
        "TimeLimitExceeded"
    );
    gate.wait_arrivals(2);
    gate.open();
    assert_eq!(raw.value(&follower)["total_contributors"], 1);
}

/// Two workers that share a database and reuse what is in it, each with a queue of its own.
fn reusing(redis: &services::Redis, postgres: &services::Postgres) -> [Worker; 2] {
    [(), ()].map(|()| {
        Worker::on(&redis.url)
            .database(postgres)
            .env("RESULT_REUSE_TTL", "3600")
            .start()
    })
}

/// Leases of repositories at the server.
fn leases(redis: &services::Redis) -> Vec<String> {
    let keys = redis.keys().into_iter();
    keys.filter(|key| key.contains("celeriac.analysing."))
        .collect()
}

#[test]
fn two_workers_with_the_same_repository_at_once_do_the_work_once() {
    let (redis, postgres) = (services::redis(), services::postgres());
    let (repository, server) = (repository(), GitServer::start());
    let workers = reusing(&redis, &postgres);
    let [mut first, mut second] = workers.each_ref().map(raw_of);
    let (url, gate) = server.gated(&repository);
    let leader = first.send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    let named = leases(&redis);
    let digest = |key: &String| {
        let name = key.rsplit('.').next().unwrap_or_default();
        name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    assert!(!named.is_empty() && named.iter().all(digest), "{named:?}");

    // One that waits can be ended; the next in line of its worker waits in its place.
    let waits = |id: &str| {
        let line = format!(
            "{TASK}[{id}] waits for the analysis of the same repository that is under way in \
             another worker"
        );
        workers[1].wait_log(&line);
    };
    let ended = second.send(TASK, json!([2, url]));
    waits(&ended);
    let follower = second.send(TASK, json!([3, url]));
    workers[1].wait_log(&format!("{TASK}[{follower}] waits"));
    workers[1].ask("app.control.terminate(sys.argv[1])\nanswer(0)", &[&ended]);
    assert_eq!(second.wait(&ended)["status"], "REVOKED");
    waits(&follower);
    assert_eq!(gate.arrivals(), 1, "nobody else has asked the server");

    gate.open();
    let found = first.value(&leader);
    assert_eq!(found["total_contributors"], 1);
    assert_eq!(second.value(&follower), found);
    let asked = server.requests();
    let mine = asked
        .iter()
        .filter(|request| request.target.contains(path_of(&url)));
    let packs = mine.filter(|request| request.body_has("command=fetch"));
    assert_eq!(packs.count(), 1, "one clone for both workers");
    wait_for("the leases to be gone", Duration::from_secs(20), || {
        let left = leases(&redis);
        left.iter().all(|key| !named.contains(key)).then_some(())
    });
}

#[test]
fn a_worker_whose_leader_in_another_worker_is_killed_does_the_work_itself() {
    let (redis, postgres) = (services::redis(), services::postgres());
    let (repository, server) = (repository(), GitServer::start());
    let mut workers = reusing(&redis, &postgres);
    let [mut first, mut second] = workers.each_ref().map(raw_of);
    let (url, gate) = server.gated(&repository);
    first.send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    let follower = second.send(TASK, json!([2, url]));
    workers[1].wait_log("under way in another worker");
    assert_eq!(gate.arrivals(), 1);
    workers[0].kill();
    gate.wait_arrivals(2);
    gate.open();
    assert_eq!(second.value(&follower)["total_contributors"], 1);
}

#[test]
fn whoever_waits_for_an_analysis_has_to_be_let_in_by_the_server_too() {
    let (redis, postgres) = (services::redis(), services::postgres());
    let (repository, server, token) = (repository(), GitServer::start(), unique("secret"));
    let workers = reusing(&redis, &postgres);
    let [mut first, mut second] = workers.each_ref().map(raw_of);
    let (url, gate) = server.gated_with_token(&repository, &token);
    let leader = first.send(TASK, json!(["a", url, token]));
    gate.wait_arrivals(1);
    let beside = first.send(TASK, json!(["b", url, "wrong"]));
    workers[0].wait_log(&format!("{TASK}[{beside}] waits"));
    let elsewhere = second.send(TASK, json!(["c", url]));
    workers[1].wait_log("under way in another worker");
    let friend = second.send(TASK, json!(["d", url, token]));
    workers[1].wait_log(&format!("{TASK}[{friend}] waits"));
    gate.open();
    let found = first.value(&leader);
    for refused in [first.wait(&beside), second.wait(&elsewhere)] {
        let text = refused.to_string();
        assert_eq!(refused["status"], "FAILURE", "{text}");
        assert!(
            text.contains("HTTP 401") && !text.contains("ada@"),
            "{text}"
        );
    }
    assert_eq!(second.value(&friend), found, "a refusal is nobody else's");
    let packs = server.requests();
    let packs = packs
        .iter()
        .filter(|request| request.body_has("command=fetch"));
    assert_eq!(packs.count(), 1);
}

#[test]
fn a_worker_that_is_told_to_stop_hands_back_what_waits_or_ends_it_first() {
    let (redis, postgres) = (services::redis(), services::postgres());
    let (repository, server) = (repository(), GitServer::start());
    let [leading, mut waiting] = reusing(&redis, &postgres);
    let mut raws = [raw_of(&leading), raw_of(&waiting)];
    let (url, gate) = server.gated(&repository);
    let leader = raws[0].send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    // At once: whoever waits has done nothing yet, and goes back.
    let back = raws[1].send(TASK, json!([2, url]));
    waiting.wait_log("under way in another worker");
    waiting.signal(nix::sys::signal::Signal::SIGQUIT);
    assert!(waiting.wait().success());
    let queue = waiting.queue.clone();
    let waits: usize = raws[1].with(|connection| connection.llen(&queue));
    assert_eq!(waits, 1, "{}", waiting.log());
    // In peace: it waits, and goes on when it may.
    let mut next = Worker::on(&redis.url)
        .database(&postgres)
        .queue(&queue)
        .env("RESULT_REUSE_TTL", "3600")
        .start();
    next.wait_log("under way in another worker");
    next.signal(nix::sys::signal::Signal::SIGTERM);
    next.wait_log("Warm shutdown");
    assert_eq!(gate.arrivals(), 1);
    gate.open();
    let found = raws[0].value(&leader);
    assert_eq!(raws[1].value(&back), found);
    assert!(next.wait().success());
}

#[test]
fn a_leader_that_was_stopped_for_longer_than_its_lease_is_not_waited_for() {
    use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
    let (redis, postgres) = (services::redis(), services::postgres());
    let (repository, server) = (repository(), GitServer::start());
    let workers = reusing(&redis, &postgres);
    let [mut first, mut second] = workers.each_ref().map(raw_of);
    let (url, gate) = server.gated(&repository);
    let leader = first.send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    let follower = second.send(TASK, json!([2, url]));
    workers[1].wait_log("under way in another worker");
    workers[0].signal(SIGSTOP);
    gate.wait_arrivals(2);
    workers[0].signal(SIGCONT);
    gate.open();
    assert_eq!(second.value(&follower), first.value(&leader));
    wait_for("the leases to be gone", Duration::from_secs(20), || {
        leases(&redis).is_empty().then_some(())
    });
}

#[test]
fn whoever_waits_does_the_work_when_the_broker_forgets_the_lease() {
    let (broker, postgres) = (crate::support::RedisServer::start(), services::postgres());
    let (repository, server) = (repository(), GitServer::start());
    let workers = [(), ()].map(|()| {
        Worker::on(&broker.url)
            .database(&postgres)
            .env("RESULT_REUSE_TTL", "3600")
            .start()
    });
    let [mut first, mut second] = workers.each_ref().map(raw_of);
    let (url, gate) = server.gated(&repository);
    let leader = first.send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    let follower = second.send(TASK, json!([2, url]));
    workers[1].wait_log("under way in another worker");
    drop(broker);
    gate.wait_arrivals(2);
    gate.open();
    // Both are done, whoever can be told of it.
    wait_for("both rows", Duration::from_secs(30), || {
        let rows = postgres.rows("SELECT task_id FROM analyses WHERE state = 'SUCCESS'");
        let has = |id: &String| rows.iter().flatten().flatten().any(|one| one == id);
        (has(&leader) && has(&follower)).then_some(())
    });
}
