use std::{future::Future, path::Path, pin::pin, task::Poll};

use bytes::Bytes;
use futures_util::future::join_all;
use sqlx::sqlite::SqliteConnectOptions;
use tokio::runtime;

use super::*;
use crate::{
    decision::OnUnknown,
    key::{OperationId, ScopeDigest},
    record::{Fingerprint, Flags, State, Ttl},
    store::{Kind, Listing, ManualClock, Purge, Purged},
};

const HOUR: Duration = Duration::from_secs(3600);

fn claim_on(key: Key) -> Claim {
    Claim {
        key,
        scope: ScopeDigest::from_bytes([1; 32]),
        operation: Arc::from("POST /"),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint { scheme: "test".into(), digest: [2; 32] },
        token: Token::random(),
        lease: Duration::from_secs(30),
        ttl: Ttl::For(HOUR),
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

fn any_claim() -> Claim {
    claim_on(Key::from_bytes(rand::random()))
}

fn issue_on(key: Key) -> Issue {
    Issue {
        key,
        scope: ScopeDigest::from_bytes([1; 32]),
        operation: Arc::from("POST /flows"),
        operation_id: OperationId::random(),
        token: Token::random(),
        valid_for: Ttl::For(HOUR),
        kept_for: Ttl::For(HOUR),
        payload: Bytes::from_static(b"bound"),
        format: FORMAT,
    }
}

fn checkpoint(claim: &Claim, payload: impl Into<Bytes>) -> Checkpoint {
    let (key, token, payload) = (claim.key, claim.token, payload.into());
    Checkpoint { key, token, payload, format: FORMAT }
}

fn completion(claim: &Claim, payload: impl Into<Bytes>) -> Completion {
    Completion {
        key: claim.key,
        token: claim.token,
        ttl: claim.ttl,
        flags: Flags::NONE,
        payload: payload.into(),
        format: FORMAT,
    }
}

async fn in_memory() -> (SqliteStore, ManualClock) {
    let clock = Clock::manual();
    (SqliteStore::in_memory().await.unwrap().with_clock(clock.clone()), clock)
}

async fn granted(store: &SqliteStore, claim: &Claim) -> Record {
    match store.claim(claim).await.unwrap() {
        Claimed::Granted(record) => record,
        found => panic!("{found:?}"),
    }
}

#[track_caller]
fn assert_fails<T: fmt::Debug>(answer: Result<T, StoreError>, kind: StoreErrorKind) {
    let error = answer.unwrap_err();
    assert_eq!(error.kind(), kind, "{error:?}");
    assert_eq!(error.store(), "sqlite");
}

/// The options of an application's own pool.
fn application(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_millis(100))
}

#[tokio::test]
async fn a_damaged_row_fails_its_own_calls_only_and_is_kept() {
    let damages = [
        "UPDATE idem_records SET scope = x'00' WHERE key = ?1",
        "UPDATE idem_records SET operation = CAST(x'ff' AS TEXT) WHERE key = ?1",
        "UPDATE idem_records SET operation_id = x'' WHERE key = ?1",
        "UPDATE idem_records SET state = 4 WHERE key = ?1",
        "UPDATE idem_records SET state = -1 WHERE key = ?1",
        "UPDATE idem_records SET fingerprint = zeroblob(33) WHERE key = ?1",
        "UPDATE idem_records SET token = zeroblob(15) WHERE key = ?1",
        "UPDATE idem_records SET attempt = -1 WHERE key = ?1",
        "UPDATE idem_records SET attempt = 4294967296 WHERE key = ?1",
        "UPDATE idem_records SET lease_end = -1 WHERE key = ?1",
        "UPDATE idem_records SET valid_until = kept_until + 1 WHERE key = ?1",
        "UPDATE idem_records SET kept_until = -1, valid_until = -1 WHERE key = ?1",
        "UPDATE idem_records SET created = -1 WHERE key = ?1",
        "UPDATE idem_records SET format = 0 WHERE key = ?1",
        "UPDATE idem_records SET format = 65536 WHERE key = ?1",
        "UPDATE idem_records SET flags = 65536 WHERE key = ?1",
    ];
    let (store, clock) = in_memory().await;
    let mut damaged = Vec::new();
    for damage in damages {
        let claim = any_claim();
        granted(&store, &claim).await;
        let query = sqlx::query(damage).bind(&claim.key.as_bytes()[..]);
        assert_eq!(query.execute(&store.0.pool).await.unwrap().rows_affected(), 1, "{damage}");
        damaged.push(claim);
    }
    let sound: Vec<_> = (0..damaged.len()).map(|_| any_claim()).collect();

    // All in one batch, since the task is started but not polled before the last call waits.
    let both = damaged.iter().zip(&sound).flat_map(|(damaged, sound)| [damaged, sound]);
    let answers = join_all(both.map(|claim| store.claim(claim))).await;
    for pair in answers.chunks(2) {
        assert!(matches!(&pair[0], Err(error) if error.kind() == StoreErrorKind::Corrupt));
        assert!(matches!(&pair[1], Ok(Claimed::Granted(_))));
    }
    for claim in &damaged {
        assert_fails(store.read(&claim.key).await, StoreErrorKind::Corrupt);
        assert_fails(store.issue(&issue_on(claim.key)).await, StoreErrorKind::Corrupt);
        assert_fails(store.checkpoint(&checkpoint(claim, "")).await, StoreErrorKind::Corrupt);
        assert_fails(store.complete(&completion(claim, "")).await, StoreErrorKind::Corrupt);
        assert_fails(store.release(&claim.key, &claim.token).await, StoreErrorKind::Corrupt);
        assert_fails(store.forget(&claim.key, &claim.token).await, StoreErrorKind::Corrupt);
    }
    let renewals: Vec<_> = damaged
        .iter()
        .zip(&sound)
        .flat_map(|(damaged, sound)| [damaged, sound])
        .map(|claim| Renewal { key: claim.key, token: claim.token, lease: HOUR })
        .collect();
    let held = store.renew(&renewals).await.unwrap();
    assert!(held.chunks(2).all(|pair| pair == [false, true]), "{held:?}");

    clock.advance(HOUR * 2);
    let swept = store.sweep(usize::MAX).await.unwrap();
    // The text alone is not looked into by a sweep.
    assert_eq!(swept, sound.len() + 1, "what is sound and over is swept");
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM idem_records")
        .fetch_one(&store.0.pool)
        .await
        .unwrap();
    assert_eq!(usize::try_from(left).unwrap(), damaged.len() - 1, "what is damaged is kept");
}

#[tokio::test]
async fn a_newer_row_is_refused_as_newer_however_strange() {
    let (store, clock) = in_memory().await;
    let claim = any_claim();
    granted(&store, &claim).await;
    sqlx::query("UPDATE idem_records SET format = 2, state = 77, token = x'01', kept_until = -5")
        .execute(&store.0.pool)
        .await
        .unwrap();
    clock.advance(HOUR * 2);
    assert_fails(store.claim(&claim).await, StoreErrorKind::Newer);
    assert_fails(store.read(&claim.key).await, StoreErrorKind::Newer);
    assert_eq!(store.sweep(usize::MAX).await.unwrap(), 0);
}

#[tokio::test]
async fn odd_paths_are_paths() {
    let directory = tempfile::tempdir().unwrap();
    for name in
        ["with space.db", "a?mode=memory", "a#b%20c.db", "it's \"quoted\".db", "größe", "file:x"]
    {
        let path = directory.path().join(name);
        let claim = any_claim();
        granted(&SqliteStore::open(&path).await.unwrap(), &claim).await;
        assert!(path.is_file(), "{name}");
        let again = SqliteStore::open(&path).await.unwrap();
        assert!(again.read(&claim.key).await.unwrap().is_some(), "{name}");
    }
    for vanishing in ["", ":memory:"] {
        assert_fails(SqliteStore::open(vanishing).await, StoreErrorKind::Refused);
    }
    let nowhere = directory.path().join("missing/idem.db");
    assert_fails(SqliteStore::open(nowhere).await, StoreErrorKind::Unreachable);
    let text = directory.path().join("text");
    std::fs::write(
        &text,
        "not a database, though as long as the header of one would be".repeat(99),
    )
    .unwrap();
    assert_fails(SqliteStore::open(text).await, StoreErrorKind::Corrupt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_can_create_and_use_one_file_at_once() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..5 {
        let path = directory.path().join(format!("{round}.db"));
        let keys: Arc<[Key]> = (0..50).map(|_| any_claim().key).collect();
        let mut processes = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let (path, keys) = (path.clone(), Arc::clone(&keys));
            processes.spawn(async move {
                let store = SqliteStore::open(path).await.unwrap();
                let claims: Vec<_> = keys.iter().map(|key| claim_on(*key)).collect();
                let answers = join_all(claims.iter().map(|claim| store.claim(claim))).await;
                let mine = answers.into_iter().map(Result::unwrap);
                mine.filter(|answer| matches!(answer, Claimed::Granted(_))).count()
            });
        }
        let granted: usize = processes.join_all().await.into_iter().sum();
        assert_eq!(granted, keys.len(), "each key has one owner");
    }
}

#[tokio::test]
async fn records_outlive_the_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("idem.db");
    let claim = any_claim();
    {
        let store = SqliteStore::open(&path).await.unwrap();
        granted(&store, &claim).await;
        store.complete(&completion(&claim, vec![7; 1 << 20])).await.unwrap();
    }
    let store = SqliteStore::open(&path).await.unwrap();
    let record = store.read(&claim.key).await.unwrap().unwrap();
    assert_eq!((record.state, record.payload.len()), (State::Completed, 1 << 20));
}

