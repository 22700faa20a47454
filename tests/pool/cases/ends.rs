//! The ends of a pool, of which nobody is left.

use super::*;

pub(super) async fn stop_waits_for_running_jobs_and_leaves_nobody() {
    let pool = pool(options(2)).await;
    let mut limited = job("until_interrupt", json!(null));
    limited.soft_limit = Some(Duration::from_millis(100));
    let (task, _) = start(&pool, limited).await;
    in_time(pool.stop()).await;
    // Its own end: a job that the stop had not waited for would be terminated or lost.
    let outcome = in_time(task).await.unwrap();
    assert!(matches!(outcome, Outcome::Failure(_)), "{outcome:?}");
    assert_eq!(children_of(std::process::id()), [0; 0]);
    in_time(pool.stop()).await;
}

pub(super) async fn kill_ends_running_jobs_and_leaves_nobody() {
    let pool = pool(options(2)).await;
    let (task, _) = start(&pool, job("forever", json!(null))).await;
    in_time(pool.kill()).await;
    assert_eq!(children_of(std::process::id()), [0; 0]);
    assert_eq!(
        in_time(task).await.unwrap(),
        Outcome::Terminated { signal: 9 }
    );
}

pub(super) async fn dropping_the_pool_leaves_nobody() {
    let pool = pool(options(3)).await;
    drop(pool);
    eventually("all children are reaped", || {
        children_of(std::process::id()).is_empty()
    })
    .await;
}

pub(super) async fn a_parent_that_is_killed_leaves_nobody() {
    let mut parent = Command::new("/proc/self/exe")
        .arg(DOOMED_PARENT)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    let pids: Vec<u32> = line.split(' ').map(|pid| pid.parse().unwrap()).collect();
    assert!(
        pids.len() == 4 && pids.iter().all(|pid| exists(*pid)),
        "{line}"
    );
    parent.kill().unwrap();
    parent.wait().unwrap();
    let begun = Instant::now();
    // An orphan becomes a zombie of whoever adopts it, which is not ours to reap.
    let alive = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| !rest.starts_with(" Z"))
        })
    };
    eventually("all children are gone", || !pids.iter().any(alive)).await;
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}

/// A parent with a busy place and idle ones that prints its children and waits to be killed.
pub(crate) fn be_a_doomed_parent() -> ExitCode {
    block_on(async {
        let pool = pool(options(3)).await;
        let (_task, _) = start(&pool, job("forever", json!(null))).await;
        eventually("the spare is there", || {
            children_of(std::process::id()).len() == 4
        })
        .await;
        let pids: Vec<_> = children_of(std::process::id())
            .iter()
            .map(ToString::to_string)
            .collect();
        println!("{}", pids.join(" "));
        std::future::pending::<()>().await;
    });
    ExitCode::SUCCESS
}
