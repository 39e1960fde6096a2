//! A process that is killed: it serves `POST /pay` over a database file that it may share, and the
//! same under other policies for unknown outcomes as `/pay-or-refuse` and `/pay-or-recover`, and in
//! steps as `/pay-in-steps`.
//!
//! `till <database> <effects> <lease in milliseconds> [sealed]` prints its address, and then a line
//! whenever a handler stops for good. It ends when its standard input does.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    env,
    fs::{self, OpenOptions},
    io::{ErrorKind, Write},
    path::PathBuf,
    time::Duration,
};

use axum::{
    Router,
    extract::{FromRef, State},
    http::StatusCode,
    routing::post,
};
use idem_runtime::{
    Idempotency, KeyRing, Operation, Recovered, RequestContext, Scope, idempotent,
    store::SqliteStore,
};
use tokio::{io::AsyncReadExt, net::TcpListener};

#[derive(Clone)]
struct Till {
    engine: Idempotency,
    effects: PathBuf,
}

impl FromRef<Till> for Idempotency {
    fn from_ref(till: &Till) -> Self {
        till.engine.clone()
    }
}

impl Till {
    /// One line an effect, in a file of which no process has more than its end.
    fn happen(&self, operation: &Operation, body: &str) {
        let file = OpenOptions::new().append(true).create(true).open(&self.effects);
        let line = format!("{} {} {body}\n", operation.id(), operation.attempt());
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("a written effect");
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(State(till): State<Till>, operation: Operation, body: String) -> (StatusCode, String) {
    work(&till, &operation, &body).await
}

#[idempotent(anchor = header("Idempotency-Key"), on_unknown = refuse)]
async fn pay_or_refuse(
    State(till): State<Till>,
    operation: Operation,
    body: String,
) -> (StatusCode, String) {
    work(&till, &operation, &body).await
}

#[idempotent(anchor = header("Idempotency-Key"), on_unknown = recover = look_it_up)]
async fn pay_or_recover(
    State(till): State<Till>,
    operation: Operation,
    body: String,
) -> (StatusCode, String) {
    work(&till, &operation, &body).await
}

/// The effect is a step, of which a later attempt has the result.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay_in_steps(
    State(till): State<Till>,
    operation: Operation,
    body: String,
) -> (StatusCode, String) {
    let step = async {
        till.happen(&operation, &body);
        Ok::<_, std::convert::Infallible>(format!("receipt of attempt {}", operation.attempt()))
    };
    let receipt = operation.step("pay", step).await.expect("a recorded step");
    if body == "stop after" && operation.attempt() == 1 {
        println!("stopped");
        std::future::pending::<()>().await;
    }
    (StatusCode::CREATED, receipt)
}

/// Finds out whether an earlier attempt had its effect.
async fn look_it_up(request: RequestContext) -> Recovered {
    let Some(till) = request.state::<Till>() else { return Recovered::unknown() };
    let id = request.operation().id().to_string();
    match fs::read_to_string(&till.effects) {
        Ok(effects) if effects.lines().any(|line| line.starts_with(&id)) => {
            Recovered::answered((StatusCode::CREATED, format!("recovered {id}")))
        }
        Ok(_) => Recovered::never_happened(),
        Err(error) if error.kind() == ErrorKind::NotFound => Recovered::never_happened(),
        Err(_) => Recovered::unknown(),
    }
}

/// Stops for good where its body says, in the first attempt.
async fn work(till: &Till, operation: &Operation, body: &str) -> (StatusCode, String) {
    if body == "stop before" && operation.attempt() == 1 {
        println!("stopped");
        std::future::pending::<()>().await;
    }
    tokio::task::yield_now().await;
    till.happen(operation, body);
    if body == "stop after" && operation.attempt() == 1 {
        println!("stopped");
        std::future::pending::<()>().await;
    }
    (StatusCode::CREATED, format!("attempt {} of {}", operation.attempt(), operation.id()))
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let mut arguments = env::args().skip(1);
    let mut argument = || arguments.next().expect("an argument");
    let store = SqliteStore::open(argument()).await.expect("a store");
    let effects = argument().into();
    let lease = Duration::from_millis(argument().parse().expect("milliseconds"));
    let mut engine = Idempotency::builder(store).scope(Scope::header("X-API-Key")).lease(lease);
    if arguments.next().is_some_and(|word| word == "sealed") {
        engine = engine.seal(KeyRing::new(1, &[7; 32]));
    }
    let engine = engine.build();
    let app = Router::new()
        .route("/pay", post(pay))
        .route("/pay-or-refuse", post(pay_or_refuse))
        .route("/pay-or-recover", post(pay_or_recover))
        .route("/pay-in-steps", post(pay_in_steps))
        .with_state(Till { engine, effects });
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    println!("{}", listener.local_addr().expect("an address"));
    let (mut input, mut nothing) = (tokio::io::stdin(), Vec::new());
    tokio::select! {
        served = axum::serve(listener, app) => served.expect("a server"),
        _ = input.read_to_end(&mut nothing) => {}
    }
}
