//! A launchpad for pools and tokens, after the API of Pirate.
//!
//! What it shows:
//!
//!  - One declaration for all write routes of an API. They share one *space*, so that a key names
//!    one request to the API and not one to each route: sent to another route it is a mismatch,
//!    like another body.
//!  - An optional key: without it, two equal requests run twice.
//!  - Refusals in the API's own words. All of them that are conflicts have the API's only code for
//!    that, `conflict`: another body, another route, and a duplicate of a request that is running.
//!  - A scope that a layer finds: the principal behind the bearer token.
//!
//! Two sentences of the document exclude each other: if the API key and the body's hash were the
//! look-up key, then the request with another body, which is to be refused, would look up another
//! record and run; and `Idempotency-Key` would be for nothing. So here the look-up key is the API
//! key and the `Idempotency-Key`, and the body's SHA-256 is the fingerprint that is compared.
//!
//! Where the document is silent: answers are kept for 24 hours. All that the server decided are,
//! refusals of its own included (`Recording::Final`); after a 5xx the same key runs again. Any key
//! of up to 255 visible characters is taken. Claiming fees that were claimed, an airdrop's
//! configuration that exists, and a mint that is taken are the other 409s.
//!
//! ```sh
//! cargo run -p examples --bin pirate   # `-- --time-scale 8640` makes the 24 hours ten seconds
//!
//! # Twice: the same bytes. Without the Idempotency-Key: two pools.
//! curl -i http://127.0.0.1:3002/v2/pools -H 'Authorization: Bearer blackbeard' \
//!   -H 'Idempotency-Key: 5f3e2c8a-1d1d-4f9b-a2c2-9a1b2c3d4e5f' \
//!   -H 'Content-Type: application/json' -d '{"name":"Doubloon","external_uid":"ledger-7"}'
//! # The same key for another body, and on another route: 409 `conflict`.
//! curl -i http://127.0.0.1:3002/v2/pools -H 'Authorization: Bearer blackbeard' \
//!   -H 'Idempotency-Key: 5f3e2c8a-1d1d-4f9b-a2c2-9a1b2c3d4e5f' \
//!   -H 'Content-Type: application/json' -d '{"name":"Florin"}'
//! curl -i http://127.0.0.1:3002/v2/tokens -H 'Authorization: Bearer blackbeard' \
//!   -H 'Idempotency-Key: 5f3e2c8a-1d1d-4f9b-a2c2-9a1b2c3d4e5f' \
//!   -H 'Content-Type: application/json' -d '{"name":"Doubloon","symbol":"DBL"}'
//!
//! # The other writes. A pool with the address POOL_ADDRESS is there from the start.
//! curl -i http://127.0.0.1:3002/v2/pools/POOL_ADDRESS/fee-claims \
//!   -H 'Authorization: Bearer blackbeard' -H 'Idempotency-Key: claim-1' \
//!   -H 'Content-Type: application/json' \
//!   -d '{"kind":"dbc","payer":"WALLET_PUBKEY","mode":"unsigned"}'
//! curl -i http://127.0.0.1:3002/v2/airdrops -H 'Authorization: Bearer blackbeard' \
//!   -H 'Idempotency-Key: airdrop-1' \
//!   -H 'Content-Type: application/json' -d '{"mint":"MINT","authority":"WALLET_PUBKEY"}'
//! curl -i http://127.0.0.1:3002/v2/transactions -H 'Authorization: Bearer blackbeard' \
//!   -H 'Idempotency-Key: submit-1' \
//!   -H 'Content-Type: application/json' -d '{"transaction":"AQAB"}'
//!
//! # Reads, and what really happened.
//! curl -i 'http://127.0.0.1:3002/v2/pools?external_uid=ledger-7' \
//!   -H 'Authorization: Bearer blackbeard'
//! curl -i http://127.0.0.1:3002/_effects
//! ```

