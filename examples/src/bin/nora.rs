//! An on- and off-ramp between money and tokens, after the API of Nora.
//!
//! What it shows:
//!
//!  - An optional key that must be a UUID, per endpoint and per API key, whose answer is replayed
//!    *whatever the body says now* (`fingerprint = none`): that is what this API documents, and
//!    why it tells its clients to mint a new key when the user edits the form.
//!  - An operation whose key is not sent at all: a burn is approved once for each *intent*, within
//!    the *instance* that owns it, and the transaction's signature is what may not change. So two
//!    API keys of one instance cannot approve one burn with two signatures. When the chain refuses
//!    a signature (its blockhash has expired), the intent is free for the next one; when nobody
//!    knows what the chain did, it is not: only the same signature may be sent again.
//!  - Writes that need no idem: a unique `cpf`, a wallet that is replaced in place.
//!
//! Where the document is silent: the window is 24 hours; a key that is no UUID is a 400; a
//! duplicate of a running request, and a second signature, are a 409; an intent of another
//! instance, like one that never was, is a 404; what the downstream refuses is a 422, and what it
//! leaves open is a 502.
//!
//! ```sh
//! cargo run -p examples --bin nora     # `-- --time-scale 8640` makes the window ten seconds
//!
//! # Twice: the second is a replay. With another body too, and with the key in upper case.
//! curl -i http://127.0.0.1:3001/v2/intents/onramp -H 'X-API-Key: acme-sandbox-1' \
//!   -H 'idempotency-key: 0b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d' \
//!   -H 'Content-Type: application/json' -d '{"amount":"150.00"}'
//!
//! # A burn: the first signature counts, another one is refused, whichever key it comes with.
//! ID=$(curl -s http://127.0.0.1:3001/v2/intents/offramp -H 'X-API-Key: acme-sandbox-1' \
//!   -H 'Content-Type: application/json' -d '{"amount":"20.00"}' | cut -d'"' -f4)
//! curl -i http://127.0.0.1:3001/v2/intents/$ID/approve-burn -H 'X-API-Key: acme-sandbox-1' \
//!   -H 'Content-Type: application/json' -d '{"txSignature":"5VERYsigned"}'
//! curl -i http://127.0.0.1:3001/v2/intents/$ID/approve-burn -H 'X-API-Key: acme-sandbox-2' \
//!   -H 'Content-Type: application/json' -d '{"txSignature":"3another"}'
//! curl -i http://127.0.0.1:3001/v2/intents/$ID -H 'X-API-Key: acme-sandbox-2'
//!
//! # Another burn, which is broadcast, but the answer is lost (502). Until it is known, no other
//! # signature (409); the first one again finds out (200).
//! LOST=$(curl -s http://127.0.0.1:3001/v2/intents/offramp -H 'X-API-Key: acme-sandbox-1' \
//!   -H 'Content-Type: application/json' -d '{"amount":"30.00"}' | cut -d'"' -f4)
//! curl -i http://127.0.0.1:3001/_downstream -H 'Content-Type: application/json' \
//!   -d '{"fail":1,"status":504,"after_effect":true}'
//! curl -i http://127.0.0.1:3001/v2/intents/$LOST/approve-burn -H 'X-API-Key: acme-sandbox-1' \
//!   -H 'Content-Type: application/json' -d '{"txSignature":"4lost"}'
//! curl -i http://127.0.0.1:3001/v2/intents/$LOST/approve-burn -H 'X-API-Key: acme-sandbox-2' \
//!   -H 'Content-Type: application/json' -d '{"txSignature":"2fresh"}'
//! curl -i http://127.0.0.1:3001/v2/intents/$LOST/approve-burn -H 'X-API-Key: acme-sandbox-1' \
//!   -H 'Content-Type: application/json' -d '{"txSignature":"4lost"}'
//!
//! # A person is one party; a wallet is replaced in place.
//! curl -i http://127.0.0.1:3001/v2/parties -H 'X-API-Key: acme-sandbox-1' \
//!   -H 'Content-Type: application/json' -d '{"cpf":"529.982.247-25","name":"Ana"}'
//! curl -i http://127.0.0.1:3001/_effects
//! ```

