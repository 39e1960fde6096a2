//! A process that is killed in a transactional handler: it serves `POST /` over a database that it
//! may share, and adds one row to the table `deposits` for each request that it does.
//!
//! `vault <URL of the database>` prints its address, and then a line whenever a request stops for
//! good where its body says. It ends when its standard input does.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{env, pin::pin, thread};

use axum::{Router, body::Body, http::StatusCode, response::Response, routing::post};
use bytes::Bytes;
use futures_util::stream;
use idem_runtime::{Event, Idempotency, Outcome, Scope, Tx, idempotent, store::SqliteStore};
use sqlx::{Sqlite, SqliteConnection, SqlitePool};
use tokio::{io::AsyncReadExt, net::TcpListener};

fn stop() {
    println!("stopped");
}

async fn stop_if(body: &str, place: &str) {
    if body == place {
        stop();
        std::future::pending::<()>().await;
    }
}

/// Its body comes to no end if the request says so: nothing is recorded before it has.
fn answer(body: String) -> Response {
    let mut answer = match body.as_str() {
        "before the commit" => {
            let endless = stream::once(async move {
                stop_if(&body, "before the commit").await;
                Ok::<_, std::io::Error>(Bytes::new())
            });
            Response::new(Body::from_stream(endless))
        }
        _ => Response::new(Body::from(body)),
    };
    *answer.status_mut() = StatusCode::CREATED;
    answer
}

/// Stops the process between the commit and the answer.
fn observe(event: &Event<'_>) {
    if event.outcome == Outcome::Recorded && env::args().nth(2).is_some() {
        stop();
        loop {
            thread::park();
        }
    }
}

macro_rules! deposit {
    ($name:ident, $database:ty, $connection:ty) => {
        #[idempotent(anchor = header("Idempotency-Key"), scope = global, transaction)]
        async fn $name(mut tx: Tx<$database>, body: String) -> Response {
            stop_if(&body, "before the effect").await;
            let connection: &mut $connection = &mut tx;
            sqlx::raw_sql("INSERT INTO deposits (what) VALUES ('deposit')")
                .execute(connection)
                .await
                .expect("a row");
            stop_if(&body, "after the effect").await;
            answer(body)
        }
    };
}

deposit!(in_sqlite, Sqlite, SqliteConnection);
#[cfg(feature = "servers")]
deposit!(in_postgres, sqlx::Postgres, sqlx::PgConnection);
#[cfg(feature = "servers")]
deposit!(in_mysql, sqlx::MySql, sqlx::MySqlConnection);

async fn router(url: &str) -> Router {
    macro_rules! serve {
        ($store:expr, $deposit:ident) => {{
            let engine = Idempotency::builder($store).scope(Scope::global()).observer(observe);
            Router::new().route("/", post($deposit)).with_state(engine.build())
        }};
    }
    match url.split(':').next() {
        #[cfg(feature = "servers")]
        Some("postgres") => {
            let pool = sqlx::PgPool::connect_lazy(url).expect("a URL");
            serve!(idem_runtime::store::PostgresStore::new(pool), in_postgres)
        }
        #[cfg(feature = "servers")]
        Some("mysql") => {
            let pool = sqlx::MySqlPool::connect_lazy(url).expect("a URL");
            serve!(idem_runtime::store::MySqlStore::new(pool), in_mysql)
        }
        _ => {
            let pool = SqlitePool::connect(url).await.expect("a database");
            serve!(SqliteStore::from_pool(pool).await.expect("a store"), in_sqlite)
        }
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let url = env::args().nth(1).expect("a URL");
    let app = router(&url).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    println!("{}", listener.local_addr().expect("an address"));
    let (mut input, mut nothing) = (tokio::io::stdin(), Vec::new());
    let served = pin!(async move { axum::serve(listener, app).await });
    tokio::select! {
        served = served => served.expect("a server"),
        _ = input.read_to_end(&mut nothing) => {}
    }
}
