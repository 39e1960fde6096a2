//! A bank that moves money between two accounts, in one transaction with idem's record of it:
//! exactly once, wherever the process dies.
//!
//! There is no moment at which the money is moved and the record is not there, or the other way
//! round. So there is no lease to wait for after a crash, and no outcome that nobody knows: what
//! was not committed did not happen, and the next request with the key does it.
//!
//! ```sh
//! cargo run -p examples --bin transfer       # over transfer.db, here; or on a database server:
//! cargo run -p examples --features servers --bin transfer -- --store postgres://idem:idem@127.0.0.1/idem
//! cargo run -p examples --features servers --bin transfer -- --store mysql://idem:idem@127.0.0.1/idem
//!
//! # Twice: the second answer is a replay, and the money has moved once.
//! curl -i http://127.0.0.1:3007/transfers -H 'Idempotency-Key: rent-1' \
//!   -H 'Content-Type: application/json' -d '{"from":"alice","to":"bob","amount":250}'
//! curl -i http://127.0.0.1:3007/accounts
//! # More than there is: 422, and that is recorded, too.
//! curl -i http://127.0.0.1:3007/transfers -H 'Idempotency-Key: rent-2' \
//!   -H 'Content-Type: application/json' -d '{"from":"alice","to":"bob","amount":100000}'
//! ```
//!
//! # To kill it in the middle
//!
//! With `--stall` each transfer stops for good at a place, and the program says so and how to kill
//! it: `in-the-middle`, when one account is changed and the other is not; `before-commit`, when both
//! are and nothing is committed; `before-answer`, when all is committed and nobody has been told.
//!
//! ```sh
//! cargo run -p examples --bin transfer -- --stall in-the-middle
//! # In another terminal; it gets no answer.
//! curl -i http://127.0.0.1:3007/transfers -H 'Idempotency-Key: rent-3' \
//!   -H 'Content-Type: application/json' -d '{"from":"alice","to":"bob","amount":100}'
//! # The `kill -9` that it prints; and then, without `--stall`:
//! cargo run -p examples --bin transfer
//! # Nothing has moved. The retry moves it (after `before-answer` it has, and the retry is a replay).
//! curl -i http://127.0.0.1:3007/accounts
//! curl -i http://127.0.0.1:3007/transfers -H 'Idempotency-Key: rent-3' \
//!   -H 'Content-Type: application/json' -d '{"from":"alice","to":"bob","amount":100}'
//! curl -i http://127.0.0.1:3007/accounts
//! ```

use std::{future::Future, process::ExitCode};

