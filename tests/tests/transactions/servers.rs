//! Transactional handlers in PostgreSQL and MariaDB: what holds for every database, and what several
//! processes, lost connections and lost COMMITs make of it.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod bank;
mod kills;
mod promises;

use std::time::{Duration, Instant};

use axum::{
    Router,
    body::Body,
    http::{Method, Request, StatusCode},
    routing::post,
};
use idem_runtime::{
    Anchor, Idempotency, IdempotentExt, InFlight, KeyName, Policy, Scope, Tx,
    store::{Clock, MySqlStore, PostgresStore, ReplayCache, Store},
};
use sqlx::{
    MySql, MySqlConnection, MySqlPool, PgConnection, PgPool, Postgres, Sqlite,
    mysql::MySqlPoolOptions, postgres::PgPoolOptions,
};
use tests::servers::{
    lost_commits::{Fate, Proxy},
    mariadb::{self, MariaDb},
    postgres,
};
use tower::ServiceExt;

use crate::bank::{Bank, Base, PATIENCE, POLICY, assert_refused, different, told};

const KEY: Anchor = Anchor::header("Idempotency-Key");

/// A database on a server.
trait Served: Base {
    /// The same database, as another process sees it through this port.
    fn through(&self, port: u16) -> Self;
    fn port(&self) -> u16;
    /// The statement that names the connection.
    const WHO: &str;
    /// The statement that kills a connection.
    const KILL: &str;
    /// Whether a statement that fails takes its transaction with it.
    const ABORTS: bool;
}

#[derive(Clone, Debug)]
struct InPostgres {
    pool: PgPool,
    database: postgres::Database,
}

impl InPostgres {
    fn connect(database: postgres::Database, port: u16, connections: u32) -> Self {
        let options = database.options().port(port);
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(Duration::from_secs(5))
            .connect_lazy_with(options);
        Self { pool, database }
    }
}

impl Base for InPostgres {
    async fn open(connections: u32) -> Self {
        let database = postgres::Postgres::shared().database().await;
        let port = database.options().get_port();
        let base = Self::connect(database, port, connections);
        PostgresStore::new(base.pool.clone()).create_schema().await.expect("tables");
        base
    }

    fn url(&self) -> String {
        self.database.url().to_owned()
    }

    async fn store(&self) -> impl Store {
        PostgresStore::new(self.pool.clone())
    }

    statements!(Postgres, PgConnection);
}

impl Served for InPostgres {
    fn through(&self, port: u16) -> Self {
        Self::connect(self.database.clone(), port, 5)
    }

    fn port(&self) -> u16 {
        self.database.options().get_port()
    }

    const WHO: &str = "SELECT pg_backend_pid()::bigint";
    const KILL: &str = "SELECT pg_terminate_backend";
    const ABORTS: bool = true;
}

#[derive(Clone, Debug)]
struct InMariaDb {
    pool: MySqlPool,
    database: mariadb::Database,
}

impl InMariaDb {
    fn connect(database: mariadb::Database, port: u16, connections: u32) -> Self {
        let options = database.options().port(port);
        let pool = MySqlPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(Duration::from_secs(5))
            .connect_lazy_with(options);
        Self { pool, database }
    }
}

impl Base for InMariaDb {
    async fn open(connections: u32) -> Self {
        let database = MariaDb::shared().database().await;
        let port = database.options().get_port();
        let base = Self::connect(database, port, connections);
        MySqlStore::new(base.pool.clone()).create_schema().await.expect("tables");
        base
    }

    fn url(&self) -> String {
        self.database.url().to_owned()
    }

    async fn store(&self) -> impl Store {
        MySqlStore::new(self.pool.clone())
    }

    statements!(MySql, MySqlConnection);
}

impl Served for InMariaDb {
    fn through(&self, port: u16) -> Self {
        Self::connect(self.database.clone(), port, 5)
    }

    fn port(&self) -> u16 {
        self.database.options().get_port()
    }

    const WHO: &str = "SELECT CAST(CONNECTION_ID() AS SIGNED)";
    const KILL: &str = "KILL CONNECTION ";
    const ABORTS: bool = false;
}

