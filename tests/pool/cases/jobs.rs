//! Jobs: what goes in, what comes out, and what ends them early.

use super::*;

pub(super) async fn a_job_comes_back_as_it_was_sent() {
    let pool = pool(options(1)).await;
    let payload =
        json!({"text": "분석 중", "number": 12345678901234567890_u64, "list": [null, 1.5]});
    let (outcome, events) = run(&pool, job("echo", payload.clone())).await;
    assert_eq!(outcome, Outcome::Success(payload));
    assert_eq!(
        events,
        [Event::Started {
            pid: pool.processes()[0]
        }]
    );
    assert_eq!(pool.writes().total, 1);
}

pub(super) async fn progress_arrives_in_order_and_before_the_outcome() {
    let pool = pool(options(1)).await;
    let (outcome, events) = run(&pool, job("progress", json!(5000))).await;
    assert_eq!(outcome, Outcome::Success(json!("reported")));
    let steps: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Progress(step) => step.as_u64(),
            _ => None,
        })
        .collect();
    assert_eq!(steps, (0..5000).collect::<Vec<_>>());
    let log = |level, text: &str| Event::Log {
        level,
        text: text.to_owned(),
    };
    let expected = [
        log(log::Level::Info, "half done"),
        log(log::Level::Warn, "done reporting"),
    ];
    assert_eq!(events[5001..], expected);
}

pub(super) async fn a_failure_keeps_its_parts() {
    let pool = pool(options(1)).await;
    let (outcome, _) = run(&pool, job("fail", json!({"a": 1}))).await;
    let Outcome::Failure(failure) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(failure.exc_type, "ValueError");
    assert_eq!(failure.exc_message, [json!({"a": 1})]);
    assert_eq!(failure.traceback, "test\n");
}

pub(super) async fn the_soft_limit_interrupts_and_the_child_lives_on() {
    let pool = pool(options(1)).await;
    let before = pool.processes();
    let mut limited = job("until_interrupt", json!(null));
    limited.soft_limit = Some(Duration::from_millis(50));
    let begun = Instant::now();
    let (outcome, events) = run(&pool, limited).await;
    assert!(begun.elapsed() >= Duration::from_millis(50));
    let Outcome::Failure(failure) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(failure.exc_type, "SoftTimeLimitExceeded");
    assert_eq!(failure.exc_message, [json!(true)]);
    assert_eq!(events.last(), Some(&Event::SoftLimit));
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
    assert_eq!(pool.processes(), before);
}

pub(super) async fn the_hard_limit_kills_within_a_tenth_of_a_second() {
    let pool = pool(options(1)).await;
    let limit = Duration::from_millis(100);
    let mut limited = job("forever", json!(null));
    limited.hard_limit = Some(limit);
    let mut slot = pool.acquire().await;
    let pid = slot.pid();
    let begun = Instant::now();
    let outcome = slot.run(limited, channel().0).await;
    let took = begun.elapsed();
    assert_eq!(outcome, Outcome::HardTimeLimit(limit));
    assert!(
        took >= limit && took < limit + Duration::from_millis(100),
        "{took:?}"
    );
    assert!(!exists(pid), "the child is still there");
    drop(slot);
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
}

pub(super) async fn a_child_that_never_stops_talking_is_killed_at_its_limit_too() {
    let pool = pool(options(1)).await;
    let limit = Duration::from_millis(50);
    let mut limited = job("chatter", json!(null));
    limited.hard_limit = Some(limit);
    let (outcome, _) = run(&pool, limited).await;
    assert_eq!(outcome, Outcome::HardTimeLimit(limit));
}

pub(super) async fn terminate_kills_the_running_job_and_frees_the_place() {
    let pool = pool(options(1)).await;
    assert!(!pool.terminate("id-of-forever", 15), "nothing runs yet");
    let (task, pid) = start(&pool, job("forever", json!(null))).await;
    let begun = Instant::now();
    assert!(pool.terminate("id-of-forever", 15));
    let outcome = in_time(task).await.unwrap();
    assert_eq!(outcome, Outcome::Terminated { signal: 15 });
    assert!(
        begun.elapsed() < Duration::from_millis(100),
        "{:?}",
        begun.elapsed()
    );
    assert!(!exists(pid));
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
}

pub(super) async fn a_signal_that_is_survived_is_followed_by_one_that_is_not() {
    let pool = pool(options(1)).await;
    let (task, _) = start(&pool, job("forever", json!(null))).await;
    // Stopping is survived.
    assert!(pool.terminate("id-of-forever", 19));
    let outcome = in_time(task).await.unwrap();
    assert_eq!(outcome, Outcome::Terminated { signal: 19 });
}

pub(super) async fn a_terminate_that_comes_too_late_does_not_hit_the_next_job() {
    let pool = pool(options(1)).await;
    let mut too_late = 0;
    for round in 0..300 {
        let mut target = job("echo", json!(1));
        target.id = String::from("target");
        let mut slot = in_time(pool.acquire()).await;
        let task = tokio::spawn(async move { slot.run(target, channel().0).await });
        for _ in 0..round % 40 {
            std::hint::spin_loop();
            tokio::task::yield_now().await;
        }
        pool.terminate("target", 15);
        match in_time(task).await.unwrap() {
            Outcome::Success(_) => too_late += 1,
            outcome => assert_eq!(outcome, Outcome::Terminated { signal: 15 }),
        }
        let (outcome, _) = run(&pool, job("echo", json!(round))).await;
        assert_eq!(
            outcome,
            Outcome::Success(json!(round)),
            "after {too_late} late ones"
        );
    }
}

pub(super) async fn a_killed_child_is_a_lost_job_at_once_and_others_go_on() {
    let pool = pool(options(2)).await;
    let (lost, pid) = start(&pool, job("forever", json!(null))).await;
    let mut other = job("until_interrupt", json!(null));
    other.soft_limit = Some(Duration::from_millis(300));
    let (other, _) = start(&pool, other).await;
    let begun = Instant::now();
    send(pid, "KILL");
    let outcome = in_time(lost).await.unwrap();
    let reason = String::from("signal 9 (SIGKILL)");
    assert_eq!(outcome, Outcome::Lost { reason });
    assert!(
        begun.elapsed() < Duration::from_millis(200),
        "{:?}",
        begun.elapsed()
    );
    assert!(matches!(in_time(other).await.unwrap(), Outcome::Failure(_)));
}

pub(super) fn send(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args(["-s", signal, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

pub(super) async fn a_crash_is_told_by_its_exit_code_or_signal() {
    let pool = pool(options(1)).await;
    for (name, expected) in [("exit", "exitcode 3"), ("abort", "signal 6 (SIGABRT)")] {
        let (outcome, _) = run(&pool, job(name, json!(null))).await;
        let reason = String::from(expected);
        assert_eq!(outcome, Outcome::Lost { reason });
    }
}

pub(super) async fn a_panic_is_a_failure_without_secrets_and_the_child_is_replaced() {
    let pool = pool(options(1)).await;
    let before = pool.processes();
    let (outcome, _) = run(&pool, job("panic", json!({"token": "ghp_marker"}))).await;
    let Outcome::Failure(failure) = outcome else {
        panic!("{outcome:?}")
    };
    let text = format!("{failure:?}");
    assert!(
        text.contains("panicked: could not use") && text.contains("handler.rs"),
        "{text}"
    );
    assert!(!text.contains("ghp_marker"), "{text}");
    let (outcome, _) = run(&pool, job("jobs", json!(null))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)), "it is a fresh child");
    assert_ne!(pool.processes(), before);
}
