//! A policy administration for insurers, after the API of Skadi.
//!
//! What it shows:
//!
//!  - Requests that are signed, so that no two attempts of one operation look alike: each has a
//!    timestamp and a signature of its own. What counts is the body; whose the key is, is decided
//!    by the *principal* behind the API key, who can go on with its second API key where the first
//!    one was revoked.
//!  - A signature that is checked on replays too. It covers the body, and on a replay no extractor
//!    of the body runs, so a layer does it: a forged retry learns nothing, least of all an answer.
//!  - A rate limit that replays and conflicts cost nothing of (`admit`): a client that has spent
//!    its budget still gets the answers that it paid for. A request that is turned away for its
//!    budget uses no key up.
//!  - An optional key, of which all writes of the API share one *space*.
//!  - Refusals in the API's own words: `idempotency-conflict` and `in_flight`.
//!
//! Where the document is silent:
//!
//!  - `X-Timestamp` is in Unix seconds, and may be five minutes off. `X-Signature` is the
//!    HMAC-SHA-256, in hexadecimal digits, of the timestamp as it is sent and then the body, under
//!    the API key's secret. Reads are signed like writes.
//!  - A principal's budget is 30 requests, and one more every two seconds. Reads cost nothing of
//!    it.
//!  - Of the two steps only binding takes a key: a quote commits nobody, and asking twice makes two.
//!    A quote is bound once, with a key or without.
//!  - The window begins with the first answer, and a replay does not prolong it.
//!  - All that the server decided is replayed, refusals of its own included (`Recording::Final`).
//!    A request that is turned away before it begins, by its signature, its budget or a body that
//!    cannot be read, uses no key up. After a 5xx the same key runs again.
//!
//! `/_sign` is no part of the API: it signs for you, so that the lines below can be typed. Whatever
//! body it is sent, it answers with the three headers to send with it.
//!
//! ```sh
//! cargo run -p examples --bin skadi    # `-- --time-scale 8640` makes the 24 hours ten seconds
//!
//! # Twice: the same bytes, though the second is signed anew. Then another body, and by another
//! # principal.
//! curl -s http://127.0.0.1:3004/_sign -H 'X-API-Key: harbor-1' -d '{"insured":"Acme"}' | \
//!   curl -i http://127.0.0.1:3004/create-submission -H @- -H 'Idempotency-Key: draft-2041' \
//!   -H 'Content-Type: application/json' -d '{"insured":"Acme"}'
//! curl -s http://127.0.0.1:3004/_sign -H 'X-API-Key: harbor-1' -d '{"insured":"Emca"}' | \
//!   curl -i http://127.0.0.1:3004/create-submission -H @- -H 'Idempotency-Key: draft-2041' \
//!   -H 'Content-Type: application/json' -d '{"insured":"Emca"}'
//! curl -s http://127.0.0.1:3004/_sign -H 'X-API-Key: tern-1' -d '{"insured":"Emca"}' | \
//!   curl -i http://127.0.0.1:3004/create-submission -H @- -H 'Idempotency-Key: draft-2041' \
//!   -H 'Content-Type: application/json' -d '{"insured":"Emca"}'
//!
//! # A quote (one with the id ENDORSEMENT is there from the start), and binding it; twice.
//! curl -s http://127.0.0.1:3004/_sign -H 'X-API-Key: harbor-1' -d '{"policy":"P-7"}' | \
//!   curl -i http://127.0.0.1:3004/renewals -H @- \
//!   -H 'Content-Type: application/json' -d '{"policy":"P-7"}'
//! curl -s http://127.0.0.1:3004/_sign -H 'X-API-Key: harbor-1' -d '{"effective":"2027-01-01"}' | \
//!   curl -i http://127.0.0.1:3004/endorsements/ENDORSEMENT/bind -H @- \
//!   -H 'Idempotency-Key: bind-1' \
//!   -H 'Content-Type: application/json' -d '{"effective":"2027-01-01"}'
//! curl -s http://127.0.0.1:3004/_sign -H 'X-API-Key: harbor-1' -d '{"policy":"P-7","amount":"9"}' | \
//!   curl -i http://127.0.0.1:3004/process-transaction -H @- -H 'Idempotency-Key: premium-1' \
//!   -H 'Content-Type: application/json' -d '{"policy":"P-7","amount":"9"}'
//!
//! # Reads, and what really happened.
//! curl -s http://127.0.0.1:3004/_sign -H 'X-API-Key: harbor-2' | \
//!   curl -i http://127.0.0.1:3004/endorsements/ENDORSEMENT -H @-
//! curl -i http://127.0.0.1:3004/_effects
//! ```