use std::{
    borrow::Cow,
    collections::HashMap,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        FromRef, FromRequest, FromRequestParts, Path, State, rejection::JsonRejection,
        rejection::PathRejection,
    },
    http::{self, StatusCode, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, patch, post},
};
use clap::Parser;
use examples::{Downstream, Failure, Server, StoreChoice, Switches, asked_to_stop};
use idem_runtime::{
    Anchor, FingerprintScheme, Format, Idempotency, Operation, Refusal, RefusalKind, Scope,
    idempotent,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

/// One UUID for each thing that a user intends.
const IDEMPOTENCY_KEY: Anchor = Anchor::header("idempotency-key")
    .format(Format::Uuid)
    .optional()
    .fingerprint(FingerprintScheme::none());

/// How long an intent's answer is replayed.
const WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

#[idempotent(anchor = IDEMPOTENCY_KEY)]
async fn create_onramp(
    caller: Caller,
    State(app): State<App>,
    operation: Operation,
    Payload(order): Payload<Order>,
) -> Result<(StatusCode, Json<Intent>), Error> {
    app.create_intent(Kind::Onramp, caller, &operation, order).await
}

#[idempotent(anchor = IDEMPOTENCY_KEY)]
async fn create_offramp(
    caller: Caller,
    State(app): State<App>,
    operation: Operation,
    Payload(order): Payload<Order>,
) -> Result<(StatusCode, Json<Intent>), Error> {
    app.create_intent(Kind::Offramp, caller, &operation, order).await
}

/// One signature for each intent, for ever. That the caller may see the intent was decided by an
/// extractor, before any look-up.
#[idempotent(
    anchor = path("id"),
    scope = arg(caller.instance),
    fingerprint = body_field("txSignature"),
    ttl = forever
)]
async fn approve_burn(
    caller: Caller,
    State(app): State<App>,
    OwnIntent(intent): OwnIntent,
    Payload(approval): Payload<Approval>,
) -> Result<Json<Intent>, Error> {
    approval.check()?;
    if intent.kind != Kind::Offramp {
        return Err(Error::new(StatusCode::CONFLICT, "not_a_burn", "an onramp burns nothing"));
    }
    // No derived key: the same signed bytes are the same transaction, however often they are sent.
    // (Whether one signature may burn for two intents is the chain's business, not looked at here.)
    let transaction = format!("{} {}", intent.id, approval.tx_signature);
    app.downstream.call("burns", transaction).await.map_err(Error::of_burn)?;
    app.approve(&intent.id, approval.tx_signature).map(Json)
}

impl App {
    async fn create_intent(
        &self,
        kind: Kind,
        caller: Caller,
        operation: &Operation,
        order: Order,
    ) -> Result<(StatusCode, Json<Intent>), Error> {
        order.check()?;
        // Every attempt makes the same intent: the provider's key and the intent's id say so.
        self.downstream.call(kind.effect(), operation.derive("provider")).await?;
        let id = operation.derive("intent").to_string();
        let status = match kind {
            Kind::Onramp => Status::AwaitingPayment,
            Kind::Offramp => Status::AwaitingBurn,
        };
        let intent = Intent {
            id: id.clone(),
            kind,
            status,
            amount: order.amount,
            tx_signature: None,
            owner: caller.instance,
        };
        self.books().intents.insert(id, intent.clone());
        Ok((StatusCode::CREATED, Json(intent)))
    }