/// Polls a future once: the call is made, and nobody has answered yet.
async fn begin<F: Future>(mut future: std::pin::Pin<&mut F>) {
    std::future::poll_fn(|context| {
        assert!(future.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_caller_that_goes_away_takes_nobody_along() {
    let (store, _) = in_memory().await;
    let [gone, completed, marked, stays] = std::array::from_fn(|_| any_claim());
    granted(&store, &completed).await;
    granted(&store, &marked).await;
    let (answer, mark) = (completion(&completed, "answer"), checkpoint(&marked, "so far"));
    let issue = issue_on(any_claim().key);
    {
        let claiming = pin!(store.claim(&gone));
        let issuing = pin!(store.issue(&issue));
        let completing = pin!(store.complete(&answer));
        let checkpointing = pin!(store.checkpoint(&mark));
        begin(claiming).await;
        begin(issuing).await;
        begin(completing).await;
        begin(checkpointing).await;
    }
    granted(&store, &stays).await;
    assert!(store.read(&gone.key).await.unwrap().is_none(), "nobody waited for this claim");
    assert!(store.read(&issue.key).await.unwrap().is_none(), "nobody was handed this key");
    let record = store.read(&marked.key).await.unwrap().unwrap();
    assert_eq!(record.payload, mark.payload, "a checkpoint is written though its caller is gone");
    let record = store.read(&completed.key).await.unwrap().unwrap();
    assert_eq!(record.state, State::Completed, "an answer is recorded though its caller is gone");
    assert!(matches!(store.claim(&gone).await, Ok(Claimed::Granted(_))));
}

#[test]
fn a_runtime_that_ends_midway_wedges_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("idem.db");
    let other = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = other.block_on(SqliteStore::open(path)).unwrap();
    let memory = other.block_on(SqliteStore::in_memory()).unwrap();
    let first = any_claim();
    other.block_on(granted(&memory, &first));

    for store in [&store, &memory] {
        for round in 0..30 {
            // Nothing of this runtime runs while it is not blocked on, so that its task stops
            // wherever the last poll left it: before its first step, or anywhere between.
            let dying = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let [lost, waiting, next] = [any_claim(), any_claim(), any_claim()];
            dying.block_on(async {
                let claiming = pin!(store.claim(&lost));
                begin(claiming).await;
                for _ in 0..round {
                    tokio::task::yield_now().await;
                }
            });
            other.block_on(async {
                let mut claiming = pin!(store.claim(&waiting));
                let first =
                    std::future::poll_fn(|context| Poll::Ready(claiming.as_mut().poll(context)));
                let pending = first.await.is_pending();
                dying.shutdown_background();
                if pending {
                    match tokio::time::timeout(BUSY_TIMEOUT, claiming).await {
                        Ok(Ok(Claimed::Granted(_))) => {}
                        Ok(answer) => assert_fails(answer, StoreErrorKind::Unreachable),
                        Err(_) => panic!("the call waits for a task that is gone"),
                    }
                }
                granted(store, &next).await;
            });
        }
    }
    let kept = other.block_on(memory.read(&first.key)).unwrap();
    assert!(
        kept.is_some(),
        "a database in memory outlives the connections that die with a runtime"
    );
}

#[test]
fn without_a_runtime_a_call_fails() {
    let store = runtime::Runtime::new().unwrap().block_on(SqliteStore::in_memory()).unwrap();
    let claim = any_claim();
    let answer = futures_util::FutureExt::now_or_never(store.claim(&claim)).unwrap();
    assert_fails(answer, StoreErrorKind::Unreachable);
}

#[tokio::test]
async fn tables_of_a_newer_release_are_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("idem.db");
    let store = SqliteStore::open(&path).await.unwrap();
    sqlx::query("UPDATE idem_schema SET version = 2").execute(&store.0.pool).await.unwrap();
    sqlx::query("DROP TABLE idem_records").execute(&store.0.pool).await.unwrap();
    assert_fails(SqliteStore::open(&path).await, StoreErrorKind::Newer);
    assert_fails(SqliteStore::from_pool(store.0.pool.clone()).await, StoreErrorKind::Newer);
    let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_schema WHERE type = 'table'")
        .fetch_one(&store.0.pool)
        .await
        .unwrap();
    assert_eq!(tables, 1, "nothing was created");
}

#[tokio::test]
async fn an_applications_own_database_is_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let options = application(&directory.path().join("application.db"));
    let pool = SqlitePool::connect_with(options).await.unwrap();
    sqlx::raw_sql("CREATE TABLE payments (id INTEGER PRIMARY KEY); PRAGMA user_version = 42")
        .execute(&pool)
        .await
        .unwrap();
    assert_fails(SqliteStore::from_pool(pool.clone()).await, StoreErrorKind::Refused);

    SqliteStore::create_tables(&pool).await.unwrap();
    SqliteStore::create_tables(&pool).await.unwrap();
    let store = SqliteStore::from_pool(pool.clone()).await.unwrap();
    let claim = any_claim();
    granted(&store, &claim).await;
    sqlx::raw_sql(SqliteStore::SCHEMA).execute(&pool).await.unwrap();
    assert!(store.read(&claim.key).await.unwrap().is_some(), "the schema can be run again");
    let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&pool).await.unwrap();
    assert_eq!(version, 42);
}