use std::{
    borrow::Cow,
    num::NonZeroU32,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes, to_bytes},
    extract::{FromRef, FromRequest, Path, Request, State, rejection::JsonRejection},
    http::{self, HeaderMap, StatusCode, header::RETRY_AFTER},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Parser;
use examples::{Downstream, Failure, Server, StoreChoice, Switches, asked_to_stop};
use governor::{DefaultKeyedRateLimiter, NotUntil, Quota, RateLimiter, clock::Clock};
use hmac::{Hmac, KeyInit, Mac};
use idem_runtime::{
    Anchor, AnchorError, Idempotency, Operation, Recording, Refusal, RefusalKind, RequestContext,
    Scope, Values, idempotent,
};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::Sha256;

/// How each write of this API is idempotent. A key may have 255 characters, as idem has it anyway.
const IDEMPOTENCY_KEY: Anchor = Anchor::header("Idempotency-Key").space("skadi").optional();

/// Whose keys are: the principal whom `authenticate` has found, and none of the headers by which
/// it did.
const PRINCIPAL: Scope = Scope::custom(|request| {
    let Principal(name) =
        request.extensions().get().ok_or(AnchorError::missing("the principal"))?;
    Ok(Values::from_iter([name]))
});

/// How long an answer is replayed.
const WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// How many requests a principal has at once, and how soon it has another one.
const BUDGET: u32 = 30;
const REFILL: Duration = Duration::from_secs(2);

/// How far a client's clock may be off. Not a time of the API's, so never scaled.
const TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// The largest body.
const LARGEST: usize = 1024 * 1024;

/// What is quoted first and then bound.
const QUOTED: [Kind; 7] = [
    Kind("endorsements"),
    Kind("cancellations"),
    Kind("extensions"),
    Kind("renewals"),
    Kind("rewrites"),
    Kind("audits"),
    Kind("oos-rebases"),
];
const SUBMISSIONS: Kind = Kind("submissions");
const TRANSACTIONS: Kind = Kind("transactions");

#[idempotent(anchor = IDEMPOTENCY_KEY, admit = within_budget)]
async fn create_submission(
    Extension(caller): Extension<Principal>,
    State(app): State<App>,
    operation: Operation,
    Payload(NewSubmission { insured }): Payload<NewSubmission>,
) -> Written {
    app.carrier.call(SUBMISSIONS.0, operation.derive("carrier")).await?;
    // Every attempt makes the same submission.
    let id = operation.derive("submission").short();
    let shown = json!({ "id": id, "insured": insured, "status": "received" });
    app.keep(Object { kind: SUBMISSIONS, owner: caller, id, shown: shown.clone() });
    Ok((StatusCode::CREATED, Json(shown)))
}

#[idempotent(anchor = IDEMPOTENCY_KEY, admit = within_budget)]
async fn process_transaction(
    Extension(caller): Extension<Principal>,
    State(app): State<App>,
    operation: Operation,
    Payload(NewTransaction { policy, amount }): Payload<NewTransaction>,
) -> Written {
    app.carrier.call(TRANSACTIONS.0, operation.derive("carrier")).await?;
    let id = operation.derive("transaction").short();
    let shown = json!({ "id": id, "policy": policy, "amount": amount, "status": "posted" });
    app.keep(Object { kind: TRANSACTIONS, owner: caller, id, shown: shown.clone() });
    Ok((StatusCode::OK, Json(shown)))
}

