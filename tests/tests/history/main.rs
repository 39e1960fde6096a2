//! Two processes over one store, under load and under faults, whose whole history is checked: at
//! most one holder at a time, one answer for each key, no answer without an effect, no more effects
//! than the policy allows, and no recorded answer that is lost or changed.
//!
//! Each run prints its seed: `IDEM_SEED=17 cargo test -p tests --test history` makes the same
//! requests again and has the same go wrong, although not at the same moments.
//! `IDEM_HISTORY_REQUESTS` makes the runs longer; `--features servers` adds those on real servers.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod broken;
mod clocks;
mod load;
#[cfg(feature = "servers")]
mod servers;

use std::{sync::Arc, time::Duration};

use idem_runtime::store::{MemoryStore, SqliteStore, Store};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::load::{Open, Plan, Site, pause, requests, seed};

/// The records of processes that share their memory.
fn in_memory(store: impl Store) -> Open {
    let store: Arc<dyn Store> = Arc::new(store);
    Arc::new(move || {
        let store = Arc::clone(&store);
        Box::pin(async move { store })
    })
}

/// Serves while processes crash, and checks what happened.
async fn crash_and_check(plan: Plan, open: Open, every: std::ops::Range<u64>) {
    let (wanted, mut rng) = (plan.requests, SmallRng::seed_from_u64(plan.seed));
    let site = Site::start(plan, open).await;
    let crashes = async {
        while site.sent() < wanted {
            pause(&mut rng, every.clone()).await;
            site.crash(rng.random_range(0..2)).await;
        }
    };
    site.serve(crashes).await;
    let summary = site.assert_allowed(true).await;
    assert!(summary.requests >= wanted, "{summary:?}");
    assert!(summary.takeovers > wanted / 200, "{summary:?}");
    assert!(summary.replays > wanted / 10, "{summary:?}");
    assert!(summary.died > 0, "no handler died: {summary:?}");
    assert!(summary.fenced > 0, "no owner came too late: {summary:?}");
}

/// The longest run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_requests_in_memory_while_processes_crash_and_calls_get_lost() {
    let plan = Plan::new(seed(), requests(100_000));
    let plan = Plan { troubled: true, over_http: false, keys_at_once: 128, ..plan };
    crash_and_check(plan, in_memory(MemoryStore::new()), 300..1_500).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_requests_in_sqlite_while_processes_crash_and_calls_get_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("idem.db");
    let open: Open = Arc::new(move || {
        let file = file.clone();
        Box::pin(async move {
            let store = SqliteStore::open(file).await.expect("a database");
            Arc::new(store) as Arc<dyn Store>
        })
    });
    let plan = Plan::new(seed(), requests(10_000));
    let plan = Plan { troubled: true, lease: Duration::from_secs(1), keys_at_once: 64, ..plan };
    crash_and_check(plan, open, 300..1_500).await;
}