/// Another process of the same bank.
async fn beside<B: Served>(bank: &Bank<B>, policy: Policy) -> Bank<B> {
    let base = bank.base.through(bank.base.port());
    Bank::again(base, policy, |engine| engine).await
}

async fn fifty_duplicates_in_another_process_are_answered_while_the_owner_runs<B: Served>() {
    let bank = Bank::<B>::open().await;
    let other = beside(&bank, POLICY).await;
    let running = bank.running("k", "waits").await;
    let start = Instant::now();
    let duplicates: Vec<_> = (0..50).map(|_| tokio::spawn(other.ask(Some("k"), "waits"))).collect();
    for answer in different(duplicates).await {
        assert_refused(&answer, 409, "in_flight");
    }
    assert!(start.elapsed() < PATIENCE / 3, "{:?}", start.elapsed());
    // Another key is nobody's.
    assert_eq!(other.send("l", "a").await.0.as_u16(), 201);
    bank.go_on();
    assert_eq!(running.await.expect("an owner").status().as_u16(), 201);
    let (status, replayed, body) = other.send("k", "waits").await;
    assert_eq!((status.as_u16(), replayed, &*body), (201, true, "run 1"));
    assert_eq!((bank.counts().await, other.runs()), ((2, 2), 1));
}

async fn duplicates_in_another_process_may_wait_for_the_commit<B: Served>() {
    let policy = POLICY.in_flight(InFlight::Wait(PATIENCE));
    let bank = Bank::<B>::with(policy).await;
    let other = beside(&bank, policy).await;
    let running = bank.running("k", "waits").await;
    let waiting: Vec<_> = (0..50).map(|_| tokio::spawn(other.ask(Some("k"), "waits"))).collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Those who wait hold none of the five connections.
    assert_eq!(other.send("l", "a").await.0.as_u16(), 201);
    bank.go_on();
    assert_eq!(running.await.expect("an owner").status().as_u16(), 201);
    let answers = different(waiting).await;
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert!(answers.iter().all(|(_, replayed, body)| *replayed && body == "run 1"), "{answers:?}");
    assert_eq!(bank.counts().await, (2, 2));
}

async fn a_connection_that_is_killed_in_mid_handler_undoes_all_of_it<B: Served>() {
    let bank = Bank::<B>::open().await;
    for body in ["waits", "waits and goes on"] {
        let running = bank.running(body, body).await;
        let mut own = bank.base.connection().await;
        let me = B::number(&mut own, B::WHO.into()).await.expect("a number");
        for session in others::<B>(&mut own, me).await {
            let _ = B::execute(&mut own, format!("{}({session})", B::KILL)).await;
        }
        bank.go_on();
        let answer = told(running.await.expect("an owner")).await;
        assert_refused(&answer, 500, "transaction_failed");
        drop(own);
        assert_eq!(bank.counts().await, (0, 0));
        let again = tokio::spawn(bank.ask(Some(body), body));
        bank.app.counter.reached.notified().await;
        bank.go_on();
        assert_eq!(again.await.expect("an owner").status().as_u16(), 201);
        let delete = ["DELETE FROM deposits", "DELETE FROM idem_records"];
        for delete in delete {
            B::execute(&mut *bank.base.connection().await, delete.into()).await.expect("a row");
        }
    }
}

/// The other sessions of the test's database.
async fn others<B: Served>(
    connection: &mut <B::Database as sqlx::Database>::Connection,
    me: i64,
) -> Vec<i64> {
    let (table, column) = match B::ABORTS {
        true => ("pg_stat_activity WHERE datname = current_database() AND", "pid"),
        false => ("information_schema.processlist WHERE db = DATABASE() AND", "id"),
    };
    let mut sessions: Vec<i64> = Vec::new();
    loop {
        let last = sessions.last().copied().unwrap_or(0);
        let cast = if B::ABORTS { "bigint" } else { "signed" };
        let next = format!(
            "SELECT CAST(coalesce(min({column}), 0) AS {cast}) FROM {table} {column} > {last} AND {column} <> {me}"
        );
        match B::number(connection, next).await.expect("a number") {
            0 => return sessions,
            session => sessions.push(session),
        }
    }
}

