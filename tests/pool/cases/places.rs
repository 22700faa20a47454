//! Places and their children: replaced, grown, shrunk, restarted.

use super::*;

pub(super) async fn an_abandoned_job_does_not_spoil_its_place() {
    let pool = pool(options(1)).await;
    let (task, pid) = start(&pool, job("forever", json!(null))).await;
    task.abort();
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
    eventually("the abandoned child is gone", || !exists(pid)).await;
}

pub(super) async fn an_idle_child_that_dies_is_replaced() {
    let pool = pool(options(2)).await;
    let victim = pool.processes()[0];
    send(victim, "KILL");
    eventually("it has a successor", || {
        let now = pool.processes();
        !now.contains(&victim) && now.len() == 2
    })
    .await;
    for number in 0..4 {
        let (outcome, _) = run(&pool, job("echo", json!(number))).await;
        assert_eq!(outcome, Outcome::Success(json!(number)));
    }
}

pub(super) async fn children_are_replaced_after_n_jobs_and_no_job_is_lost() {
    let pool = pool(Options {
        max_tasks_per_child: Some(3),
        ..options(1)
    })
    .await;
    let mut counts = Vec::new();
    for _ in 0..9 {
        let (outcome, _) = run(&pool, job("jobs", json!(null))).await;
        let Outcome::Success(count) = outcome else {
            panic!("{outcome:?}")
        };
        counts.push(count.as_u64().unwrap());
    }
    assert_eq!(counts, [1, 2, 3, 1, 2, 3, 1, 2, 3]);
    pool.set_max_tasks_per_child(None);
    for expected in 1..8 {
        let (outcome, _) = run(&pool, job("jobs", json!(null))).await;
        assert_eq!(outcome, Outcome::Success(json!(expected)));
    }
}

pub(super) async fn two_thousand_jobs_with_a_fresh_child_for_each() {
    let pool = pool(Options {
        max_tasks_per_child: Some(1),
        ..options(4)
    })
    .await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..2000 {
        let pool = Arc::clone(&pool);
        tasks.spawn(async move {
            let mut slot = pool.acquire().await;
            let pid = slot.pid();
            (
                pid,
                number,
                slot.run(job("echo", json!(number)), channel().0).await,
            )
        });
    }
    let mut done = HashSet::new();
    while let Some(result) = in_time(tasks.join_next()).await {
        let (_, number, outcome) = result.unwrap();
        assert_eq!(outcome, Outcome::Success(json!(number)));
        done.insert(number);
    }
    assert_eq!(done.len(), 2000);
    in_time(pool.stop()).await;
    assert_eq!(children_of(std::process::id()), [0; 0]);
}

pub(super) async fn a_child_that_became_large_is_replaced() {
    let pool = pool(Options {
        max_memory_per_child: Some(100 << 10),
        ..options(1)
    })
    .await;
    let before = pool.processes();
    run(&pool, job("allocate", json!(1 << 20))).await;
    assert_eq!(pool.processes(), before, "it is still small");
    let (outcome, _) = run(&pool, job("allocate", json!(200 << 20))).await;
    assert_eq!(outcome, Outcome::Success(json!("allocated")));
    assert_ne!(pool.processes(), before);
}

pub(super) async fn the_pool_grows_and_shrinks_but_not_below_its_busy_places() {
    let pool = pool(options(1)).await;
    pool.grow(2);
    in_time(pool.ready()).await;
    assert_eq!((pool.size(), pool.processes().len()), (3, 3));
    let held = [pool.acquire().await, pool.acquire().await];
    let error = pool.shrink(2).unwrap_err();
    assert!(matches!(error, Error::Busy));
    assert_eq!(error.to_string(), "Can't shrink pool. All processes busy!");
    pool.shrink(1).unwrap();
    assert_eq!((pool.size(), pool.busy()), (2, 2));
    assert!(
        pool.try_acquire().is_none(),
        "a place that went took its permit along"
    );
    drop(held);
    pool.shrink(5).unwrap();
    assert_eq!((pool.size(), pool.busy()), (1, 0), "the last place stays");
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
    eventually("one child and the spare are left", || {
        children_of(std::process::id()).len() == 2
    })
    .await;
}

pub(super) async fn restart_replaces_every_child() {
    let pool = pool(options(2)).await;
    let before: HashSet<_> = pool.processes().into_iter().collect();
    let (busy, _) = start(&pool, {
        let mut job = job("until_interrupt", json!(null));
        job.soft_limit = Some(Duration::from_millis(50));
        job
    })
    .await;
    pool.restart();
    assert!(matches!(in_time(busy).await.unwrap(), Outcome::Failure(_)));
    in_time(pool.ready()).await;
    let after: HashSet<_> = pool.processes().into_iter().collect();
    assert_eq!(after.len(), 2);
    assert!(after.is_disjoint(&before), "{before:?} {after:?}");
}

pub(super) async fn acquire_waits_for_a_free_place() {
    let pool = pool(options(1)).await;
    let held = pool.acquire().await;
    let waiting = tokio::spawn({
        let pool = Arc::clone(&pool);
        async move { pool.acquire().await.pid() }
    });
    tokio::task::yield_now().await;
    assert!(pool.try_acquire().is_none() && !waiting.is_finished());
    let pid = held.pid();
    drop(held);
    assert_eq!(in_time(waiting).await.unwrap(), pid);
}

pub(super) async fn a_large_result_arrives_and_a_larger_one_is_a_failure() {
    let pool = pool(options(1)).await;
    let (outcome, _) = run(&pool, job("large", json!(20 << 20))).await;
    assert!(matches!(outcome, Outcome::Success(Value::String(text)) if text.len() == 20 << 20));
    let (outcome, _) = run(&pool, job("large", json!(65 << 20))).await;
    assert!(matches!(&outcome, Outcome::Failure(failure) if failure.exc_type == "ValueError"));
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
}

pub(super) async fn a_program_that_cannot_be_started_is_an_error_of_the_start() {
    let error = Pool::start(Options {
        program: "/nonexistent/celeriac".into(),
        ..options(2)
    });
    let text = error.err().unwrap().to_string();
    assert!(text.contains("/nonexistent/celeriac"), "{text}");
    // A program that is no child of ours ends without a word; the pool goes on trying.
    let pool = Pool::start(Options {
        program: "/bin/true".into(),
        ..options(1)
    })
    .unwrap();
    in_time(pool.stop()).await;
    assert_eq!(children_of(std::process::id()), [0; 0]);
}

pub(super) async fn four_children_start_quickly() {
    let begun = Instant::now();
    let pool = Pool::start(options(4)).unwrap();
    let started = begun.elapsed();
    in_time(pool.ready()).await;
    let ready = begun.elapsed();
    println!("     4 children: spawned after {started:?}, ready after {ready:?}");
    // Far above what it takes on an idle machine, far below what a person would notice.
    assert!(ready < Duration::from_secs(1), "{ready:?}");
}