use std::{
    borrow::Cow,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{FromRef, FromRequest, Path, Query, Request, State, rejection::JsonRejection},
    http::{self, StatusCode, header::AUTHORIZATION},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use clap::Parser;
use examples::{Downstream, Failure, Server, StoreChoice, Switches, asked_to_stop};
use idem_runtime::{
    Anchor, AnchorError, Idempotency, Operation, Recording, Refusal, RefusalKind, Scope, Values,
    idempotent,
};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

/// How each write of this API is idempotent.
const IDEMPOTENCY_KEY: Anchor = Anchor::header("Idempotency-Key").space("pirate").optional();

/// Whose keys are: the owner of the API key, whom `authenticate` has found.
const PRINCIPAL: Scope = Scope::custom(|request| {
    let Principal(name) =
        request.extensions().get().ok_or(AnchorError::missing("the API key's owner"))?;
    Ok(Values::from_iter([name]))
});

/// How long an answer is replayed.
const WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

#[idempotent(anchor = IDEMPOTENCY_KEY)]
async fn create_pool(
    Extension(caller): Extension<Principal>,
    State(app): State<App>,
    operation: Operation,
    Payload(NewPool { name, external_uid }): Payload<NewPool>,
) -> Written {
    // Every attempt makes the same pool.
    let address = operation.derive("pool").short();
    app.chain.call_at(&address, "pools", operation.derive("chain")).await?;
    let pool = json!({ "address": address, "name": name, "external_uid": external_uid });
    app.keep("pools", caller, &pool);
    Ok((StatusCode::CREATED, Json(pool)))
}

#[idempotent(anchor = IDEMPOTENCY_KEY)]
async fn create_token(
    Extension(caller): Extension<Principal>,
    State(app): State<App>,
    operation: Operation,
    Payload(NewToken { name, symbol, mint, external_uid }): Payload<NewToken>,
) -> Written {
    let mint = mint.unwrap_or_else(|| operation.derive("mint").short());
    app.chain.call_at(&mint, "tokens", operation.derive("chain")).await?;
    let token =
        json!({ "mint": mint, "name": name, "symbol": symbol, "external_uid": external_uid });
    app.keep("tokens", caller, &token);
    Ok((StatusCode::CREATED, Json(token)))
}

#[idempotent(anchor = IDEMPOTENCY_KEY)]
async fn create_airdrop(
    Extension(caller): Extension<Principal>,
    State(app): State<App>,
    operation: Operation,
    Payload(NewAirdrop { mint, authority, external_uid }): Payload<NewAirdrop>,
) -> Written {
    // Made from its seeds: the same ones lead to the same address, and there it is already.
    let seeds = json!([mint, authority]).to_string();
    let config = Uuid::new_v5(&Uuid::NAMESPACE_OID, seeds.as_bytes());
    app.chain.call_at(config, "airdrops", operation.derive("chain")).await?;
    let airdrop = json!({
        "config": config, "mint": mint, "authority": authority, "external_uid": external_uid,
    });
    app.keep("airdrops", caller, &airdrop);
    Ok((StatusCode::CREATED, Json(airdrop)))
}

#[idempotent(anchor = IDEMPOTENCY_KEY)]
async fn claim_fees(
    Extension(caller): Extension<Principal>,
    State(app): State<App>,
    Path(pool): Path<String>,
    operation: Operation,
    Payload(FeeClaim { kind, payer, mode }): Payload<FeeClaim>,
) -> Written {
    app.find("pools", "address", &pool)?;
    // Nobody trades here: what has accrued can be claimed once.
    app.chain.call_at(&pool, "fee_claims", operation.derive("chain")).await?;
    let transaction = operation.derive("transaction").short();
    let claim = json!({
        "pool": pool, "kind": kind, "payer": payer, "mode": mode, "transaction": transaction,
    });
    app.keep("fee_claims", caller, &claim);
    Ok((StatusCode::CREATED, Json(claim)))
}

#[idempotent(anchor = IDEMPOTENCY_KEY)]
async fn submit_transaction(
    Extension(caller): Extension<Principal>,
    State(app): State<App>,
    operation: Operation,
    Payload(Submission { transaction }): Payload<Submission>,
) -> Written {
    app.chain.call("broadcasts", operation.derive("chain")).await?;
    let signature = Uuid::new_v5(&Uuid::NAMESPACE_OID, transaction.as_bytes()).simple();
    let submitted = json!({ "signature": signature.to_string() });
    app.keep("transactions", caller, &submitted);
    Ok((StatusCode::ACCEPTED, Json(submitted)))
}

/// What a write comes to.
type Written = Result<(StatusCode, Json<Value>), Error>;

#[derive(Deserialize)]
struct NewPool {
    name: String,
    external_uid: Option<String>,
}

#[derive(Deserialize)]
struct NewToken {
    name: String,
    symbol: String,
    mint: Option<String>,
    external_uid: Option<String>,
}

#[derive(Deserialize)]
struct NewAirdrop {
    mint: String,
    authority: String,
    external_uid: Option<String>,
}

#[derive(Deserialize)]
struct FeeClaim {
    kind: String,
    payer: String,
    mode: String,
}

#[derive(Deserialize)]
struct Submission {
    transaction: String,
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    chain: Downstream,
    objects: Arc<Mutex<Vec<Object>>>,
}

/// Something that was written.
#[derive(PartialEq)]
struct Object {
    kind: &'static str,
    owner: Principal,
    shown: Value,
}

impl App {
    /// Keeps what was written; once, should an attempt be made again.
    fn keep(&self, kind: &'static str, owner: Principal, shown: &Value) {
        let object = Object { kind, owner, shown: shown.clone() };
        let mut objects = self.objects();
        if !objects.contains(&object) {
            objects.push(object);
        }
    }

    fn find(&self, kind: &str, name: &str, value: &str) -> Result<Value, Error> {
        let objects = self.objects();
        let found = objects.iter().find(|it| it.kind == kind && it.shown[name] == value);
        found
            .map(|it| it.shown.clone())
            .ok_or(Error(StatusCode::NOT_FOUND, "it does not exist".into()))
    }

    fn objects(&self) -> MutexGuard<'_, Vec<Object>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn show_pool(
    State(app): State<App>,
    Path(address): Path<String>,
) -> Result<Json<Value>, Error> {
    app.find("pools", "address", &address).map(Json)
}

/// The caller's own objects of a kind; what `external_uid` is for.
fn list(kind: &'static str) -> MethodRouter<App> {
    get(
        async move |Extension(caller): Extension<Principal>,
                    State(app): State<App>,
                    Query(filter): Query<ByUid>| {
            let objects = app.objects();
            let own = objects.iter().filter(|it| it.kind == kind && it.owner == caller);
            let wanted = |shown: &&Value| match &filter.external_uid {
                Some(uid) => shown["external_uid"] == **uid,
                None => true,
            };
            let shown: Vec<_> = own.map(|it| &it.shown).filter(wanted).cloned().collect();
            Json(json!({ "data": shown }))
        },
    )
}

#[derive(Deserialize)]
struct ByUid {
    external_uid: Option<String>,
}

/// The owner of an API key.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Principal(&'static str);

/// The API keys of the demonstration. They are their owners' names; a real server looks up the
/// hash of a secret.
const API_KEYS: [&str; 2] = ["blackbeard", "bonny"];

/// Runs before anything else: whoever is not known learns nothing, least of all a replay.
async fn authenticate(mut request: Request, next: Next) -> Result<Response, Error> {
    let sent = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = sent
        .and_then(|sent| sent.split_once(' '))
        .and_then(|(scheme, token)| scheme.eq_ignore_ascii_case("Bearer").then_some(token.trim()));
    let known = API_KEYS.iter().find(|key| Some(**key) == token);
    let owner = known.ok_or(Error(StatusCode::UNAUTHORIZED, "send a known API key".into()))?;
    request.extensions_mut().insert(Principal(owner));
    Ok(next.run(request).await)
}

/// A JSON body, turned away in this API's words.
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Error))]
struct Payload<T>(T);