async fn a_failed_statement_that_is_not_looked_at<B: Served>() {
    let bank = Bank::<B>::with(POLICY.optional()).await;
    let answers = [
        bank.send("k", "breaks and says nothing").await,
        told(bank.ask(None, "breaks and says nothing").await).await,
    ];
    for answer in answers {
        match B::ABORTS {
            true => assert_refused(&answer, 500, "transaction_failed"),
            false => assert_eq!(answer.0.as_u16(), 201),
        }
    }
    // What the server has undone is not answered for as if it had been done.
    assert_eq!(bank.counts().await, if B::ABORTS { (0, 0) } else { (2, 1) });
}

async fn a_commit_that_is_lost_has_not_happened_and_is_answered_for<B: Served>() {
    let (bank, proxy) = behind_a_proxy::<B>().await;
    for key in ["a", "b", "c"] {
        proxy.next_commit(Fate::Lost);
        let answer = bank.send(key, "x").await;
        assert!(proxy.has_struck());
        assert_refused(&answer, 500, "transaction_failed");
        assert_eq!(bank.counts().await, (0, 0));
    }
    assert_eq!(bank.send("a", "x").await.0.as_u16(), 201);
    assert_eq!(bank.counts().await, (1, 1));
}

async fn a_commit_whose_answer_is_lost_is_found_out<B: Served>() {
    let (bank, proxy) = behind_a_proxy::<B>().await;
    for (done, key) in (1..).zip(["a", "b", "c"]) {
        proxy.next_commit(Fate::Unanswered);
        let (status, replayed, body) = bank.send(key, "x").await;
        assert!(proxy.has_struck());
        assert_eq!((status.as_u16(), replayed), (201, false), "{body}");
        assert_eq!(bank.counts().await, (done, done));
        let again = bank.send(key, "x").await;
        assert_eq!((again.0.as_u16(), again.1, again.2), (201, true, body));
    }
    // Without a record nobody can say.
    proxy.next_commit(Fate::Unanswered);
    assert_refused(&told(bank.ask(None, "x").await).await, 409, "unknown_outcome");
    assert_eq!(bank.counts().await, (4, 3));
}

async fn behind_a_proxy<B: Served>() -> (Bank<B>, Proxy) {
    let base = B::open(5).await;
    let proxy = Proxy::start(base.port()).await;
    (Bank::on(base.through(proxy.port()), POLICY.optional()).await, proxy)
}

/// Under every isolation: what a snapshot has missed is found at the end.
async fn whoever_has_missed_another_ones_record_is_undone<B: Served>(isolation: &'static str) {
    let bank = Bank::<B>::open().await;
    let set = format!("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {isolation}");
    let set = if B::ABORTS {
        set
    } else {
        format!("SET SESSION TRANSACTION ISOLATION LEVEL {isolation}")
    };
    // The session keeps it; all five have it.
    let mut all = futures_util::future::join_all((0..5).map(|_| bank.base.connection())).await;
    for connection in &mut all {
        B::execute(connection, set.clone()).await.expect("a setting");
    }
    drop(all);
    let bank = Bank::again(bank.base.clone(), POLICY.space("deposits"), |engine| engine).await;
    let running = bank.running("k", "waits").await;
    let other = told(bank.ask_at("/at-once", Some("k"), "at once").await).await;
    assert_eq!(other.0.as_u16(), 201, "{other:?}");
    bank.go_on();
    let first = told(running.await.expect("an owner")).await;
    assert!(matches!(first.0.as_u16(), 409 | 500), "{first:?}");
    assert_eq!(bank.counts().await, (1, 1));
    let answers = (0..50).map(|_| tokio::spawn(bank.ask(Some("l"), "a")));
    for answer in different(answers.collect::<Vec<_>>()).await {
        match answer.0.as_u16() {
            201 => assert_eq!(answer.2, "run 3"),
            409 => assert_refused(&answer, 409, "in_flight"),
            _ => assert_refused(&answer, 500, "transaction_failed"),
        }
    }
    assert_eq!(bank.counts().await, (2, 2));
}