#[tokio::test]
async fn a_lock_that_is_held_for_too_long_fails_the_call_and_no_later_one() {
    let directory = tempfile::tempdir().unwrap();
    let pool = SqlitePool::connect_with(application(&directory.path().join("a.db"))).await.unwrap();
    SqliteStore::create_tables(&pool).await.unwrap();
    let store = SqliteStore::from_pool(pool.clone()).await.unwrap();
    let [claim, other] = [any_claim(), any_claim()];
    granted(&store, &claim).await;

    let lock = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let answers = join_all([&claim, &other].map(|claim| store.claim(claim))).await;
    for answer in answers {
        assert_fails(answer, StoreErrorKind::TimedOut);
    }
    assert!(store.read(&claim.key).await.unwrap().is_some(), "reading needs no lock");
    lock.rollback().await.unwrap();
    granted(&store, &other).await;
}

#[tokio::test]
async fn a_full_disk_fails_the_batch_and_keeps_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let options = application(&directory.path().join("a.db")).pragma("max_page_count", "40");
    let pool = SqlitePool::connect_with(options).await.unwrap();
    SqliteStore::create_tables(&pool).await.unwrap();
    let store = SqliteStore::from_pool(pool).await.unwrap();
    let [small, large] = [any_claim(), any_claim()];
    granted(&store, &small).await;
    granted(&store, &large).await;
    let too_much = completion(&large, vec![0; 1 << 20]);
    assert_fails(store.complete(&too_much).await, StoreErrorKind::Full);
    let record = store.read(&large.key).await.unwrap().unwrap();
    assert_eq!(record.state, State::Running, "nothing of it was written");
    assert_eq!(store.complete(&completion(&small, "ok")).await.unwrap(), Written::Done);
    assert_eq!(store.complete(&completion(&large, "ok")).await.unwrap(), Written::Done);
}

