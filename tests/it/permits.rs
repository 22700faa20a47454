//! Permits counted by a database: exact however many workers ask at once, and over by themselves.

use std::time::{Duration, Instant};

use celeriac::database::{Database, DatabaseUrl};
use celeriac::protocol::permit::{Allowance, Answer, Ask, LEASE, Scope};
use futures::future::join_all;

use crate::support::services::{self, Postgres};

/// Six workers' handles on one database.
struct Place {
    workers: Vec<Database>,
    postgres: Option<Postgres>,
    _directory: Option<tempfile::TempDir>,
}

impl Place {
    async fn at(url: &str) -> Vec<Database> {
        let open = |_| Database::new(DatabaseUrl::parse(url).unwrap());
        let workers: Vec<Database> = (0..6).map(open).collect();
        workers[0].migrate().await.unwrap();
        workers
    }

    async fn both() -> [Self; 2] {
        let postgres = tokio::task::spawn_blocking(services::postgres)
            .await
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = format!("sqlite:///{}/a.db", directory.path().display());
        [
            Self {
                workers: Self::at(&postgres.url).await,
                postgres: Some(postgres),
                _directory: None,
            },
            Self {
                workers: Self::at(&file).await,
                postgres: None,
                _directory: Some(directory),
            },
        ]
    }

    async fn take(&self, worker: usize, scope: &Scope, holder: &str, limits: Allowance) -> Answer {
        let ask = Ask {
            scope,
            holder,
            task: holder,
            allowance: limits,
        };
        let worker = &self.workers[worker % self.workers.len()];
        worker.take_permit(&ask).await.unwrap()
    }

    /// See [`Self::race`]. The last one must ask while what the first was granted is still alive.
    /// The one who asks last must have asked while what the first was granted is still alive.
    async fn race_within_lease(
        &self,
        scope: impl Fn(u32) -> Scope,
        most: u64,
    ) -> (usize, Option<Answer>) {
        for attempt in 0..20 {
            let began = Instant::now();
            let outcome = self.race(&scope(attempt), running(most)).await;
            if began.elapsed() < LEASE {
                return outcome;
            }
        }
        panic!("24 questions take longer than {LEASE:?} on this machine")
    }

    /// Everybody asks at once; how many were granted, and one of the refusals.
    async fn race(&self, scope: &Scope, limits: Allowance) -> (usize, Option<Answer>) {
        let names: Vec<String> = (0..24).map(|number| format!("holder {number}")).collect();
        let asks = names.iter().enumerate();
        let asks = asks.map(|(number, name)| self.take(number, scope, name, limits));
        let answers = join_all(asks).await;
        let granted = answers.iter().filter(|one| **one == Answer::Granted);
        let refused = answers.iter().find(|one| **one != Answer::Granted);
        (granted.count(), refused.copied())
    }

    /// PostgreSQL's clean-up blocks, so it must not happen on a thread of the runtime.
    async fn leave(self) {
        drop(self.workers);
        tokio::task::spawn_blocking(move || drop(self.postgres))
            .await
            .unwrap();
    }
}

fn running(most: u64) -> Allowance {
    Allowance {
        running: most,
        ..Allowance::default()
    }
}

fn starts(most: u64, window: Duration) -> Allowance {
    Allowance {
        starts: most,
        window,
        ..Allowance::default()
    }
}

fn user(name: &str) -> Scope {
    Scope::User(name.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_ask_at_once_as_many_are_granted_as_may_be() {
    for place in Place::both().await {
        // Long enough that none of the starts ends meanwhile.
        let hour = Duration::from_secs(3600);
        let (granted, refused) = place.race(&user("rate"), starts(5, hour)).await;
        assert_eq!(granted, 5);
        match refused {
            Some(Answer::TooSoon(after)) => {
                assert!(after <= hour && after > hour / 2, "{after:?}");
            }
            other => panic!("{other:?}"),
        }
        // Who has used a start needs no other.
        let again = place.race(&user("rate"), starts(5, hour)).await;
        assert_eq!(again.0, 5);

        let (granted, refused) = place.race(&user("running"), running(24)).await;
        assert_eq!((granted, refused), (24, None));
        let few = place.race_within_lease(|attempt| user(&format!("few {attempt}")), 3);
        assert_eq!(few.await, (3, Some(Answer::TooMany(3))));
        let one = |attempt: u32| Scope::Repository(format!("digest {attempt}"));
        let one = place.race_within_lease(one, 1).await;
        assert_eq!(one, (1, Some(Answer::TooMany(1))));
        place.leave().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_permit_lasts_as_long_as_it_is_renewed_and_leaves_no_row() {
    for place in Place::both().await {
        let scope = user("a");
        let limits = running(1);
        let database = &place.workers[0];
        assert_eq!(
            place.take(0, &scope, "first", limits).await,
            Answer::Granted
        );
        // By whoever holds it, it is taken as often as is asked.
        assert_eq!(
            place.take(0, &scope, "first", limits).await,
            Answer::Granted
        );
        let held = [(scope.clone(), "first".to_owned())];
        let second = [(scope.clone(), "second".to_owned())];
        let taken = Instant::now();
        while taken.elapsed() < LEASE + Duration::from_secs(1) {
            let renewed = Instant::now();
            database.renew_permits(&held).await.unwrap();
            if place.take(1, &scope, "second", limits).await != Answer::TooMany(1) {
                assert!(renewed.elapsed() >= LEASE, "the machine stood still");
                database.release_permits(&second).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        // Given back, and entered again because its task does run.
        database.release_permits(&held).await.unwrap();
        assert_eq!(
            place.take(1, &scope, "second", limits).await,
            Answer::Granted
        );
        let renewed = Instant::now();
        database.renew_permits(&held).await.unwrap();
        let third = place.take(2, &scope, "third", limits).await;
        assert!(
            third == Answer::TooMany(2) || renewed.elapsed() >= LEASE,
            "{third:?}"
        );
        // Both holders are silent now, as the dead are.
        let silent = Instant::now();
        while place.take(2, &scope, "third", limits).await != Answer::Granted {
            assert!(silent.elapsed() < Duration::from_secs(60));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // Only the third is alive, so the rows of the others go and its own stays.
        let third = [(scope.clone(), "third".to_owned())];
        database.renew_permits(&third).await.unwrap();
        assert!(database.prune_permits().await.unwrap() >= 2);
        database.release_permits(&third).await.unwrap();
        assert_eq!(
            place.take(0, &scope, "first", limits).await,
            Answer::Granted
        );
        place.leave().await;
    }
}