/// Binds a quote, once: for all that is quoted first.
#[idempotent(anchor = IDEMPOTENCY_KEY, admit = within_budget)]
async fn bind(
    Extension(caller): Extension<Principal>,
    Extension(kind): Extension<Kind>,
    State(app): State<App>,
    Path(id): Path<String>,
    operation: Operation,
    Payload(Binding { effective }): Payload<Binding>,
) -> Written {
    let mut shown = app.find(caller, kind, &id)?;
    app.carrier.call_at(&id, kind.0, operation.derive("carrier")).await?;
    shown["status"] = "bound".into();
    shown["effective"] = effective.into();
    app.keep(Object { kind, owner: caller, id, shown: shown.clone() });
    Ok((StatusCode::OK, Json(shown)))
}

/// Unprotected, as documented: a quote commits nobody. It has its price all the same.
async fn quote(
    Extension(caller): Extension<Principal>,
    Extension(kind): Extension<Kind>,
    State(app): State<App>,
    operation: Operation,
    Payload(Wanted { policy }): Payload<Wanted>,
) -> Written {
    app.spend(caller)?;
    let id = operation.derive("quote").short();
    let shown = json!({ "id": id, "policy": policy, "status": "quoted" });
    app.keep(Object { kind, owner: caller, id, shown: shown.clone() });
    Ok((StatusCode::CREATED, Json(shown)))
}

/// What a write comes to.
type Written = Result<(StatusCode, Json<Value>), Error>;

#[derive(Deserialize)]
struct NewSubmission {
    insured: String,
}

#[derive(Deserialize)]
struct NewTransaction {
    policy: String,
    amount: String,
}

#[derive(Deserialize)]
struct Wanted {
    policy: String,
}

#[derive(Deserialize)]
struct Binding {
    effective: String,
}

/// Idem asks this of a request that would run, and of no other.
async fn within_budget(request: RequestContext) -> Result<(), Error> {
    let caller = request.extensions().get::<Principal>();
    let (Some(app), Some(&caller)) = (request.state::<App>(), caller) else {
        return Err(Error::UNAUTHORIZED);
    };
    app.spend(caller)
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    carrier: Downstream,
    budgets: Arc<DefaultKeyedRateLimiter<Principal>>,
    objects: Arc<Mutex<Vec<Object>>>,
}

/// Something that was written.
struct Object {
    kind: Kind,
    owner: Principal,
    id: String,
    shown: Value,
}

/// A kind of objects, by its name in paths.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind(&'static str);

impl App {
    /// Takes one request out of a principal's budget.
    fn spend(&self, caller: Principal) -> Result<(), Error> {
        let spent = |until: NotUntil<_>| until.wait_time_from(self.budgets.clock().now());
        self.budgets.check_key(&caller).map_err(|until| Error::spent(spent(until)))
    }

    /// Keeps what was written, in the place of what it was before.
    fn keep(&self, object: Object) {
        let mut objects = self.objects();
        match objects.iter_mut().find(|it| (it.kind, &it.id) == (object.kind, &object.id)) {
            Some(before) => *before = object,
            None => objects.push(object),
        }
    }

    /// The caller's own: whatever is another's is not there.
    fn find(&self, caller: Principal, kind: Kind, id: &str) -> Result<Value, Error> {
        let objects = self.objects();
        let own = objects.iter().find(|it| (it.kind, it.owner, &*it.id) == (kind, caller, id));
        own.map(|it| it.shown.clone()).ok_or(Error::NOT_FOUND)
    }