#[tokio::test]
async fn calls_on_one_key_in_one_batch_see_each_other() {
    let (store, _) = in_memory().await;
    let first = any_claim();
    let second = claim_on(first.key);
    let answer = completion(&first, "answer");
    let (claimed, refused, completed, replayed) = tokio::join!(
        biased;
        store.claim(&first),
        store.claim(&second),
        store.complete(&answer),
        store.claim(&second),
    );
    assert!(matches!(claimed, Ok(Claimed::Granted(_))));
    assert!(matches!(refused, Ok(Claimed::Found(record)) if record.state == State::Running));
    assert_eq!(completed.unwrap(), Written::Done);
    assert!(matches!(replayed, Ok(Claimed::Found(record)) if record.payload == answer.payload));

    let issue = issue_on(any_claim().key);
    let user = Claim { issued_only: true, ..claim_on(issue.key) };
    let mark = checkpoint(&user, "so far");
    let (unknown, issued, claimed, marked, taken) = tokio::join!(
        biased;
        store.claim(&user),
        store.issue(&issue),
        store.claim(&user),
        store.checkpoint(&mark),
        store.issue(&issue),
    );
    assert_eq!(unknown.unwrap(), Claimed::Unknown);
    assert_eq!(issued.unwrap(), Written::Done);
    assert!(matches!(claimed, Ok(Claimed::Granted(record)) if record.payload == issue.payload));
    assert_eq!(marked.unwrap(), Written::Done);
    assert!(matches!(taken, Ok(Written::Fenced(record)) if record.payload == mark.payload));
}

