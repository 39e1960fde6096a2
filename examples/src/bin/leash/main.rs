//! Payments by agents: prepared, signed elsewhere, submitted and confirmed, after the API of Leash.
//!
//! What it shows:
//!
//!  - One layer over the whole API: any POST may have an `Idempotency-Key`, and a retry with it
//!    gets the first answer as it was.
//!  - Two anchors on one route. A submission is idempotent on its event too, for ever: the same
//!    signed transaction again is a 200 with `replayed`, and nobody asks the chain; another one is
//!    refused. Layer and handler each have a record of their own, and both hold.
//!  - Event ids that need no key: they are derived from the operation, and are in the books before
//!    the answer is sent. Whoever lost an answer finds the event in the feed, and whoever has the
//!    id can submit from there, after whatever crash.
//!  - A key that is nobody's: a receipt is known by network and hash, whoever posts it (`scope =
//!    global`). Buyer and seller both do; the second is told that it is a duplicate by a response
//!    of its own (`replay = known`), in which there is nothing of the first's.
//!  - What goes on after the answer: a job asks the chain what became of a transaction, and
//!    webhooks are told of each phase. A phase and what is to be told of it are one write, so that
//!    a crash loses neither; deliveries are repeated until they are taken.
//!  - A receiver (`--receive`) that checks a signature before it looks anything up, and takes a
//!    delivery once for each webhook, event and phase.
//!  - Refusals that fit the document's rule for retries: of the 4xx only a 429 is worth another
//!    attempt, so that is what a duplicate of a running request gets.
//!
//! Where the document is silent: `Idempotency-Key` is a header; a key with more than 64 characters
//! is a 400. A route is a path as it was requested, so an agent's receipts are a route of their
//! own. All that a handler decided is replayed under a key, its refusals included
//! (`Recording::Final`); after a 429 or a 5xx the same key runs again, and so it does where it was
//! the event that refused. What the chain refuses (422) leaves the event prepared, for another
//! transaction; what it leaves open (502) does not. Who submits to the event of another API key is
//! told that there is none. Receipts that are read by their owner are pulled by that, once. Phases
//! of one event may arrive in another order than they came. `X-Leash-Signature` is `t=…,v1=…`: Unix
//! seconds, and the HMAC-SHA-256 of those, a dot and the body, in hexadecimal digits, under a
//! secret that the subscriber chose. Without a key, a repeated subscription is a second webhook. A
//! signed transaction is what was prepared, a dot and any text; the signature by which the chain
//! knows it is its SHA-256.
//!
//! `/_downstream` (the chain) and `/_effects` are aids of the demonstration. With `--store
//! sqlite:PATH` the events are in a file beside idem's records, and outlive this process; with any
//! other store they do with `--books`. What the chain did outlives it with `--ledger`.
//!
//! ```sh
//! cargo run -p examples --bin leash    # `-- --time-scale 8640` makes the 24 hours ten seconds
//!
//! # A receiver, in another terminal; and its subscription.
//! cargo run -p examples --bin leash -- --receive whsec_0123456789
//! curl -i http://127.0.0.1:3005/v1/webhooks -H 'X-API-Key: buyer-1' \
//!   -H 'Idempotency-Key: hooks-1' -H 'Content-Type: application/json' \
//!   -d '{"url":"http://127.0.0.1:3006/hooks","secret":"whsec_0123456789"}'
//!
//! # Twice with one key: one event. Another amount under this key: 409.
//! curl -i http://127.0.0.1:3005/v1/prepare -H 'X-API-Key: buyer-1' \
//!   -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' \
//!   -d '{"agent":"scout","network":"solana","to":"seller","amount":2500}'
//! EVENT=$(curl -s http://127.0.0.1:3005/v1/prepare -H 'X-API-Key: buyer-1' \
//!   -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' \
//!   -d '{"agent":"scout","network":"solana","to":"seller","amount":2500}' | cut -d'"' -f4)
//! curl -i http://127.0.0.1:3005/v1/prepare -H 'X-API-Key: buyer-1' \
//!   -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' \
//!   -d '{"agent":"scout","network":"solana","to":"seller","amount":9900}'
//!
//! # Submitted: 202. The same again: 200, replayed. Another transaction: 409.
//! curl -i http://127.0.0.1:3005/v1/submit -H 'X-API-Key: buyer-1' \
//!   -H 'Content-Type: application/json' \
//!   -d '{"event_id":"'$EVENT'","signed_transaction":"solana:'$EVENT':scout:seller:2500.5igned"}'
//! curl -i http://127.0.0.1:3005/v1/submit -H 'X-API-Key: buyer-1' \
//!   -H 'Content-Type: application/json' \
//!   -d '{"event_id":"'$EVENT'","signed_transaction":"solana:'$EVENT':scout:seller:2500.0ther"}'
//!
//! # What became of it; after ten seconds it is confirmed.
//! curl -i http://127.0.0.1:3005/v1/events/$EVENT -H 'X-API-Key: buyer-1'
//! curl -i 'http://127.0.0.1:3005/v1/events?agent=scout' -H 'X-API-Key: buyer-1'
//!
//! # One receipt, whoever posts it.
//! curl -i http://127.0.0.1:3005/v1/receipts/scout -H 'X-API-Key: buyer-1' \
//!   -H 'Content-Type: application/json' \
//!   -d '{"network":"solana","receipt_hash":"2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"}'
//! curl -i http://127.0.0.1:3005/v1/receipts/scout -H 'X-API-Key: seller-1' \
//!   -H 'Content-Type: application/json' \
//!   -d '{"network":"solana","receipt_hash":"2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"}'
//! curl -i http://127.0.0.1:3005/v1/receipts/scout -H 'X-API-Key: buyer-1'
//!
//! # What really happened. (At the receiver: the same on port 3006.)
//! curl -i http://127.0.0.1:3005/_effects
//! ```