use axum::{
    Json, Router,
    extract::{FromRef, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::{Parser, ValueEnum};
use examples::{Result, Server, StoreChoice, Switches, asked_to_stop};
use idem_runtime::{
    Idempotency, Scope, Tx, idempotent,
    store::{SqliteStore, Store},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{
    Database, Pool, Sqlite,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

/// What it does on `tx` is committed with the record of its answer. A refusal is an answer, too,
/// which a retry gets again although there may be money meanwhile: what was done is undone, and only
/// the record is committed.
#[idempotent(anchor = header("Idempotency-Key"), record = final, transaction)]
async fn transfer<DB: Bank>(
    State(app): State<App>,
    mut tx: Tx<DB>,
    Json(Transfer { from, to, amount }): Json<Transfer>,
) -> Result<(StatusCode, Json<Transfer>), Refused> {
    let by = i64::try_from(amount).ok().filter(|by| *by > 0 && from != to);
    let by = by.ok_or(Refused::Nonsense)?;
    // In the order of their names: two transfers between the same accounts, one each way, would
    // wait for each other.
    let mut changes = [(&from, -by), (&to, by)];
    changes.sort();
    for (change, (account, by)) in changes.into_iter().enumerate() {
        if change == 1 {
            app.stall(Stall::InTheMiddle).await;
        }
        if !DB::change(&mut tx, account, by).await? {
            let exists = DB::balance(&mut tx, account).await?.is_some();
            return Err(if exists { Refused::Overdraft } else { Refused::NoSuchAccount });
        }
    }
    app.stall(Stall::BeforeCommit).await;
    Ok((StatusCode::CREATED, Json(Transfer { from, to, amount })))
}

/// What is asked for, and what was done.
#[derive(Deserialize, Serialize)]
struct Transfer {
    from: String,
    to: String,
    /// In cents.
    amount: u64,
}

/// Why no money moved.
enum Refused {
    Nonsense,
    NoSuchAccount,
    Overdraft,
    Database(sqlx::Error),
}

impl From<sqlx::Error> for Refused {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let (status, code, message) = match self {
            Self::Nonsense => {
                let message = "some cents move from one account to another one";
                (StatusCode::UNPROCESSABLE_ENTITY, "nonsense", message)
            }
            Self::NoSuchAccount => {
                (StatusCode::NOT_FOUND, "no_such_account", "there is no such account")
            }
            Self::Overdraft => {
                let message = "there is not so much on the account";
                (StatusCode::UNPROCESSABLE_ENTITY, "overdraft", message)
            }
            // It says nothing of what happened, and so is not recorded: all of it is rolled back.
            Self::Database(error) => {
                eprintln!("the database: {error}");
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "try again")
            }
        };
        let body = json!({ "error": { "code": code, "message": message } });
        (status, Json(body)).into_response()
    }
}

/// The accounts, in a database of one kind. An application has one kind, and needs no such trait.
trait Bank: Database {
    /// Adds to what is on an account, unless less than nothing would be left or there is no such
    /// account; whether it did.
    fn change(
        connection: &mut Self::Connection,
        account: &str,
        by: i64,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// What is on an account.
    fn balance(
        connection: &mut Self::Connection,
        account: &str,
    ) -> impl Future<Output = sqlx::Result<Option<i64>>> + Send;

    /// What is on each.
    fn balances(pool: &Pool<Self>)
    -> impl Future<Output = sqlx::Result<Vec<(String, i64)>>> + Send;

    /// Opens the accounts.
    fn open(pool: &Pool<Self>) -> impl Future<Output = sqlx::Result<()>> + Send;
}

/// In words that all three databases know.
const OPEN: &str = "
    CREATE TABLE IF NOT EXISTS transfer_accounts (
        name VARCHAR(64) NOT NULL PRIMARY KEY,
        balance BIGINT NOT NULL CHECK (balance >= 0)
    );
    INSERT INTO transfer_accounts (name, balance)
        SELECT name, 1000 FROM (SELECT 'alice' AS name UNION ALL SELECT 'bob') AS opened
        WHERE name NOT IN (SELECT name FROM transfer_accounts);
";

/// The databases differ in how they number what is bound.
macro_rules! banks {
    ($($(#[$feature:meta])* $database:ty: $change:literal, $balance:literal;)*) => {$(
        $(#[$feature])*
        impl Bank for $database {
            async fn change(
                connection: &mut Self::Connection,
                account: &str,
                by: i64,
            ) -> sqlx::Result<bool> {
                let change = sqlx::query($change).bind(by).bind(account).bind(-by);
                Ok(change.execute(connection).await?.rows_affected() == 1)
            }

            async fn balance(
                connection: &mut Self::Connection,
                account: &str,
            ) -> sqlx::Result<Option<i64>> {
                sqlx::query_scalar($balance).bind(account).fetch_optional(connection).await
            }

            async fn balances(pool: &Pool<Self>) -> sqlx::Result<Vec<(String, i64)>> {
                let all = "SELECT name, balance FROM transfer_accounts ORDER BY name";
                sqlx::query_as(all).fetch_all(pool).await
            }

            async fn open(pool: &Pool<Self>) -> sqlx::Result<()> {
                sqlx::raw_sql(OPEN).execute(pool).await.map(drop)
            }
        }
    )*};
}

banks! {
    Sqlite:
        "UPDATE transfer_accounts SET balance = balance + ?1 WHERE name = ?2 AND balance >= ?3",
        "SELECT balance FROM transfer_accounts WHERE name = ?1";
    #[cfg(feature = "servers")]
    sqlx::Postgres:
        "UPDATE transfer_accounts SET balance = balance + $1 WHERE name = $2 AND balance >= $3",
        "SELECT balance FROM transfer_accounts WHERE name = $1";
    #[cfg(feature = "servers")]
    sqlx::MySql:
        "UPDATE transfer_accounts SET balance = balance + ? WHERE name = ? AND balance >= ?",
        "SELECT balance FROM transfer_accounts WHERE name = ?";
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    stall: Option<Stall>,
}

/// Where a transfer can stop for good, for whoever wants to kill it there.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stall {
    /// One account is changed, and the other is not.
    InTheMiddle,
    /// Both are changed, and nothing is committed.
    BeforeCommit,
    /// All is committed, and nobody has been told.
    BeforeAnswer,
}

impl App {
    async fn stall(&self, here: Stall) {
        if self.stall == Some(here) {
            println!("stalled: kill -9 {}", std::process::id());
            std::future::pending().await
        }
    }
}

/// Outside of the handler, which idem answers for.
async fn stall_before_answer(State(app): State<App>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    app.stall(Stall::BeforeAnswer).await;
    response
}

/// A bank that moves money between two accounts, exactly once
#[derive(Parser)]
struct Command {
    #[command(flatten)]
    switches: Switches,
    /// Stop each transfer for good at this place
    #[arg(long)]
    stall: Option<Stall>,
}

#[tokio::main]
async fn main() -> ExitCode {
    examples::exit(run(Command::parse()).await)
}

/// The accounts and idem's records are in one database, and idem works through the application's
/// pool.
async fn run(command: Command) -> Result<()> {
    let file = || StoreChoice::Sqlite("transfer.db".into());
    let choice = command.switches.store.clone().unwrap_or_else(file);
    match &choice {
        StoreChoice::Sqlite(path) => {
            let options = SqliteConnectOptions::new()
                .filename(path)
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full);
            let pool = SqlitePoolOptions::new().connect_with(options).await?;
            SqliteStore::create_tables(&pool).await?;
            let store = SqliteStore::from_pool(pool.clone()).await?;
            serve(command, &choice, pool, store).await
        }
        #[cfg(feature = "servers")]
        StoreChoice::Postgres(url) => {
            let pool = sqlx::PgPool::connect(url.as_str()).await?;
            let store = idem_runtime::store::PostgresStore::new(pool.clone());
            store.create_schema().await?;
            serve(command, &choice, pool, store).await
        }
        #[cfg(feature = "servers")]
        StoreChoice::MySql(url) => {
            let pool = sqlx::MySqlPool::connect(url.as_str()).await?;
            let store = idem_runtime::store::MySqlStore::new(pool.clone());
            store.create_schema().await?;
            serve(command, &choice, pool, store).await
        }
        other => {
            Err(format!("{other} has no transactions: use `sqlite:`, `postgres:` or `mysql:`")
                .into())
        }
    }
}

async fn serve<DB: Bank>(
    Command { switches, stall }: Command,
    choice: &StoreChoice,
    pool: Pool<DB>,
    store: impl Store,
) -> Result<()> {
    DB::open(&pool).await?;
    // The bank has one customer: whose key it is is no question.
    let idem = Idempotency::builder(store).scope(Scope::global()).build();
    let app = App { idem: idem.clone(), stall };
    let accounts = async move || match DB::balances(&pool).await {
        Ok(balances) => {
            let balances = balances.into_iter().map(|(name, balance)| (name, balance.into()));
            Ok(Json(Value::Object(balances.collect())))
        }
        Err(error) => Err(Refused::Database(error)),
    };
    let routes = Router::new()
        .route("/transfers", post(transfer::<DB>))
        .route_layer(middleware::from_fn_with_state(app.clone(), stall_before_answer))
        .route("/accounts", get(accounts))
        .with_state(app);
    let server = Server::bind(switches.port.unwrap_or(3007)).await?;
    println!("transfer listens on {}, accounts and records in {choice}", server.url());
    server.run(routes, &idem, asked_to_stop()).await?;
    Ok(())
}