#[tokio::test]
async fn a_sweep_of_many_goes_in_steps() {
    let (store, clock) = in_memory().await;
    let claims: Vec<_> = (0..SWEPT_AT_ONCE * 2 + 7).map(|_| any_claim()).collect();
    join_all(claims.iter().map(|claim| granted(&store, claim))).await;
    clock.advance(HOUR);
    assert_eq!(store.sweep(SWEPT_AT_ONCE + 3).await.unwrap(), SWEPT_AT_ONCE + 3);
    assert_eq!(store.sweep(usize::MAX).await.unwrap(), SWEPT_AT_ONCE + 4);
}

#[tokio::test]
async fn what_is_damaged_is_left_out_of_a_listing_and_can_be_purged() {
    let (store, clock) = in_memory().await;
    let claims: Vec<_> = (0..5).map(|_| any_claim()).collect();
    for claim in &claims {
        granted(&store, claim).await;
        clock.advance(Duration::from_millis(1));
    }
    let damaged = &claims[2];
    sqlx::query("UPDATE idem_records SET token = x'' WHERE key = ?1")
        .bind(&damaged.key.as_bytes()[..])
        .execute(&store.0.pool)
        .await
        .unwrap();
    assert_fails(store.find(&damaged.operation_id).await, StoreErrorKind::Corrupt);
    let (mut listed, mut after) = (Vec::new(), None);
    loop {
        let listing = Listing { kind: Kind::Any, scope: None, after, limit: 1 };
        let page = store.list(&listing).await.unwrap();
        listed.extend(page.records.iter().map(|record| record.key));
        match page.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    let sound = [0, 1, 3, 4].map(|claim: usize| claims[claim].key);
    assert_eq!(listed, sound, "one that is damaged hides no other one");

    clock.advance(HOUR / 2);
    let purged = store.purge(&Purge::Key(damaged.key)).await.unwrap();
    assert_eq!(purged, Purged { removed: 1, running: 0 });
    granted(&store, &claim_on(damaged.key)).await;
}

#[tokio::test]
async fn a_purge_and_other_calls_on_its_key_in_one_batch_see_each_other() {
    let (store, clock) = in_memory().await;
    let first = any_claim();
    granted(&store, &first).await;
    clock.advance(HOUR / 2);
    let (answer, purge) = (completion(&first, "answer"), Purge::Key(first.key));
    let next = claim_on(first.key);
    let (completed, purged, claimed) =
        tokio::join!(biased; store.complete(&answer), store.purge(&purge), store.claim(&next));
    assert_eq!(completed.unwrap(), Written::Done);
    assert_eq!(purged.unwrap(), Purged { removed: 1, running: 0 });
    assert!(matches!(claimed, Ok(Claimed::Granted(record)) if record.attempt == 1));
}

#[tokio::test]
async fn a_purge_of_many_goes_in_steps() {
    let (store, clock) = in_memory().await;
    let claims: Vec<_> = (0..SWEPT_AT_ONCE * 2 + 7).map(|_| any_claim()).collect();
    join_all(claims.iter().map(|claim| granted(&store, claim))).await;
    clock.advance(HOUR / 2);
    let scope = claims[0].scope;
    let purge = Purge::Scope { scope, limit: SWEPT_AT_ONCE + 3 };
    assert_eq!(store.purge(&purge).await.unwrap().removed, SWEPT_AT_ONCE + 3);
    assert_eq!(store.purge(&purge).await.unwrap().removed, SWEPT_AT_ONCE + 3);
    assert_eq!(store.purge(&purge).await.unwrap().removed, 1);
}

#[tokio::test]
async fn an_operation_is_found_by_an_index() {
    let (store, _) = in_memory().await;
    let plan: String = sqlx::query(
        "EXPLAIN QUERY PLAN SELECT payload FROM idem_records WHERE operation_id = x'00'",
    )
    .fetch_one(&store.0.pool)
    .await
    .unwrap()
    .get("detail");
    assert!(plan.contains("idem_records_operation_id"), "{plan}");
}