async fn every_isolation<B: Served>() {
    for isolation in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        whoever_has_missed_another_ones_record_is_undone::<B>(isolation).await;
    }
}

async fn a_repetition_is_at_hand<B: Served>() {
    let clock = Clock::manual();
    let cache = || ReplayCache::new().clock(clock.clone());
    let here = Bank::<B>::open().await;
    let base = here.base.through(here.base.port());
    let here = Bank::again(here.base, POLICY, |engine| engine.replay_cache(cache())).await;
    let there = Bank::again(base, POLICY, |engine| engine.replay_cache(cache())).await;
    let answer = |replayed, run: &str| (StatusCode::CREATED, replayed, format!("run {run}"));
    assert_eq!(there.send("l", "a").await, answer(false, "1"));
    for replayed in [false, true, true] {
        assert_eq!(here.send("k", "a").await, answer(replayed, "1"));
    }
    let name = KeyName::of(&KEY, "k").operation(&Method::POST, "/", [""; 0]);
    let purged = there.app.idem.admin().purge(&(), &name).await.expect("purged");
    assert_eq!(purged.removed, 1);
    assert_eq!(there.send("k", "a").await, answer(false, "2"));

    // It takes no connection, and nobody here has heard of the purge.
    let mut connections = Vec::new();
    for _ in 0..5 {
        connections.push(here.base.connection().await);
    }
    let start = Instant::now();
    assert_eq!(here.send("k", "a").await, answer(true, "1"));
    assert!(start.elapsed() < PATIENCE / 10, "{:?}", start.elapsed());
    drop(connections);
    clock.advance(Duration::from_secs(10));
    for bank in [&here, &there] {
        assert_eq!(bank.send("k", "a").await, answer(true, "2"));
    }
    assert_eq!((here.runs(), there.runs(), here.counts().await), (1, 2, (3, 2)));
}

async fn a_tx_of_another_database_is_refused<B: Served>() {
    async fn elsewhere(_tx: Tx<Sqlite>, _body: String) {}
    let base = B::open(5).await;
    let idem = Idempotency::builder(base.store().await).scope(Scope::global()).build();
    let app = Router::new().route("/", post(elsewhere.idempotent(POLICY))).with_state(idem);
    let request = Request::post("/").header("Idempotency-Key", "k").body(Body::empty());
    let answer = app.oneshot(request.expect("a request")).await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 500);
}

macro_rules! on_both {
    ($($promise:ident),* $(,)?) => {
        mod in_postgres {
            crate::on!(super::InPostgres);
            on_both!(super::InPostgres: $($promise)*);
        }

        mod in_mariadb {
            crate::on!(super::InMariaDb);
            on_both!(super::InMariaDb: $($promise)*);
        }
    };
    ($base:ty: $($promise:ident)*) => {
        $(#[tokio::test]
        async fn $promise() {
            super::$promise::<$base>().await;
        })*
    };
}

on_both!(
    fifty_duplicates_in_another_process_are_answered_while_the_owner_runs,
    duplicates_in_another_process_may_wait_for_the_commit,
    a_connection_that_is_killed_in_mid_handler_undoes_all_of_it,
    a_failed_statement_that_is_not_looked_at,
    a_commit_that_is_lost_has_not_happened_and_is_answered_for,
    a_commit_whose_answer_is_lost_is_found_out,
    every_isolation,
    a_repetition_is_at_hand,
    a_tx_of_another_database_is_refused,
);

/// What defines a table commits whatever was done before, in these servers.
#[tokio::test]
async fn a_statement_that_commits_by_itself_in_mariadb_is_answered_for() {
    let bank = Bank::<InMariaDb>::open().await;
    assert_refused(&bank.send("k", "defines a table").await, 500, "transaction_failed");
    assert_eq!(bank.counts().await, (1, 0));
    assert_eq!(bank.send("k", "a").await.0.as_u16(), 201);
}