mod books;
mod callers;
mod errors;
mod jobs;
mod receiver;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use alloy_primitives::B256;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{FromRef, FromRequest, FromRequestParts, Path, Query, State},
    http::{
        self, HeaderValue, StatusCode,
        header::{CACHE_CONTROL, CONTENT_TYPE, VARY},
    },
    response::IntoResponse,
    routing::{get, post},
};
use clap::Parser;
use examples::{Downstream, Server, StoreChoice, Switches, asked_to_stop};
use idem_runtime::{
    Anchor, Format, Idempotency, Operation, Policy, REPLAYED, Recording, Scope, idempotent,
};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    books::{Begun, Books, Filter, Network, Subject},
    callers::{API_KEY, API_KEYS, Caller},
    errors::{Error, body_refusals, refusals},
};

/// How every POST of this API is idempotent: what was decided is answered again, whatever it was.
const KEYED: Policy =
    Policy::new(Anchor::header("Idempotency-Key").format(Format::text(1..=64)).optional())
        .record(Recording::Final);

/// How long an answer is replayed under an `Idempotency-Key`.
const WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// How soon after a crash the keys of running requests are free again.
const LEASE: Duration = Duration::from_secs(5);

/// The key of a submission: the event, for ever.
const EVENT: Anchor = Anchor::body_field("event_id").format(Format::Uuid).forever();

/// The key of a receipt, whoever posts it.
const RECEIPT: Anchor = Anchor::all(&[
    Anchor::body_field("network"),
    Anchor::body_field("receipt_hash").format(Format::Hex(32)),
])
.space("receipts")
.scope(Scope::global())
.forever();

async fn prepare(
    caller: Caller,
    State(app): State<App>,
    operation: Operation,
    Payload(Transfer { agent, network, to, amount }): Payload<Transfer>,
) -> Result<(StatusCode, Json<Prepared>), Error> {
    // Every attempt prepares the same event.
    let event_id = operation.derive("event").as_uuid();
    let transaction = format!("{}:{event_id}:{agent}:{to}:{amount}", network.name());
    let subject = Subject::Transaction(&transaction);
    if app.books.begin(caller, event_id, Begun { agent: &agent, network, subject }).await? {
        app.chain.happened("events");
    }
    Ok((StatusCode::CREATED, Json(Prepared { event_id, phase: "prepared", transaction })))
}

