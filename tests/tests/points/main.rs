//! Processes are killed (`SIGKILL`) at every place that is marked between a request and its answer,
//! on every store, with and without a transaction, while clients go on until they have an answer.
//!
//! `IDEM_SEED=17` repeats who was asked for what; `IDEM_TEST_KILLS=5` kills five times at each mark.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod fleet;
mod judge;

use std::{collections::BTreeSet, env, fs, path::Path, time::Instant};

use tests::ledger::Ledger;

use self::{
    fleet::{Fleet, Run},
    judge::{Promise, complaints, extra_effects},
};

/// Fewer than these, and the marks do not show what they are to show.
const FEWEST_MARKS: usize = 25;

/// All marks that there are, as the sources have them.
fn marks() -> BTreeSet<String> {
    fn search(path: &Path, marks: &mut BTreeSet<String>) {
        if path.is_dir() {
            for entry in fs::read_dir(path).expect("a directory") {
                search(&entry.expect("an entry").path(), marks);
            }
            return;
        }
        let text = fs::read_to_string(path).expect("a text");
        for head in ["mark!(\"", " reached(\""] {
            for rest in text.split(head).skip(1) {
                let name = rest.split('"').next().expect("a name").to_owned();
                assert!(marks.insert(name.clone()), "{name} marks two places");
            }
        }
    }
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut marks = BTreeSet::new();
    search(&tests.join("../idem-runtime/src"), &mut marks);
    search(&tests.join("src/bin/teller.rs"), &mut marks);
    marks
}

/// Those that are reached on a store under a promise, by what their names say.
fn reachable(store: &str, promise: Promise) -> Vec<String> {
    let reachable = |name: &String| {
        let parts: Vec<_> = name.split('.').collect();
        let of_another_store =
            ["sqlite", "postgres", "mysql", "redis"].contains(&parts[0]) && parts[0] != store;
        let of_another_promise = match promise {
            Promise::Transaction => parts.contains(&"leased") || parts.contains(&"recover"),
            Promise::Recover => parts.contains(&"transaction"),
            Promise::Rerun | Promise::Refuse => {
                parts.contains(&"transaction") || parts.contains(&"recover")
            }
        };
        !of_another_store && !of_another_promise
    };
    marks().into_iter().filter(reachable).collect()
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| value.parse().expect("a number"))
}

/// Kills at every mark that can be reached, and expects the promise to be kept.
async fn is_kept(url: &str, promise: Promise) {
    let store = url.split([':', '-']).next().expect("a URL");
    let marks = reachable(store, promise);
    assert!(marks.len() >= FEWEST_MARKS, "{} marks", marks.len());
    let run = kill_at(url, promise, None, &marks).await;
    let mut killed: Vec<_> = run.kills.values().cloned().collect();
    killed.sort();
    killed.dedup();
    assert_eq!(killed, marks, "a process has died at each");
    let complaints = complaints(promise, &run);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    // Otherwise nobody was killed where it matters.
    assert_eq!(extra_effects(&run) > 0, promise == Promise::Rerun);
}

async fn kill_at(url: &str, promise: Promise, flaw: Option<&str>, marks: &[String]) -> Run {
    let ledger = Ledger::open(url).await;
    ledger.create().await;
    let (seed, since) = (number("IDEM_SEED").unwrap_or_else(rand::random), Instant::now());
    let times = number("IDEM_TEST_KILLS").unwrap_or(1);
    println!("{promise:?} on {url}: IDEM_SEED={seed}");
    let fleet = Fleet::new(url, promise, flaw, marks, times, seed);
    let stories = fleet.run().await;
    let run = Run { stories, kills: fleet.kills(), effects: ledger.read().await };
    println!(
        "{promise:?} on {url}: {} kills at {} marks, {} keys, {} effects, {} of them again, in {:?}",
        run.kills.len(),
        marks.len(),
        run.stories.len(),
        run.effects.len(),
        extra_effects(&run),
        since.elapsed(),
    );
    run
}

mod sqlite {
    use super::*;

    /// An empty database file.
    fn file() -> (tempfile::TempDir, String) {
        let directory = tempfile::tempdir().expect("a directory");
        let url = format!("sqlite:{}", directory.path().join("idem.db").display());
        (directory, url)
    }

    async fn keeps(promise: Promise) {
        let (_directory, url) = file();
        is_kept(&url, promise).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn reruns() {
        keeps(Promise::Rerun).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn refuses() {
        keeps(Promise::Refuse).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn recovers() {
        keeps(Promise::Recover).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn commits_once() {
        keeps(Promise::Transaction).await;
    }

    /// Answers that are not recorded are noticed without a kill, and so are leases that end under
    /// their owners.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_store_that_is_broken_is_found_out() {
        for flaw in ["loses", "hastens"] {
            let (_directory, url) = file();
            let marks = ["request.keyed", "leased.release.before", "leased.forget.before"];
            let marks = marks.map(str::to_owned);
            let run = kill_at(&url, Promise::Rerun, Some(flaw), &marks).await;
            let found = complaints(Promise::Rerun, &run);
            assert!(!found.is_empty(), "a store that {flaw} was not found out");
            println!("a store that {flaw}: {}", found[0]);
        }
    }

    /// What is promised with reruns is less than the others promise, and they notice.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn kills_between_effect_and_record_are_found_by_every_stricter_promise() {
        let (_directory, url) = file();
        let marks = ["handler.leased.effect.done".to_owned(), "leased.complete.before".to_owned()];
        let run = kill_at(&url, Promise::Rerun, None, &marks).await;
        assert_eq!(complaints(Promise::Rerun, &run), [""; 0]);
        for stricter in [Promise::Transaction, Promise::Refuse, Promise::Recover] {
            assert!(!complaints(stricter, &run).is_empty(), "{stricter:?} does not notice");
        }
    }
}

#[cfg(feature = "servers")]
mod on_servers {
    use tests::servers::{
        mariadb::MariaDb,
        postgres::Postgres,
        redis::{Cluster, Redis},
    };

    use super::*;

    /// One after the other on the shared server, each on a database of its own.
    macro_rules! on_a_database {
        ($server:ident: $($test:ident = $promise:ident),*) => {$(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let database = $server::shared().database().await;
                is_kept(database.url(), Promise::$promise).await;
            }
        )*};
    }

    on_a_database!(Postgres: postgres_reruns = Rerun, postgres_refuses = Refuse,
        postgres_recovers = Recover, postgres_commits_once = Transaction);
    on_a_database!(MariaDb: mariadb_reruns = Rerun, mariadb_refuses = Refuse,
        mariadb_recovers = Recover, mariadb_commits_once = Transaction);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn redis_keeps_what_it_promises() {
        for promise in [Promise::Rerun, Promise::Refuse, Promise::Recover] {
            is_kept(Redis::shared().url(), promise).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn redis_cluster_keeps_what_it_promises() {
        let url = format!("redis-cluster:{}", Cluster::shared().urls().join(","));
        for promise in [Promise::Rerun, Promise::Refuse, Promise::Recover] {
            is_kept(&url, promise).await;
        }
    }
}
