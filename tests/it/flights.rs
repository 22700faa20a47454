//! Work that is done once: analyses that are reused, and those that others wait for.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    Broker, GitServer, Raw, Repository, Shared, Worker, on_brokers, services, unique, wait_for,
};

const TASK: &str = "analyze_repo_task";

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\ntwo\n")]);
    repository
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

on_brokers!(a_task_that_waits_for_anothers_analysis_ends_by_its_own_time_limits);
fn a_task_that_waits_for_anothers_analysis_ends_by_its_own_time_limits(broker: &Broker) {
    let shared = Shared::new(broker);
    let (repository, server) = (repository(), GitServer::start());
    let (_workers, raws) = shared.pair();
    let [mut first, mut second] = raws;
    let (url, gate) = server.gated(&repository);
    let leader = first.send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    // In the leader's worker, and in another one.
    for raw in [&mut first, &mut second] {
        let hard = raw.send_with(TASK, json!([2, url]), &json!({"timelimit": [2, null]}));
        let soft = raw.send_with(TASK, json!([3, url]), &json!({"timelimit": [600, 2]}));
        assert_eq!(raw.wait(&hard)["result"]["exc_type"], "TimeLimitExceeded");
        let soft = raw.wait(&soft);
        assert_eq!(soft["result"]["exc_type"], "SoftTimeLimitExceeded");
        let rows = format!("SELECT error FROM analyses WHERE task_id = '{hard}'");
        let rows = shared.postgres.rows(&rows);
        let error = rows[0][0].as_deref().unwrap_or_default();
        assert!(error.contains("(2"), "the limit as it was given: {error}");
    }
    assert_eq!(gate.arrivals(), 1, "nobody has done anything");
    gate.open();
    assert_eq!(first.value(&leader)["status"], "success");
}

on_brokers!(two_workers_with_the_same_repository_at_once_do_the_work_once);
fn two_workers_with_the_same_repository_at_once_do_the_work_once(broker: &Broker) {
    let shared = Shared::new(broker);
    let (repository, server) = (repository(), GitServer::start());
    let (workers, [mut first, mut second]) = shared.pair();
    let (url, gate) = server.gated(&repository);
    let leader = first.send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    assert_eq!(shared.leases(), 1);

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
    wait_for("the lease to be gone", Duration::from_secs(20), || {
        (shared.leases() == 0).then_some(())
    });
    // Nobody waited, and nothing is reused that was done before: that is RESULT_REUSE_TTL's.
    let later = second.send(TASK, json!([4, url]));
    assert_eq!(second.value(&later), found);
    let asked = server.requests();
    let mine = asked
        .iter()
        .filter(|request| request.target.contains(path_of(&url)));
    let packs = mine.filter(|request| request.body_has("command=fetch"));
    assert_eq!(packs.count(), 2);
}

on_brokers!(a_worker_whose_leader_in_another_worker_is_killed_does_the_work_itself);
fn a_worker_whose_leader_in_another_worker_is_killed_does_the_work_itself(broker: &Broker) {
    let shared = Shared::new(broker);
    let (repository, server) = (repository(), GitServer::start());
    let (mut workers, [mut first, mut second]) = shared.pair();
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

on_brokers!(whoever_waits_for_an_analysis_has_to_be_let_in_by_the_server_too);
fn whoever_waits_for_an_analysis_has_to_be_let_in_by_the_server_too(broker: &Broker) {
    let shared = Shared::new(broker);
    let (repository, server, token) = (repository(), GitServer::start(), unique("secret"));
    let (workers, [mut first, mut second]) = shared.pair();
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

on_brokers!(a_worker_that_is_told_to_stop_hands_back_what_waits_or_ends_it_first);
fn a_worker_that_is_told_to_stop_hands_back_what_waits_or_ends_it_first(broker: &Broker) {
    let shared = Shared::new(broker);
    let (repository, server) = (repository(), GitServer::start());
    let ([_leading, mut waiting], mut raws) = shared.pair();
    let (url, gate) = server.gated(&repository);
    let leader = raws[0].send(TASK, json!([1, url]));
    gate.wait_arrivals(1);
    // At once: whoever waits has done nothing yet, and goes back.
    let back = raws[1].send(TASK, json!([2, url]));
    waiting.wait_log("under way in another worker");
    waiting.signal(nix::sys::signal::Signal::SIGQUIT);
    assert!(waiting.wait().success());
    let queue = waiting.queue.clone();
    wait_for("the message to be back", Duration::from_secs(20), || {
        (raws[1].waiting() == 1).then_some(())
    });
    // In peace: it waits, and goes on when it may.
    let mut next = shared.worker().queue(&queue).start();
    next.wait_log("under way in another worker");
    next.signal(nix::sys::signal::Signal::SIGTERM);
    next.wait_log("Warm shutdown");
    assert_eq!(gate.arrivals(), 1);
    gate.open();
    let found = raws[0].value(&leader);
    assert_eq!(raws[1].value(&back), found);
    assert!(next.wait().success());
}

on_brokers!(a_leader_that_was_stopped_for_longer_than_its_lease_is_not_waited_for);
fn a_leader_that_was_stopped_for_longer_than_its_lease_is_not_waited_for(broker: &Broker) {
    let shared = Shared::new(broker);
    use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
    let (repository, server) = (repository(), GitServer::start());
    let (workers, [mut first, mut second]) = shared.pair();
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
        (shared.leases() == 0).then_some(())
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
    let [mut first, mut second] = workers
        .each_ref()
        .map(|worker| Raw::new(worker.broker(), &worker.queue));
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
