//! What PostgreSQL is special in: snapshots, locks, lost connections, and tables that a team owns.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::HashSet,
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all};
use idem_runtime::{
    FORMAT, Fingerprint, Flags, Key, OnUnknown, OperationId, Record, ScopeDigest, State, Token,
    Ttl,
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, PostgresStore, Renewal, SchemaMismatch,
        Signal, Store, StoreError, StoreErrorKind, Wake as _, Written,
    },
};
use sqlx::{
    Connection as _, PgConnection, PgPool, Postgres as Pg, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tests::servers::postgres::{Database, Postgres};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// Beyond this a test has failed.
const PATIENCE: Duration = Duration::from_secs(20);
const LEASE: Duration = Duration::from_secs(60);

/// A database with the tables, a store on it, and a pool of the test's own.
struct Bench {
    store: PostgresStore,
    pool: PgPool,
    database: Database,
}

impl Bench {
    async fn start() -> Self {
        Self::on(Postgres::shared()).await
    }

    async fn on(server: &Postgres) -> Self {
        let database = server.database().await;
        let store = PostgresStore::connect(database.url()).await.expect("a connection");
        store.create_schema().await.expect("tables");
        let pool = PgPool::connect_lazy_with(database.options());
        Self { store, pool, database }
    }

    /// A store on a pool with settings of its own.
    fn with(&self, settings: &[(&str, &str)]) -> PostgresStore {
        let options = self.database.options().options(settings.iter().copied());
        PostgresStore::new(PgPool::connect_lazy_with(options))
    }

    /// Runs a statement beside the store.
    async fn run(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&self.pool).await.expect("a statement");
    }

    /// A claim on the key of an uncommitted row, which is another's claim.
    async fn claimed_by_another(&self) -> (Claim, Token, Transaction<'static, Pg>) {
        let template = any_claim();
        granted(&self.store, &template).await;
        let (claim, other) = (any_claim(), Token::random());
        let mut transaction = self.pool.begin().await.expect("a transaction");
        sqlx::query(
            "INSERT INTO idem_records (key, scope, operation, operation_id, state, scheme,
                 fingerprint, token, attempt, lease_end, valid_until, kept_until, created,
                 checkpoint, format, flags, payload)
             SELECT $2, scope, operation, operation_id, state, scheme, fingerprint, $3, attempt,
                    lease_end, valid_until, kept_until, created, checkpoint, format, flags, payload
             FROM idem_records WHERE key = $1",
        )
        .bind(template.key.as_bytes())
        .bind(claim.key.as_bytes())
        .bind(other.as_bytes())
        .execute(&mut *transaction)
        .await
        .expect("a row");
        (claim, other, transaction)
    }

    /// Waits until so many statements on this database wait for a lock, and says whose they are.
    async fn blocked(&self, count: usize) -> Vec<i32> {
        let start = Instant::now();
        loop {
            let pids: Vec<i32> = sqlx::query_scalar(
                "SELECT pid FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event_type = 'Lock'",
            )
            .fetch_all(&self.pool)
            .await
            .expect("the activity");
            if pids.len() >= count {
                return pids;
            }
            assert!(start.elapsed() < PATIENCE, "nobody waits for a lock");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends all connections to this database but the one that says so.
    async fn cut_all(&self) {
        self.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        .await;
    }

    /// Lets all leases be over.
    async fn lapse(&self) {
        self.run("UPDATE idem_records SET lease_end = 0").await;
    }
}

fn any_claim() -> Claim {
    claim_on(Key::from_bytes(rand::random()))
}

fn claim_on(key: Key) -> Claim {
    Claim {
        key,
        scope: ScopeDigest::from_bytes([7; 32]),
        operation: Arc::from("POST /payments"),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint { scheme: "test/1".into(), digest: [3; 32] },
        token: Token::random(),
        lease: LEASE,
        ttl: Ttl::For(Duration::from_secs(24 * 3600)),
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

fn completion(claim: &Claim) -> Completion {
    Completion {
        key: claim.key,
        token: claim.token,
        ttl: claim.ttl,
        flags: Flags::NONE,
        payload: Bytes::from(vec![b'.'; 300]),
        format: FORMAT,
    }
}

fn issue_on(key: Key) -> Issue {
    Issue {
        key,
        scope: ScopeDigest::from_bytes([7; 32]),
        operation: Arc::from("POST /flows"),
        operation_id: OperationId::random(),
        token: Token::random(),
        valid_for: Ttl::For(LEASE),
        kept_for: Ttl::For(LEASE),
        payload: Bytes::new(),
        format: FORMAT,
    }
}

async fn granted(store: &PostgresStore, claim: &Claim) -> Record {
    match store.claim(claim).await {
        Ok(Claimed::Granted(record)) => record,
        answer => panic!("the claim must be granted; got {answer:?}"),
    }
}

/// Starts a call that goes on by itself.
fn start<T: Send + 'static>(
    store: &PostgresStore,
    call: impl AsyncCall<T>,
) -> JoinHandle<Result<T, StoreError>> {
    call.start(store.clone())
}

/// A call that owns what it asks for.
trait AsyncCall<T> {
    fn start(self, store: PostgresStore) -> JoinHandle<Result<T, StoreError>>;
}

impl AsyncCall<Claimed> for Claim {
    fn start(self, store: PostgresStore) -> JoinHandle<Result<Claimed, StoreError>> {
        tokio::spawn(async move { store.claim(&self).await })
    }
}

impl AsyncCall<Written> for Completion {
    fn start(self, store: PostgresStore) -> JoinHandle<Result<Written, StoreError>> {
        tokio::spawn(async move { store.complete(&self).await })
    }
}

impl AsyncCall<Written> for Issue {
    fn start(self, store: PostgresStore) -> JoinHandle<Result<Written, StoreError>> {
        tokio::spawn(async move { store.issue(&self).await })
    }
}

async fn answer<T>(call: JoinHandle<Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(PATIENCE, call).await.expect("an answer in time").expect("no panic")
}

#[track_caller]
fn assert_fails<T: std::fmt::Debug>(answer: Result<T, StoreError>, kind: StoreErrorKind) {
    let error = answer.expect_err("a failure");
    assert_eq!(error.kind(), kind, "{error:?}");
}

/// Each way in which two statements can be in each other's way, at each isolation level that an
/// application's pool may have.
#[tokio::test]
async fn a_claim_that_its_snapshot_cannot_see_is_seen_all_the_same() {
    let bench = Bench::start().await;
    for isolation in ["read committed", "repeatable read", "serializable"] {
        let store = bench.with(&[("default_transaction_isolation", isolation)]);
        let (claim, other, transaction) = bench.claimed_by_another().await;
        let (claiming, issuing) =
            (start(&store, claim.clone()), start(&store, issue_on(claim.key)));
        bench.blocked(2).await;
        transaction.commit().await.expect("a commit");
        let found = answer(claiming).await;
        assert!(
            matches!(&found, Ok(Claimed::Found(record)) if record.token == other),
            "{isolation}: {found:?}",
        );
        let fenced = answer(issuing).await;
        assert!(
            matches!(&fenced, Ok(Written::Fenced(record)) if record.token == other),
            "{isolation}: {fenced:?}",
        );

        let (claim, _, transaction) = bench.claimed_by_another().await;
        let claiming = start(&store, claim);
        bench.blocked(1).await;
        transaction.rollback().await.expect("a rollback");
        let granted = answer(claiming).await;
        assert!(matches!(granted, Ok(Claimed::Granted(_))), "{isolation}: {granted:?}");
    }
}

#[tokio::test]
async fn of_two_takeovers_at_once_the_slower_one_finds_the_faster() {
    let bench = Bench::start().await;
    for isolation in ["read committed", "repeatable read", "serializable"] {
        let store = bench.with(&[("default_transaction_isolation", isolation)]);
        let first = any_claim();
        granted(&store, &first).await;
        bench.lapse().await;
        let (slower, faster) = (claim_on(first.key), Token::random());
        let mut transaction = bench.pool.begin().await.expect("a transaction");
        sqlx::query(
            "UPDATE idem_records SET token = $2, attempt = 2, lease_end = kept_until WHERE key = $1",
        )
        .bind(first.key.as_bytes())
        .bind(faster.as_bytes())
        .execute(&mut *transaction)
        .await
        .expect("a takeover");
        let claiming = start(&store, slower);
        bench.blocked(1).await;
        transaction.commit().await.expect("a commit");
        let found = answer(claiming).await;
        assert!(
            matches!(&found, Ok(Claimed::Found(record)) if (record.token, record.attempt) == (faster, 2)),
            "{isolation}: {found:?}",
        );
    }
}

#[tokio::test]
async fn of_two_completions_at_once_both_are_done_and_one_is_recorded() {
    let bench = Bench::start().await;
    let claim = any_claim();
    granted(&bench.store, &claim).await;
    let mut transaction = bench.pool.begin().await.expect("a transaction");
    sqlx::query("UPDATE idem_records SET state = 3, payload = 'first' WHERE key = $1")
        .bind(claim.key.as_bytes())
        .execute(&mut *transaction)
        .await
        .expect("a completion");
    let completing = start(&bench.store, completion(&claim));
    bench.blocked(1).await;
    transaction.commit().await.expect("a commit");
    assert_eq!(answer(completing).await.expect("an answer"), Written::Done);
    let record = bench.store.read(&claim.key).await.expect("an answer").expect("a record");
    assert_eq!(record.payload, &b"first"[..]);
}

/// Deadlocks, conflicts and lost races included: whatever many processes do to a few keys, each
/// call is answered, and a key has one holder at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_key_that_many_want_has_one_holder_at_a_time() {
    let bench = Bench::start().await;
    for isolation in ["read committed", "serializable"] {
        let keys: [Key; 3] = std::array::from_fn(|_| any_claim().key);
        let holders: Arc<[AtomicUsize; 3]> = Arc::default();
        let stores =
            [bench.store.clone(), bench.with(&[("default_transaction_isolation", isolation)])];
        let workers = (0..12).map(|worker| {
            let (store, holders) = (stores[worker % 2].clone(), Arc::clone(&holders));
            tokio::spawn(async move {
                let mut grants = 0;
                for round in 0..60 {
                    let at = (worker + round) % 3;
                    let claim = claim_on(keys[at]);
                    let Claimed::Granted(_) = store.claim(&claim).await.expect("an answer") else {
                        continue;
                    };
                    grants += 1;
                    assert_eq!(holders[at].fetch_add(1, Ordering::SeqCst), 0, "it has one holder");
                    let renewal = Renewal { key: claim.key, token: claim.token, lease: LEASE };
                    assert_eq!(store.renew(&[renewal]).await.expect("an answer"), [true]);
                    holders[at].fetch_sub(1, Ordering::SeqCst);
                    let written = match round % 2 {
                        0 => store.forget(&claim.key, &claim.token).await,
                        _ => store.release(&claim.key, &claim.token).await,
                    };
                    assert_eq!(written.expect("an answer"), Written::Done);
                }
                grants
            })
        });
        let grants: Vec<usize> =
            join_all(workers).await.into_iter().map(|grants| grants.expect("no panic")).collect();
        assert!(grants.iter().sum::<usize>() > 12, "{grants:?}");
    }
}

#[tokio::test]
async fn a_connection_that_dies_in_mid_call_costs_nobody_an_answer() {
    let bench = Bench::start().await;
    let (claim, _, transaction) = bench.claimed_by_another().await;
    let held = any_claim();
    granted(&bench.store, &held).await;
    let mut lock = bench.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM idem_records WHERE key = $1 FOR UPDATE")
        .bind(held.key.as_bytes())
        .execute(&mut *lock)
        .await
        .expect("a lock");
    let claiming = start(&bench.store, claim.clone());
    let completing = start(&bench.store, completion(&held));
    for pid in bench.blocked(2).await {
        let end = sqlx::query("SELECT pg_terminate_backend($1)").bind(pid);
        end.execute(&bench.pool).await.expect("its end");
    }
    transaction.rollback().await.expect("a rollback");
    lock.rollback().await.expect("a rollback");
    let claimed = answer(claiming).await;
    assert!(
        matches!(&claimed, Ok(Claimed::Granted(record)) if record.token == claim.token),
        "{claimed:?}"
    );
    assert_eq!(answer(completing).await.expect("an answer"), Written::Done);
}

#[tokio::test]
async fn connections_that_died_while_nobody_looked_are_replaced() {
    let bench = Bench::start().await;
    for _ in 0..3 {
        let claims: Vec<_> = (0..40).map(|_| any_claim()).collect();
        let answers = join_all(claims.iter().map(|claim| bench.store.claim(claim))).await;
        for answer in answers {
            assert!(matches!(answer, Ok(Claimed::Granted(_))), "{answer:?}");
        }
        bench.cut_all().await;
    }
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_any_more_blocks_no_connection() {
    let bench = Bench::start().await;
    let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(bench.database.options());
    let store = PostgresStore::new(pool);
    let (claim, _, transaction) = bench.claimed_by_another().await;
    let claiming = start(&store, claim.clone());
    bench.blocked(1).await;
    claiming.abort();
    let next = timeout(PATIENCE / 4, granted(&store, &any_claim())).await;
    next.expect("the pool's only connection is free again");
    transaction.rollback().await.expect("a rollback");
}

#[tokio::test]
async fn no_connection_and_no_answer_in_time_are_time_outs() {
    let bench = Bench::start().await;
    let options = PgPoolOptions::new().max_connections(1);
    let pool = options
        .acquire_timeout(Duration::from_millis(100))
        .connect_lazy_with(bench.database.options());
    let taken = pool.acquire().await.expect("a connection");
    let store = PostgresStore::new(pool);
    assert_fails(store.claim(&any_claim()).await, StoreErrorKind::TimedOut);
    drop(taken);
    granted(&store, &any_claim()).await;

    let (claim, _, transaction) = bench.claimed_by_another().await;
    for setting in ["statement_timeout", "lock_timeout"] {
        let store = bench.with(&[(setting, "100ms")]);
        assert_fails(store.claim(&claim).await, StoreErrorKind::TimedOut);
    }
    transaction.rollback().await.expect("a rollback");
}

#[tokio::test]
async fn failures_say_what_kind_they_are() {
    let bench = Bench::start().await;
    // As a server is after a failover, to which a connection still leads.
    let store = bench.with(&[("default_transaction_read_only", "on")]);
    assert_fails(store.claim(&any_claim()).await, StoreErrorKind::Unreachable);
    let options = bench.database.options();
    let nowhere = options.clone().port(servers::free_port());
    let refused: [PgConnectOptions; 2] =
        [options.clone().database("nowhere"), options.username("nobody")];
    for (options, kind) in [
        (nowhere, StoreErrorKind::Unreachable),
        (refused[0].clone(), StoreErrorKind::Refused),
        (refused[1].clone(), StoreErrorKind::Refused),
    ] {
        use sqlx::ConnectOptions as _;
        let url = options.to_url_lossy().to_string();
        assert_fails(PostgresStore::connect(&url).await, kind);
    }
    assert_fails(PostgresStore::connect("not a URL").await, StoreErrorKind::Refused);
}

/// Neither a row nor the log of the database is touched by whoever is refused, on a server where
/// nothing else writes.
#[tokio::test]
async fn a_losing_claim_writes_nothing() {
    let quiet = "-c wal_level=minimal -c max_wal_senders=0 -c autovacuum=off";
    let server = Postgres::start_own_with(quiet);
    let bench = Bench::on(&server).await;
    let [running, completed, released] = std::array::from_fn(|_| any_claim());
    for claim in [&running, &completed, &released] {
        granted(&bench.store, claim).await;
    }
    bench.store.complete(&completion(&completed)).await.expect("an answer");
    bench.store.release(&released.key, &released.token).await.expect("an answer");
    bench.run("VACUUM").await;

    let state = || async {
        let written: String = sqlx::query_scalar("SELECT pg_current_wal_insert_lsn()::text")
            .fetch_one(&bench.pool)
            .await
            .expect("a place in the log");
        let rows: Vec<(String, String, String)> = sqlx::query_as(
            "SELECT ctid::text, xmin::text, xmax::text FROM idem_records ORDER BY key",
        )
        .fetch_all(&bench.pool)
        .await
        .expect("rows");
        (written, rows)
    };
    let before = state().await;
    for _ in 0..20 {
        for claim in [&running, &completed] {
            let found = bench.store.claim(&claim_on(claim.key)).await;
            assert!(matches!(found, Ok(Claimed::Found(_))), "{found:?}");
        }
        let other = Fingerprint { scheme: "test/1".into(), digest: [4; 32] };
        let found =
            bench.store.claim(&Claim { fingerprint: other, ..claim_on(released.key) }).await;
        assert!(matches!(found, Ok(Claimed::Found(_))), "{found:?}");
        let refuses = Claim { on_unknown: OnUnknown::Refuse, ..claim_on(released.key) };
        let found = bench.store.claim(&refuses).await;
        assert!(matches!(found, Ok(Claimed::Found(_))), "{found:?}");
        let unknown = bench.store.claim(&Claim { issued_only: true, ..any_claim() }).await;
        assert_eq!(unknown.expect("an answer"), Claimed::Unknown);
        let fenced = bench.store.complete(&completion(&claim_on(running.key))).await;
        assert!(matches!(fenced, Ok(Written::Fenced(_))), "{fenced:?}");
    }
    assert_eq!(before, state().await);
    granted(&bench.store, &any_claim()).await;
    assert_ne!(before, state().await, "what is written shows");
}

/// Whichever of two reaches the database last, the one that was made last stands.
#[tokio::test]
async fn a_late_checkpoint_replaces_no_later_one() {
    let bench = Bench::start().await;
    let claim = any_claim();
    granted(&bench.store, &claim).await;
    let [first, last] = ["first", "last"].map(|payload| Checkpoint {
        key: claim.key,
        token: claim.token,
        payload: Bytes::from(payload),
        format: FORMAT,
    });
    let late = bench.store.checkpoint(&first);
    assert_eq!(bench.store.checkpoint(&last).await.expect("an answer"), Written::Done);
    assert_eq!(late.await.expect("an answer"), Written::Done);
    let record = bench.store.read(&claim.key).await.expect("an answer").expect("a record");
    assert_eq!(record.payload, last.payload);
}

/// A completion changes no index: see `bucket` in the schema.
#[tokio::test]
async fn completions_stay_within_their_page() {
    const CLAIMS: usize = 400;
    let bench = Bench::start().await;
    for chunk in 0..CLAIMS / 20 {
        let claims: Vec<_> = (0..20).map(|_| any_claim()).collect();
        join_all(claims.iter().map(|claim| granted(&bench.store, claim))).await;
        let answers: Vec<_> = claims.iter().map(completion).collect();
        let written = join_all(answers.iter().map(|answer| bench.store.complete(answer))).await;
        assert!(written.iter().all(|written| matches!(written, Ok(Written::Done))), "{chunk}");
    }
    let start = Instant::now();
    let (updated, in_place) = loop {
        // A server tells of what its connections did some time later, or when they end.
        bench.cut_all().await;
        let counts: (i64, i64) = sqlx::query_as(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables
             WHERE relname = 'idem_records'",
        )
        .fetch_one(&bench.pool)
        .await
        .expect("statistics");
        if counts.0 >= CLAIMS as i64 {
            break counts;
        }
        assert!(start.elapsed() < PATIENCE, "{counts:?}");
        sleep(Duration::from_millis(50)).await;
    };
    println!("{in_place} of {updated} updates were in place");
    assert!(in_place * 100 >= updated * 90, "{in_place} of {updated} updates were in place");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_sweep_at_once_and_neither_waits_for_a_lock() {
    const OVER: usize = 1_700;
    let bench = Bench::start().await;
    granted(&bench.store, &any_claim()).await;
    sqlx::query(
        "INSERT INTO idem_records (key, scope, operation, operation_id, state, scheme, fingerprint,
             token, attempt, lease_end, valid_until, kept_until, created, checkpoint, format, flags,
             payload)
         SELECT sha256(n::text::bytea), scope, operation, operation_id, 3, scheme, fingerprint,
                token, attempt, 0, n, n, 0, checkpoint, format, flags, payload
         FROM idem_records, generate_series(1, $1) AS n",
    )
    .bind(OVER as i32)
    .execute(&bench.pool)
    .await
    .expect("rows");
    let mut lock = bench.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM idem_records WHERE kept_until = 1 FOR UPDATE")
        .execute(&mut *lock)
        .await
        .expect("a lock");
    let second = bench.with(&[]);
    let sweeps = [bench.store.clone(), second].map(|store| {
        tokio::spawn(async move { store.sweep(usize::MAX).await.expect("an answer") })
    });
    let swept: usize = join_all(sweeps).await.into_iter().map(|n| n.expect("no panic")).sum();
    assert_eq!(swept, OVER - 1, "each once, but for the one that is locked");
    lock.rollback().await.expect("a rollback");
    assert_eq!(bench.store.sweep(10).await.expect("an answer"), 1);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM idem_records")
        .fetch_one(&bench.pool)
        .await
        .expect("a count");
    assert_eq!(left, 1, "what is not over is kept");
}

#[tokio::test]
async fn damaged_records_are_kept_and_concern_nobody_else() {
    let bench = Bench::start().await;
    let [damaged, sound] = [any_claim(), any_claim()];
    for claim in [&damaged, &sound] {
        granted(&bench.store, claim).await;
    }
    sqlx::query(
        "UPDATE idem_records SET state = 77, kept_until = 1, valid_until = 0 WHERE key = $1",
    )
    .bind(damaged.key.as_bytes())
    .execute(&bench.pool)
    .await
    .expect("damage");
    let store = &bench.store;
    let (key, token) = (&damaged.key, &damaged.token);
    assert_fails(store.claim(&claim_on(*key)).await, StoreErrorKind::Corrupt);
    assert_fails(store.issue(&issue_on(*key)).await, StoreErrorKind::Corrupt);
    assert_fails(store.read(key).await, StoreErrorKind::Corrupt);
    assert_fails(store.complete(&completion(&damaged)).await, StoreErrorKind::Corrupt);
    assert_fails(store.release(key, token).await, StoreErrorKind::Corrupt);
    assert_fails(store.forget(key, token).await, StoreErrorKind::Corrupt);
    let renewals = [&damaged, &sound].map(|claim| Renewal {
        key: claim.key,
        token: claim.token,
        lease: LEASE,
    });
    assert_eq!(store.renew(&renewals).await.expect("an answer"), [false, true]);
    assert_eq!(store.sweep(usize::MAX).await.expect("an answer"), 0);

    bench.run("UPDATE idem_records SET format = 2").await;
    assert_fails(store.claim(&claim_on(*key)).await, StoreErrorKind::Newer);
    assert_fails(store.read(key).await, StoreErrorKind::Newer);
    assert_eq!(store.sweep(usize::MAX).await.expect("an answer"), 0);
}

fn mismatch(error: &StoreError) -> Option<SchemaMismatch> {
    error.source()?.downcast_ref().copied()
}

#[tokio::test]
async fn tables_of_another_release_are_refused_and_left_alone() {
    let database = Postgres::shared().database().await;
    let pool = PgPool::connect_lazy_with(database.options());
    let store = || PostgresStore::new(pool.clone());
    let error = store().claim(&any_claim()).await.expect_err("there are no tables");
    assert_eq!(error.kind(), StoreErrorKind::Refused);
    assert_eq!(mismatch(&error), Some(SchemaMismatch { found: None }), "{error:?}");

    let first = store();
    first.create_schema().await.expect("tables");
    granted(&first, &any_claim()).await;
    for (version, kind) in [(2, StoreErrorKind::Newer), (0, StoreErrorKind::Refused)] {
        sqlx::query("UPDATE idem_schema SET version = $1")
            .bind(version)
            .execute(&pool)
            .await
            .expect("another version");
        let claimed = store().claim(&any_claim()).await;
        for error in
            [claimed.expect_err("a refusal"), store().create_schema().await.expect_err("a refusal")]
        {
            assert_eq!(error.kind(), kind);
            assert_eq!(mismatch(&error), Some(SchemaMismatch { found: Some(version) }));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_create_the_tables_at_once() {
    let database = Postgres::shared().database().await;
    for round in 0..4 {
        let creators = (0..8).map(|_| {
            let url = database.url().to_owned();
            tokio::spawn(async move {
                let store = PostgresStore::connect(&url).await?;
                store.create_schema().await?;
                store.claim(&any_claim()).await
            })
        });
        for created in join_all(creators).await {
            let created = created.expect("no panic");
            assert!(matches!(created, Ok(Claimed::Granted(_))), "{round}: {created:?}");
        }
        let mut connection = PgConnection::connect(database.url()).await.expect("a connection");
        sqlx::raw_sql("DROP TABLE idem_records, idem_schema")
            .execute(&mut connection)
            .await
            .expect("no tables");
    }
}

#[tokio::test]
async fn an_applications_database_is_its_own() {
    let bench = Bench::start().await;
    bench
        .run(
            "CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY);
             DROP TABLE idem_records, idem_schema;
             CREATE SCHEMA payments;",
        )
        .await;
    // In a schema of its own, by a migration of the team's.
    let url = format!("{}&options=-csearch_path%3Dpayments", bench.database.url());
    let store = PostgresStore::connect(&url).await.expect("a connection");
    let options = bench.database.options().options([("search_path", "payments")]);
    let theirs = PgPool::connect_lazy_with(options);
    for _ in 0..2 {
        sqlx::raw_sql(PostgresStore::SCHEMA).execute(&theirs).await.expect("tables");
    }
    store.create_schema().await.expect("there they are");
    granted(&store, &any_claim()).await;
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT schemaname || '.' || relname FROM pg_stat_user_tables ORDER BY 1",
    )
    .fetch_all(&bench.pool)
    .await
    .expect("names");
    let expected = ["payments.idem_records", "payments.idem_schema", "public._sqlx_migrations"];
    assert_eq!(tables, expected);

    // Whoever may not create anything can use what is there.
    bench
        .run(
            "DO $$ BEGIN CREATE ROLE idem_plain LOGIN; EXCEPTION WHEN duplicate_object THEN END $$;
             GRANT USAGE ON SCHEMA payments TO idem_plain;
             GRANT SELECT, INSERT, UPDATE, DELETE ON payments.idem_records TO idem_plain;
             GRANT SELECT ON payments.idem_schema TO idem_plain;",
        )
        .await;
    let options = bench.database.options().username("idem_plain");
    let options = options.options([("search_path", "payments")]);
    let plain = PostgresStore::new(PgPool::connect_lazy_with(options));
    plain.create_schema().await.expect("there is nothing to do");
    granted(&plain, &any_claim()).await;
}

#[tokio::test]
async fn what_is_told_is_heard_until_the_connection_is_lost() {
    let bench = Bench::start().await;
    let second = bench.with(&[]);
    let mut heard = [
        bench.store.listen().await.expect("a connection"),
        second.listen().await.expect("a connection"),
    ];
    let key = any_claim().key;
    for (store, signal) in [(&bench.store, Signal::Awaited(key)), (&second, Signal::Ended(key))] {
        bench.run("NOTIFY idem, 'something else'").await;
        store.tell(signal).await.expect("an answer");
        for heard in &mut heard {
            let message = timeout(PATIENCE, heard.next()).await.expect("a message in time");
            assert_eq!(message, Some(signal));
        }
    }
    bench.cut_all().await;
    for heard in &mut heard {
        assert_eq!(timeout(PATIENCE, heard.next()).await.expect("its end in time"), None);
    }
    bench.store.tell(Signal::Ended(key)).await.expect("another connection");
    let mut again = bench.store.listen().await.expect("a connection");
    second.tell(Signal::Ended(key)).await.expect("another connection");
    let message = timeout(PATIENCE, again.next()).await.expect("a message in time");
    assert_eq!(message, Some(Signal::Ended(key)));
}

/// A server that was shut down and came back, without a single error to whoever asks then.
#[tokio::test]
async fn a_restart_of_the_server_is_survived() {
    let server = Postgres::start_own();
    let bench = Bench::on(&server).await;
    let claims: Vec<_> = (0..30).map(|_| any_claim()).collect();
    join_all(claims.iter().map(|claim| granted(&bench.store, claim))).await;
    for killed in [false, true] {
        if killed {
            server.kill();
        } else {
            server.stop();
        }
        let error = bench.store.read(&claims[0].key).await.expect_err("nobody is there");
        assert!(error.kind().is_transient(), "{error:?}");
        server.restart();
        let records = join_all(claims.iter().map(|claim| bench.store.read(&claim.key))).await;
        let tokens: HashSet<_> = records
            .into_iter()
            .map(|record| record.expect("an answer").expect("a record"))
            .inspect(|record| assert_eq!(record.state, State::Running))
            .map(|record| record.token)
            .collect();
        assert_eq!(tokens.len(), claims.len());
    }
}