/// One transaction for each event. That the event is the caller's is decided by the scope, in which
/// others have recorded nothing, and then by the books.
#[idempotent(
    anchor = EVENT,
    fingerprint = body_field("signed_transaction"),
    replay(status = 200, merge = { replayed: true }),
    refusals = body_refusals
)]
async fn submit(
    caller: Caller,
    State(app): State<App>,
    Payload(Signed { event_id, signed_transaction }): Payload<Signed>,
) -> Result<(StatusCode, Json<Submitted>), Error> {
    let event = app.books.find(caller, event_id).await?.ok_or(Error::NO_EVENT)?;
    let transaction = event["transaction"].as_str().ok_or(Error::NO_EVENT)?;
    let signed = signed_transaction.strip_prefix(transaction);
    if signed.and_then(|rest| rest.strip_prefix('.')).is_none_or(str::is_empty) {
        return Err(Error::invalid("`signed_transaction` is not what was prepared, signed"));
    }
    // A transaction is known by what was signed, as chains have it: however often these bytes are
    // broadcast, they are one. So there is no need of a derived key.
    let signature = hex::encode(Sha256::digest(&signed_transaction));
    match event["phase"].as_str() {
        Some("prepared") => {
            app.chain.call("transactions", &signature).await?;
            let wait = app.switches.scaled(jobs::FINAL_AFTER);
            app.books.submit(event_id, &signature, wait).await?;
        }
        // An attempt before this one came so far.
        _ if event["signature"] == *signature => {}
        _ => return Err(Error::ALREADY_SUBMITTED),
    }
    Ok((StatusCode::ACCEPTED, Json(Submitted { event_id, signature })))
}

/// Each receipt is one event, of whoever posted it first; everybody else is told that it is known,
/// and nothing else.
#[idempotent(
    anchor = RECEIPT,
    fingerprint = none,
    replay = known,
    refusals = body_refusals
)]
async fn publish(
    caller: Caller,
    State(app): State<App>,
    InPath(agent): InPath<String>,
    operation: Operation,
    Payload(Receipt { network, receipt_hash }): Payload<Receipt>,
) -> Result<(StatusCode, Json<Published>), Error> {
    let id = operation.derive("event").as_uuid();
    let subject = Subject::Receipt(receipt_hash);
    let new = app.books.begin(caller, id, Begun { agent: &agent, network, subject }).await?;
    if new {
        app.chain.happened("receipts");
    }
    // After a crash the next attempt may be somebody else's.
    if new || app.books.find(caller, id).await?.is_some() {
        return Ok((StatusCode::CREATED, Json(Published { duplicate: false, event_id: Some(id) })));
    }
    Ok((StatusCode::OK, Json(Published { duplicate: true, event_id: None })))
}

/// A response of its own, so that there is nothing in it of who was first.
fn known(_: http::Response<Bytes>) -> http::Response<Bytes> {
    let mut response =
        http::Response::new(Bytes::from_static(br#"{"duplicate":true,"event_id":null}"#));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    response
}

/// Without a key, each request subscribes once more, and that webhook is told everything too.
async fn subscribe(
    caller: Caller,
    State(app): State<App>,
    operation: Operation,
    Payload(Subscription { url, secret }): Payload<Subscription>,
) -> Result<(StatusCode, Json<Value>), Error> {
    let here = |url: &Url| {
        url.scheme() == "http" && matches!(url.host_str(), Some("127.0.0.1" | "localhost"))
    };
    if !url.parse().is_ok_and(|url| here(&url)) {
        return Err(Error::invalid("`url` is not http on 127.0.0.1"));
    }
    if secret.len() < 16 {
        return Err(Error::invalid("`secret` has fewer than 16 characters"));
    }
    let id = operation.derive("webhook").as_uuid();
    app.books.subscribe(caller, id, &url, &secret).await?;
    Ok((StatusCode::CREATED, Json(json!({ "webhook_id": id, "url": url }))))
}

async fn show_event(
    caller: Caller,
    State(app): State<App>,
    InPath(id): InPath<Uuid>,
) -> Result<impl IntoResponse, Error> {
    let event = app.books.find(caller, id).await?.ok_or(Error::NO_EVENT)?;
    // For as long as clients are asked to wait before they look again.
    let cached = [(CACHE_CONTROL, "private, max-age=5"), (VARY, "x-api-key")];
    Ok((cached, Json(event)))
}

async fn list_events(
    caller: Caller,
    State(app): State<App>,
    InQuery(filter): InQuery<Filter>,
) -> Result<Json<Value>, Error> {
    Ok(Json(json!({ "data": app.books.list(caller, &filter).await? })))
}

/// By state: what was pulled stays so, and is shown again.
async fn pull(
    caller: Caller,
    State(app): State<App>,
    InPath(agent): InPath<String>,
) -> Result<Json<Value>, Error> {
    Ok(Json(json!({ "data": app.books.pull(caller, &agent).await? })))
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    chain: Downstream,
    books: Books,
    switches: Switches,
}

#[derive(Deserialize)]
struct Transfer {
    agent: String,
    network: Network,
    to: String,
    /// In the token's smallest unit.
    amount: u64,
}

#[derive(Serialize)]
struct Prepared {
    event_id: Uuid,
    phase: &'static str,
    /// What is to be signed.
    transaction: String,
}

#[derive(Deserialize)]
struct Signed {
    event_id: Uuid,
    signed_transaction: String,
}

#[derive(Serialize)]
struct Submitted {
    event_id: Uuid,
    signature: String,
}

#[derive(Deserialize)]
struct Receipt {
    network: Network,
    receipt_hash: B256,
}

#[derive(Serialize)]
struct Published {
    duplicate: bool,
    event_id: Option<Uuid>,
}

#[derive(Deserialize)]
struct Subscription {
    url: String,
    /// What deliveries are signed with. The subscriber says it, so that it is in no answer, and so
    /// in no record.
    secret: String,
}

/// A JSON body, turned away in this API's words.
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Error))]
struct Payload<T>(T);