    fn approve(&self, id: &str, signature: String) -> Result<Intent, Error> {
        let mut books = self.books();
        let intent = books.intents.get_mut(id).ok_or(Error::NO_INTENT)?;
        intent.status = Status::BurnApproved;
        intent.tx_signature = Some(signature);
        Ok(intent.clone())
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn show_intent(OwnIntent(intent): OwnIntent) -> Json<Intent> {
    Json(intent)
}

/// Unprotected, as documented: a retry of a party that exists is refused by its `cpf`.
async fn create_party(
    caller: Caller,
    State(app): State<App>,
    Payload(mut party): Payload<NewParty>,
) -> Result<(StatusCode, Json<Party>), Error> {
    // Dots and dashes are how people write it, not who it is.
    party.cpf.retain(|c| !matches!(c, '.' | '-' | ' '));
    if party.cpf.is_empty() {
        return Err(Error::invalid("`cpf` is empty"));
    }
    let mut books = app.books();
    let owned = |known: &Party| known.owner == caller.instance;
    if books.parties.values().any(|known| owned(known) && known.cpf == party.cpf) {
        let message = "a party with this cpf exists";
        return Err(Error::new(StatusCode::CONFLICT, "duplicate_cpf", message));
    }
    let NewParty { cpf, name, wallet } = party;
    let id = Uuid::new_v4().to_string();
    let party = Party { id: id.clone(), cpf, name, wallet, owner: caller.instance };
    books.parties.insert(id, party.clone());
    app.downstream.happened("parties");
    Ok((StatusCode::CREATED, Json(party)))
}

async fn show_party(
    caller: Caller,
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<Party>, Error> {
    app.books().own_party(caller, &id).map(|party| Json(party.clone()))
}

/// Idempotent by nature: the second of two equal requests changes nothing.
async fn bind_wallet(
    caller: Caller,
    State(app): State<App>,
    Path(id): Path<String>,
    Payload(Binding { wallet }): Payload<Binding>,
) -> Result<Json<Party>, Error> {
    let mut books = app.books();
    let party = books.own_party(caller, &id)?;
    if party.wallet.as_ref() != Some(&wallet) {
        party.wallet = Some(wallet);
        app.downstream.happened("wallet_bindings");
    }
    Ok(Json(party.clone()))
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    downstream: Downstream,
    books: Arc<Mutex<Books>>,
}

/// What there is.
#[derive(Default)]
struct Books {
    intents: HashMap<String, Intent>,
    parties: HashMap<String, Party>,
}

impl Books {
    fn own_party(&mut self, caller: Caller, id: &str) -> Result<&mut Party, Error> {
        let party = self.parties.get_mut(id).filter(|party| party.owner == caller.instance);
        party.ok_or(Error::new(StatusCode::NOT_FOUND, "not_found", "there is no such party"))
    }
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Intent {
    id: String,
    kind: Kind,
    status: Status,
    amount: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_signature: Option<String>,
    #[serde(skip)]
    owner: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Onramp,
    Offramp,
}

impl Kind {
    const fn effect(self) -> &'static str {
        match self {
            Self::Onramp => "onramp_intents",
            Self::Offramp => "offramp_intents",
        }
    }
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    AwaitingPayment,
    AwaitingBurn,
    BurnApproved,
}

#[derive(Deserialize)]
struct Order {
    amount: String,
}

impl Order {
    /// Money is decimal digits: `150.00`.
    fn check(&self) -> Result<(), Error> {
        let (whole, cents) = self.amount.split_once('.').unwrap_or((&self.amount, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let positive = self.amount.bytes().any(|b| matches!(b, b'1'..=b'9'));
        match digits(whole) && digits(cents) && positive {
            true => Ok(()),
            false => Err(Error::invalid("`amount` is not a positive decimal number")),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Approval {
    tx_signature: String,
}

impl Approval {
    fn check(&self) -> Result<(), Error> {
        match (1..=128).contains(&self.tx_signature.len()) {
            true => Ok(()),
            false => Err(Error::invalid("`txSignature` is not a signature")),
        }
    }
}

#[derive(Deserialize)]
struct NewParty {
    cpf: String,
    name: Option<String>,
    wallet: Option<String>,
}

#[derive(Deserialize)]
struct Binding {
    wallet: String,
}

#[derive(Clone, Serialize)]
struct Party {
    id: String,
    cpf: String,
    name: Option<String>,
    wallet: Option<String>,
    #[serde(skip)]
    owner: &'static str,
}

/// The API keys of the demonstration, and the organisation's instance that each binds to.
const API_KEYS: [(&str, &str); 4] = [
    ("acme-sandbox-1", "acme/sandbox"),
    ("acme-sandbox-2", "acme/sandbox"),
    ("acme-production-1", "acme/production"),
    ("umbrella-sandbox-1", "umbrella/sandbox"),
];

/// Whoever is behind an `X-API-Key`.
#[derive(Clone, Copy)]
struct Caller {
    instance: &'static str,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let sent = parts.headers.get("X-API-Key").map(http::HeaderValue::as_bytes);
        let known = API_KEYS.iter().find(|(key, _)| Some(key.as_bytes()) == sent);
        let &(_, instance) = known.ok_or(Error::UNAUTHORIZED)?;
        Ok(Self { instance })
    }
}

/// The intent in the path, which the caller's instance owns.
///
/// It is looked up as it is written: if two spellings of one id led to one intent, they would be
/// two keys, and two signatures.
struct OwnIntent(Intent);

impl FromRequestParts<App> for OwnIntent {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let Path(id) = Path::<String>::from_request_parts(parts, app).await?;
        let intent = app.books().intents.get(&id).cloned();
        let own = intent.filter(|intent| intent.owner == caller.instance);
        own.map(Self).ok_or(Error::NO_INTENT)
    }
}

/// A JSON body, turned away in this API's words.
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Error))]
struct Payload<T>(T);

/// An error, as this API tells it.
#[derive(Debug)]
struct Error {
    status: StatusCode,
    code: &'static str,
    message: Cow<'static, str>,
}

impl Error {
    const UNAUTHORIZED: Self =
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "send an X-API-Key that is known here");
    const NO_INTENT: Self =
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is no such intent");

    const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self { status, code, message: Cow::Borrowed(message) }
    }

    const fn invalid(message: &'static str) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message)
    }

    /// A 4xx frees the intent for another signature, a 5xx does not: that is all that idem needs
    /// to be told.
    fn of_burn(failure: Failure) -> Self {
        if failure.is_refusal() {
            let message = "the chain refuses this transaction; sign a fresh one";
            return Self::new(StatusCode::UNPROCESSABLE_ENTITY, "burn_refused", message);
        }
        let message = "nobody knows whether it was burnt; submit the same signature again";
        Self::new(StatusCode::BAD_GATEWAY, "burn_uncertain", message)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let (status, code) = match failure.is_refusal() {
            true => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
            false => (StatusCode::BAD_GATEWAY, "uncertain"),
        };
        Self { status, code, message: failure.to_string().into() }
    }
}

impl From<JsonRejection> for Error {
    fn from(rejection: JsonRejection) -> Self {
        Self { status: rejection.status(), code: "invalid", message: rejection.body_text().into() }
    }
}

impl From<PathRejection> for Error {
    fn from(_: PathRejection) -> Self {
        Self::NO_INTENT
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let Self { status, code, message } = self;
        (status, Json(json!({ "error": { "code": code, "message": message } }))).into_response()
    }
}

/// What idem refuses, in the same words.
fn refusals(refusal: &Refusal) -> http::Response<Bytes> {
    let kind = refusal.kind();
    let (status, code, message) = match kind {
        RefusalKind::KeyMalformed => {
            (kind.status(), "invalid_idempotency_key", "the idempotency-key is one UUID")
        }
        RefusalKind::InFlight => {
            (kind.status(), "in_progress", "the same request is still running; try again")
        }
        // Only burns can: the bodies of intents are not compared.
        RefusalKind::Mismatch => (
            StatusCode::CONFLICT,
            "other_tx_signature",
            "this burn was submitted with another txSignature",
        ),
        _ => (kind.status(), kind.code(), refusal.detail()),
    };
    refusal.json(status, &json!({ "error": { "code": code, "message": message } }))
}

/// An on- and off-ramp between money and tokens, after the API of Nora
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
        .scope(Scope::header("X-API-Key"))
        .ttl(switches.scaled(WINDOW))
        .refusals(refusals)
        .build();
    let downstream = Downstream::default();
    let app = Router::new()
        .route("/v2/intents/onramp", post(create_onramp))
        .route("/v2/intents/offramp", post(create_offramp))
        .route("/v2/intents/{id}", get(show_intent))
        .route("/v2/intents/{id}/approve-burn", post(approve_burn))
        .route("/v2/parties", post(create_party))
        .route("/v2/parties/{id}", get(show_party))
        .route("/v2/parties/{id}/wallet", patch(bind_wallet))
        .merge(downstream.routes())
        .with_state(App { idem: engine.clone(), downstream, books: Arc::default() });

    let server = Server::bind(switches.port.unwrap_or(3001)).await?;
    println!("nora listens on {}, records in {store}", server.url());
    for (key, instance) in API_KEYS {
        println!("X-API-Key: {key}   ({instance})");
    }
    server.run(app, &engine, asked_to_stop()).await?;
    Ok(())
}