    fn objects(&self) -> MutexGuard<'_, Vec<Object>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn show(
    Extension(caller): Extension<Principal>,
    Extension(kind): Extension<Kind>,
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Error> {
    app.find(caller, kind, &id).map(Json)
}

async fn list(
    Extension(caller): Extension<Principal>,
    Extension(kind): Extension<Kind>,
    State(app): State<App>,
) -> Json<Value> {
    let objects = app.objects();
    let own = objects.iter().filter(|it| (it.kind, it.owner) == (kind, caller));
    Json(json!({ "data": own.map(|it| &it.shown).collect::<Vec<_>>() }))
}

/// Who acts, whichever of its API keys it uses.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Principal(&'static str);

/// An API key and what goes with it.
struct Credentials {
    api_key: &'static str,
    secret: &'static str,
    principal: Principal,
}

/// The credentials of the demonstration.
const CREDENTIALS: [Credentials; 3] = [
    Credentials { api_key: "harbor-1", secret: "oak", principal: Principal("harbor") },
    Credentials { api_key: "harbor-2", secret: "elm", principal: Principal("harbor") },
    Credentials { api_key: "tern-1", secret: "ash", principal: Principal("tern") },
];

impl Credentials {
    fn of(headers: &HeaderMap) -> Result<&'static Self, Error> {
        let sent = text(headers, "X-API-Key");
        CREDENTIALS.iter().find(|it| it.api_key == sent).ok_or(Error::UNAUTHORIZED)
    }

    /// What is signed is the timestamp and then the body. Nothing has to stand between them: of
    /// all ways to divide the bytes, one makes a timestamp that is not long past or far ahead.
    fn mac(&self, timestamp: &str, body: &[u8]) -> Result<Hmac<Sha256>, Error> {
        let mac = Hmac::<Sha256>::new_from_slice(self.secret.as_bytes());
        let mac = mac.map_err(|_| Error::UNAUTHORIZED)?;
        Ok(mac.chain_update(timestamp).chain_update(body))
    }
}

/// Runs before anything else: whoever did not sign this very body, and lately, learns nothing.
async fn authenticate(request: Request, next: Next) -> Result<Response, Error> {
    let (mut head, body) = request.into_parts();
    // Whose body it is, and when it was signed, are known before any of it is read.
    let credentials = Credentials::of(&head.headers)?;
    let timestamp = text(&head.headers, "X-Timestamp");
    let seconds = timestamp.parse().map_err(|_| Error::STALE)?;
    if now().abs_diff(seconds) > TOLERANCE.as_secs() {
        return Err(Error::STALE);
    }
    let body = to_bytes(body, LARGEST).await.map_err(|_| Error::UNREADABLE)?;
    let sent = text(&head.headers, "X-Signature").strip_prefix("sha256=");
    let sent = sent.and_then(|digits| hex::decode(digits).ok()).ok_or(Error::NOT_SIGNED)?;
    // In constant time.
    credentials.mac(timestamp, &body)?.verify_slice(&sent).map_err(|_| Error::NOT_SIGNED)?;
    head.extensions.insert(credentials.principal);
    Ok(next.run(Request::from_parts(head, Body::from(body))).await)
}

/// Signs, for people who type; a real client has the secret and does it itself.
async fn sign(headers: HeaderMap, body: Bytes) -> Result<String, Error> {
    let credentials = Credentials::of(&headers)?;
    let timestamp = now().to_string();
    let signature = hex::encode(credentials.mac(&timestamp, &body)?.finalize().into_bytes());
    let api_key = credentials.api_key;
    Ok(format!("X-API-Key: {api_key}\nX-Timestamp: {timestamp}\nX-Signature: sha256={signature}\n"))
}

/// A header's value; empty if there is none.
fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// In Unix seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
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
    retry_after: Option<Duration>,
}

impl Error {
    const UNAUTHORIZED: Self =
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "send an X-API-Key that is known here");
    const STALE: Self = Self::new(
        StatusCode::UNAUTHORIZED,
        "stale_timestamp",
        "send an X-Timestamp in Unix seconds, at most five minutes off",
    );
    const NOT_SIGNED: Self = Self::new(
        StatusCode::UNAUTHORIZED,
        "invalid_signature",
        "send an X-Signature of the X-Timestamp and this body: `sha256=` and hexadecimal digits",
    );
    const UNREADABLE: Self = Self::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body_too_large",
        "the body is larger than a megabyte, or broke off",
    );
    const NOT_FOUND: Self = Self::new(StatusCode::NOT_FOUND, "not_found", "it does not exist");

    const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self { status, code, message: Cow::Borrowed(message), retry_after: None }
    }

    /// The budget is spent for so long.
    fn spent(wait: Duration) -> Self {
        let message = "the budget is spent; answers that were given can still be asked for";
        let retry_after = Some(wait);
        Self { retry_after, ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", message) }
    }
}