/// A parameter of the path, likewise.
#[derive(FromRequestParts)]
#[from_request(via(Path), rejection(Error))]
struct InPath<T>(T);

/// The query, likewise.
#[derive(FromRequestParts)]
#[from_request(via(Query), rejection(Error))]
struct InQuery<T>(T);

/// Payments by agents, after the API of Leash
#[derive(Parser)]
struct Command {
    #[command(flatten)]
    switches: Switches,
    /// A database file for the events and webhooks [default: beside idem's records, or none where
    /// those are no file]
    #[arg(long, value_name = "PATH")]
    books: Option<PathBuf>,
    /// A file in which the simulated chain, or what a receiver books in, remembers what it did
    #[arg(long, value_name = "PATH")]
    ledger: Option<PathBuf>,
    /// Be a receiver of webhooks instead, at /hooks, whose deliveries are signed with this secret;
    /// its port is 3006 by default
    #[arg(long, value_name = "SECRET")]
    receive: Option<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    examples::exit(run(Command::parse()).await)
}

async fn run(Command { switches, books, ledger, receive }: Command) -> examples::Result<()> {
    let store = switches.store.clone().unwrap_or(StoreChoice::Memory);
    let engine = Idempotency::builder(store.open().await?).lease(LEASE);
    let downstream = match ledger {
        Some(ledger) => Downstream::open(&ledger)?,
        None => Downstream::default(),
    };
    if let Some(secret) = receive {
        let engine = engine.scope(Scope::global()).build();
        let server = Server::bind(switches.port.unwrap_or(3006)).await?;
        println!("leash receives on {}, at /hooks, records in {store}", server.url());
        let app = receiver::routes(engine.clone(), downstream, &secret);
        return Ok(server.run(app, &engine, asked_to_stop()).await?);
    }

    let ttl = switches.scaled(WINDOW);
    // No answer names its operation: a receipt's is the first poster's. Here events are what one
    // asks about.
    let engine = engine.scope(API_KEY).ttl(ttl).refusals(refusals).operation_header(None).build();
    let server = Server::bind(switches.port.unwrap_or(3005)).await?;
    let books = Books::open(books, &store).await?;
    let app = App { idem: engine.clone(), chain: downstream, books, switches };
    tokio::spawn(jobs::confirm(app.clone()));
    tokio::spawn(jobs::deliver(app.clone(), jobs::client()?));
    println!("leash listens on {}, records in {store}", server.url());
    for (key, id) in API_KEYS {
        println!("X-API-Key: {key}   ({id})");
    }
    server.run(routes(app), &engine, asked_to_stop()).await?;
    Ok(())
}

fn routes(app: App) -> Router {
    Router::new()
        .route("/v1/prepare", post(prepare))
        .route("/v1/submit", post(submit))
        .route("/v1/receipts/{agent}", get(pull).post(publish))
        .route("/v1/webhooks", post(subscribe))
        .route("/v1/events", get(list_events))
        .route("/v1/events/{id}", get(show_event))
        .route_layer(app.idem.layer(KEYED))
        .merge(app.chain.routes())
        .with_state(app)
}