/// An error, as this API tells it; the code follows from the status.
#[derive(Debug)]
struct Error(StatusCode, Cow<'static, str>);

fn code(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "unauthorized",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::CONFLICT => "conflict",
        StatusCode::UNPROCESSABLE_ENTITY => "unprocessable",
        StatusCode::BAD_GATEWAY => "chain_unavailable",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        status if status.is_server_error() => "internal",
        _ => "bad_request",
    }
}

fn document(status: StatusCode, message: &str) -> Value {
    json!({ "error": { "code": code(status), "message": message } })
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let Self(status, message) = self;
        (status, Json(document(status, &message))).into_response()
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            _ if failure.is_conflict() => Self(StatusCode::CONFLICT, "it is on the chain".into()),
            _ if failure.is_refusal() => {
                Self(StatusCode::UNPROCESSABLE_ENTITY, "the chain refuses it".into())
            }
            _ => Self(StatusCode::BAD_GATEWAY, "nobody knows what the chain did".into()),
        }
    }
}

impl From<JsonRejection> for Error {
    fn from(rejection: JsonRejection) -> Self {
        Self(rejection.status(), rejection.body_text().into())
    }
}

/// What idem refuses, in the same words.
fn refusals(refusal: &Refusal) -> http::Response<Bytes> {
    let (status, message) = match refusal.kind() {
        RefusalKind::Mismatch => {
            (StatusCode::CONFLICT, "this Idempotency-Key was used for a different request")
        }
        // The effect is done and protected; this API has one code for "not again".
        RefusalKind::NotReplayable => (StatusCode::CONFLICT, refusal.detail()),
        kind => (kind.status(), refusal.detail()),
    };
    refusal.json(status, &document(status, message))
}

/// A launchpad for pools and tokens, after the API of Pirate
#[derive(Parser)]
struct Command {
    #[command(flatten)]
    switches: Switches,
}

#[tokio::main]
async fn main() -> ExitCode {
    examples::exit(run(Command::parse().switches).await)
}

async fn run(switches: Switches) -> examples::Result<()> {
    let store = switches.store.clone().unwrap_or(StoreChoice::Memory);
    let engine = Idempotency::builder(store.open().await?)
        .scope(PRINCIPAL)
        .ttl(switches.scaled(WINDOW))
        .record(Recording::Final)
        .refusals(refusals)
        .build();
    let app = App { idem: engine.clone(), chain: Downstream::default(), objects: Arc::default() };
    app.keep("pools", Principal(API_KEYS[0]), &json!({ "address": "POOL_ADDRESS" }));
    let routes = Router::new()
        .route("/v2/pools", list("pools").post(create_pool))
        .route("/v2/pools/{address}", get(show_pool))
        .route("/v2/pools/{address}/fee-claims", post(claim_fees))
        .route("/v2/airdrops", list("airdrops").post(create_airdrop))
        .route("/v2/tokens", list("tokens").post(create_token))
        .route("/v2/transactions", list("transactions").post(submit_transaction))
        .route_layer(middleware::from_fn(authenticate))
        .merge(app.chain.routes())
        .with_state(app);

    let server = Server::bind(switches.port.unwrap_or(3002)).await?;
    println!("pirate listens on {}, records in {store}", server.url());
    for key in API_KEYS {
        println!("Authorization: Bearer {key}");
    }
    server.run(routes, &engine, asked_to_stop()).await?;
    Ok(())
}