fn document(code: &str, message: &str) -> Value {
    json!({ "error": { "code": code, "message": message } })
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let Self { status, code, message, retry_after } = self;
        // Whole seconds, and not too early.
        let seconds = |wait: Duration| wait.as_millis().div_ceil(1_000).max(1).to_string();
        let retry_after = retry_after.map(|wait| [(RETRY_AFTER, seconds(wait))]);
        match retry_after {
            Some(headers) => (status, headers, Json(document(code, &message))).into_response(),
            None => (status, Json(document(code, &message))).into_response(),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            _ if failure.is_conflict() => {
                Self::new(StatusCode::CONFLICT, "already_bound", "this quote was bound before")
            }
            _ if failure.is_refusal() => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "declined", "the carrier declines it")
            }
            _ => Self::new(
                StatusCode::BAD_GATEWAY,
                "carrier_unavailable",
                "nobody knows what the carrier did; repeat the request with its key",
            ),
        }
    }
}

impl From<JsonRejection> for Error {
    fn from(rejection: JsonRejection) -> Self {
        let message = rejection.body_text().into();
        Self { status: rejection.status(), code: "invalid", message, retry_after: None }
    }
}

/// What idem refuses, in the same words.
fn refusals(refusal: &Refusal) -> http::Response<Bytes> {
    let kind = refusal.kind();
    let (status, code) = match kind {
        RefusalKind::Mismatch => (StatusCode::CONFLICT, "idempotency-conflict"),
        // The other attempt has the answer, or will have it.
        RefusalKind::InFlight | RefusalKind::LeaseLost => (kind.status(), "in_flight"),
        _ => (kind.status(), kind.code()),
    };
    refusal.json(status, &document(code, refusal.detail()))
}

fn routes(app: App) -> Router {
    let mut api = Router::new()
        .route("/create-submission", post(create_submission))
        .route("/process-transaction", post(process_transaction));
    for kind in [SUBMISSIONS, TRANSACTIONS] {
        api = api.merge(reads(kind).layer(Extension(kind)));
    }
    for kind in QUOTED {
        let Kind(name) = kind;
        let writes = reads(kind)
            .route(&format!("/{name}"), post(quote))
            .route(&format!("/{name}/{{id}}/bind"), post(bind));
        api = api.merge(writes.layer(Extension(kind)));
    }
    api.route_layer(middleware::from_fn(authenticate))
        .route("/_sign", get(sign).post(sign))
        .merge(app.carrier.routes())
        .with_state(app)
}

fn reads(Kind(name): Kind) -> Router<App> {
    Router::new().route(&format!("/{name}"), get(list)).route(&format!("/{name}/{{id}}"), get(show))
}

/// A policy administration for insurers, after the API of Skadi
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
    let refill = Quota::with_period(switches.scaled(REFILL)).zip(NonZeroU32::new(BUDGET));
    let (refill, burst) = refill.ok_or("a budget of nothing")?;
    let app = App {
        idem: engine.clone(),
        carrier: Downstream::default(),
        budgets: Arc::new(RateLimiter::keyed(refill.allow_burst(burst))),
        objects: Arc::default(),
    };
    app.keep(Object {
        kind: QUOTED[0],
        owner: CREDENTIALS[0].principal,
        id: "ENDORSEMENT".to_owned(),
        shown: json!({ "id": "ENDORSEMENT", "policy": "P-7", "status": "quoted" }),
    });

    let server = Server::bind(switches.port.unwrap_or(3004)).await?;
    println!("skadi listens on {}, records in {store}", server.url());
    for Credentials { api_key, secret, principal: Principal(name) } in &CREDENTIALS {
        println!("X-API-Key: {api_key}   (its secret is `{secret}`; of {name})");
    }
    server.run(routes(app), &engine, asked_to_stop()).await?;
    Ok(())
}
