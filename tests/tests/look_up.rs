//! What became of a request: by its operation id and by its key, only for whose it is.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::Duration;

use axum::{
    Json, Router,
    extract::{FromRef, Path, State},
    http::{HeaderMap, Method, StatusCode, header::SET_COOKIE},
    response::{AppendHeaders, IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use idem_runtime::{
    Anchor, Answer, Became, CallError, FORMAT, Flags, Format, Found, Idempotency, KeyName,
    KeyNameError, LookUpError, OperationId, Policy, Scope, Ttl, idempotent,
    store::{Claim, Claimed, Completion, Store, StoreErrorKind},
};
use serde::Deserialize;
use tests::{
    faults::Gate,
    on_both_stores,
    server::{Server, engine, send},
    stores::Bench,
};

const VALID: Duration = Duration::from_secs(600);
const LEASE: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(24 * 60 * 60);

const KEY: Anchor = Anchor::header("Idempotency-Key");
const NONCE: Anchor = KEY.format(Format::Hex(4)).space("withdrawals").ttl(VALID);

on_both_stores! {
    each_fate_is_told_by_id_and_by_key,
    an_answer_comes_as_it_was_given,
    a_key_is_named_as_its_request_named_it,
    the_names_of_one_key_are_those_of_no_other,
    what_a_layer_claimed_and_what_the_handler_behind_it_are_two_names,
    a_functions_key_is_named_by_its_path,
    what_is_issued_is_told_until_it_is_forgotten,
    an_operation_that_was_forgotten_was_never_seen,
    a_record_that_cannot_be_read_is_an_error_and_another_tenants_is_none,
    a_store_that_cannot_be_searched_still_finds_by_key,
}

#[derive(Clone)]
struct App {
    engine: Idempotency,
    gate: Gate,
}

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(State(app): State<App>, body: String) -> Response {
    match body.as_str() {
        "slow" => {
            app.gate.pass().await;
            StatusCode::CREATED.into_response()
        }
        "large" => (StatusCode::CREATED, "x".repeat(200)).into_response(),
        "bad" => StatusCode::UNPROCESSABLE_ENTITY.into_response(),
        "down" => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => {
            let headers = AppendHeaders([("x-fee", "1"), ("x-fee", "2"), ("set-cookie", "mine")]);
            (StatusCode::CREATED, headers, format!("paid: {body}")).into_response()
        }
    }
}

#[idempotent(anchor = NONCE, issued)]
async fn withdraw(body: String) -> String {
    body
}

/// What an application offers to a client whose request timed out.
async fn what_became(
    State(engine): State<Idempotency>,
    headers: HeaderMap,
    Path(id): Path<OperationId>,
) -> Result<Response, StatusCode> {
    let tenant = headers["x-api-key"].to_str().map_err(|_| StatusCode::UNAUTHORIZED)?;
    let found = engine.look_up(tenant).operation(id).await;
    let found = found.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    Ok(match found.ok_or(StatusCode::NOT_FOUND)?.became {
        Became::Completed(answer) => answer.into_response(),
        Became::Running => StatusCode::ACCEPTED.into_response(),
        _ => StatusCode::CONFLICT.into_response(),
    })
}

async fn served(bench: &Bench) -> (Server, App) {
    let engine = bench.engine().response_body_limit(100).build();
    let app = App { engine, gate: Gate::default() };
    let router = Router::new()
        .route("/payments", post(pay))
        .route("/payments/{id}", get(what_became))
        .route("/withdrawals", post(withdraw))
        .with_state(app.clone());
    (Server::start(router).await, app)
}

/// The name of a payment's key.
fn payment(key: &str) -> KeyName {
    KeyName::of(&KEY, key).operation(&Method::POST, "/payments", [""; 0])
}

/// Looks a key of tenant `a` up in both ways, and sees that no other tenant finds it.
async fn found(engine: &Idempotency, name: &KeyName) -> Option<Found> {
    let by_key = engine.look_up("a").key(name).await.unwrap()?;
    let id = by_key.record.operation_id;
    let by_id = engine.look_up("a").operation(id).await.unwrap().unwrap();
    assert_eq!(format!("{:?}", by_id.became), format!("{:?}", by_key.became));
    assert_eq!(
        (by_id.record.key, by_id.record.attempt),
        (by_key.record.key, by_key.record.attempt)
    );
    assert!(by_key.record.payload.is_empty() && by_id.record.payload.is_empty());
    for other in ["b", "A", "a ", ""] {
        assert!(engine.look_up(other).operation(id).await.unwrap().is_none(), "{other:?}");
        assert!(engine.look_up(other).key(name).await.unwrap().is_none(), "{other:?}");
    }
    assert!(engine.look_up(&()).operation(id).await.unwrap().is_none());
    assert!(engine.look_up(&("a", "a")).operation(id).await.unwrap().is_none());
    Some(by_key)
}

async fn became(engine: &Idempotency, key: &str) -> Option<Became> {
    found(engine, &payment(key)).await.map(|found| found.became)
}

async fn each_fate_is_told_by_id_and_by_key(bench: Bench) {
    let (server, App { engine, gate }) = served(&bench).await;
    assert!(became(&engine, "k").await.is_none(), "never seen");
    let never = engine.look_up("a").operation(OperationId::random()).await;
    assert!(never.unwrap().is_none());

    let slow = tokio::spawn(send(server.post("/payments", "slow", "slow")));
    gate.reached().await;
    assert!(matches!(became(&engine, "slow").await, Some(Became::Running)));
    // As of a process that is gone: its lease ends, and nobody has said what happened.
    bench.pass(LEASE);
    assert!(matches!(became(&engine, "slow").await, Some(Became::UnknownOutcome)));
    gate.open();
    slow.await.unwrap();
    assert!(matches!(became(&engine, "slow").await, Some(Became::Completed(_))));

    assert_eq!(send(server.post("/payments", "down", "down")).await.status, 503);
    let unknown = found(&engine, &payment("down")).await.unwrap();
    assert!(matches!(unknown.became, Became::UnknownOutcome));
    assert_eq!((unknown.record.attempt, &*unknown.record.operation), (1, "POST /payments"));

    assert_eq!(send(server.post("/payments", "large", "large")).await.status, 201);
    let tombstone = became(&engine, "large").await;
    assert!(matches!(tombstone, Some(Became::Tombstone { status: Some(201) })), "{tombstone:?}");

    send(server.post("/payments", "k", "k")).await;
    let found = found(&engine, &payment("k")).await.unwrap();
    let Became::Completed(Answer::Response(answer)) = &found.became else { panic!("{found:?}") };
    assert_eq!((answer.status, &answer.body[..]), (201, &b"paid: k"[..]));
    assert_eq!(found.record.kept_left, Ttl::For(TTL));
    assert!(!format!("{found:?}").contains("paid"), "{found:?}");
    bench.pass(TTL);
    assert!(became(&engine, "k").await.is_none(), "its record is over");
}

async fn an_answer_comes_as_it_was_given(bench: Bench) {
    let (server, App { gate, .. }) = served(&bench).await;
    let first = send(server.post("/payments", "k", "7")).await;
    let id = bench.store.last_record().await.unwrap().operation_id;
    let ask = |id: String, tenant: &str| {
        server.request(Method::GET, &format!("/payments/{id}")).header("x-api-key", tenant)
    };
    let answer = send(ask(id.to_string(), "a")).await;
    assert_eq!((answer.status, &answer.body), (201, &first.body));
    let fees: Vec<_> = answer.headers.get_all("x-fee").iter().collect();
    assert_eq!(fees, ["1", "2"]);
    assert_eq!(answer.header("content-type"), first.header("content-type"));
    assert_eq!(answer.header("idempotent-replayed"), Some("true"));
    assert!(answer.headers.get(SET_COOKIE).is_none(), "it was not recorded");

    let slow = tokio::spawn(send(server.post("/payments", "slow", "slow")));
    gate.reached().await;
    let running = bench.store.last_record().await.unwrap().operation_id;
    assert_eq!(send(ask(running.to_string(), "a")).await.status, 202);
    gate.open();
    slow.await.unwrap();
    // Another tenant's, nobody's and none at all.
    let others = send(ask(id.to_string(), "b")).await;
    let nobodys = send(ask(OperationId::random().to_string(), "a")).await;
    assert_eq!((others.status, others.body), (404, nobodys.body));
    assert_eq!(nobodys.status, 404);
    assert_eq!(send(ask("order-1".to_owned(), "a")).await.status, 400);
    assert_eq!(send(ask(id.to_string().to_uppercase(), "a")).await.status, 201);
}

#[derive(Deserialize)]
struct Invoice {
    line: u64,
}

async fn a_key_is_named_as_its_request_named_it(bench: Bench) {
    const HEX: Anchor = KEY.format(Format::Hex(2));
    const BY_ID: Anchor = Anchor::path("id").format(Format::Uuid);
    const LINE: Anchor = Anchor::all(&[Anchor::body_field("line"), KEY]).space("invoices");

    #[idempotent(anchor = HEX)]
    async fn refund(_body: String) -> &'static str {
        "refunded"
    }
    #[idempotent(anchor = BY_ID)]
    async fn cancel(_body: String) -> &'static str {
        "cancelled"
    }
    #[idempotent(anchor = LINE)]
    async fn invoice(_body: String) -> &'static str {
        "invoiced"
    }
    #[idempotent(anchor = KEY, space = "shared")]
    async fn share(_body: String) -> &'static str {
        "shared"
    }
    #[idempotent(anchor = arg(id, body.line))]
    async fn by_argument(Path(id): Path<u64>, Json(body): Json<Invoice>) -> &'static str {
        "by argument"
    }
    #[idempotent(anchor = KEY, scope = (header("X-API-Key"), header("X-User")))]
    async fn by_user(_body: String) -> &'static str {
        "by user"
    }

    for secret in [None, Some("secret")] {
        let engine = match secret {
            Some(secret) => bench.engine().secret(secret),
            None => bench.engine(),
        };
        let engine = engine.build();
        let payments = Router::new()
            .route("/{id}/refunds", post(refund))
            .route("/{id}", post(cancel))
            .route("/{id}/lines", post(by_argument));
        let router = Router::new()
            .nest("/v1/payments", payments)
            .route("/invoices", post(invoice))
            .route("/share", post(share))
            .route("/users", post(by_user))
            .with_state(engine.clone());
        let server = Server::start(router).await;
        let id = "7B1A9C6E-58A4-4D2C-9D9B-0C6F5D1F0E2A";
        let json = "{\"line\":4}";
        let none = [""; 0];
        let cases = [
            (
                "/v1/payments/a%2Fb/refunds".to_owned(),
                KeyName::of(&HEX, "0xAB01").operation(
                    &Method::POST,
                    "/v1/payments/{id}/refunds",
                    ["a/b"],
                ),
            ),
            (
                "/v1/payments/other/refunds".to_owned(),
                KeyName::of(&KEY, "AB01").format(Format::Hex(2)).operation(
                    &Method::POST,
                    "/v1/payments/{name}/refunds",
                    ["other"],
                ),
            ),
            (
                format!("/v1/payments/{id}"),
                KeyName::of(&BY_ID, id).operation(&Method::POST, "/v1/payments/{id}", [id]),
            ),
            ("/invoices".to_owned(), KeyName::of(&LINE, &(4, "ab01"))),
            ("/share".to_owned(), KeyName::of(&KEY, "ab01").space("shared")),
            (
                "/v1/payments/12/lines".to_owned(),
                KeyName::of_arguments(&(12, 4)).operation(
                    &Method::POST,
                    "/v1/payments/{}/lines",
                    ["12"],
                ),
            ),
        ];
        for (path, name) in cases {
            assert!(found(&engine, &name).await.is_none(), "{path} was not asked for yet");
            let answer = send(server.post(&path, "ab01", json)).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.text());
            let found = found(&engine, &name).await.unwrap_or_else(|| panic!("{path}: {name:?}"));
            assert_eq!(found.record.key, bench.store.last_claim().key, "{path}");
        }
        let request = server.post("/users", "ab01", json).header("x-user", "u");
        assert_eq!(send(request).await.status, 200);
        let name = KeyName::of(&KEY, "ab01").operation(&Method::POST, "/users", none);
        assert!(engine.look_up(&("a", "u")).key(&name).await.unwrap().is_some());
        assert!(engine.look_up("a").key(&name).await.unwrap().is_none());
    }

    // A space that the engine names, and a scope that is everybody's.
    let everybody = Idempotency::builder(bench.store.clone()).scope(Scope::global()).space("api");
    let policy = Policy::new(KEY);
    let server =
        bench.serve_with(everybody.observer(bench.told.observer()), policy, bench.numbered());
    send(server.await.post("/", "k", "x")).await;
    let engine = engine(bench.store.clone()).space("api").build();
    assert!(engine.look_up(&()).key(&KeyName::of(&KEY, "k")).await.unwrap().is_some());
}

async fn the_names_of_one_key_are_those_of_no_other(bench: Bench) {
    let (server, App { engine, .. }) = served(&bench).await;
    send(server.post("/payments", "k", "1")).await;
    let none = [""; 0];
    let at = |method, route| KeyName::of(&KEY, "k").operation(method, route, none);
    assert!(engine.look_up("a").key(&at(&Method::POST, "/payments")).await.unwrap().is_some());
    for other in [
        at(&Method::PUT, "/payments"),
        at(&Method::POST, "/payments/"),
        at(&Method::POST, "/Payments"),
        KeyName::of(&KEY, "K").operation(&Method::POST, "/payments", none),
        KeyName::of(&KEY, "k").space("payments"),
    ] {
        assert!(engine.look_up("a").key(&other).await.unwrap().is_none(), "{other:?}");
    }

    let refused = async |name: KeyName| match engine.look_up("a").key(&name).await {
        Err(LookUpError::Name(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(KeyName::of(&KEY, "k")).await, KeyNameError::NoSpace));
    for parameters in [&[][..], &["1", "2"]] {
        let name = KeyName::of(&KEY, "k");
        let name = name.operation(&Method::POST, "/payments/{id}", parameters.iter().copied());
        let error = refused(name).await;
        let given = parameters.len();
        assert!(
            matches!(&error, KeyNameError::Parameters { expected: 1, given: g, .. } if *g == given),
            "{error}"
        );
    }
    for bad in ["", "k\n", &"k".repeat(256)] {
        let error = refused(payment(bad)).await;
        assert!(matches!(error, KeyNameError::Value(_)), "{bad:?}: {error}");
    }
    let two = KeyName::of(&KEY, &("k", "k")).space("s");
    assert!(matches!(refused(two).await, KeyNameError::Value(_)));
    let unformatted = KeyName::of(&NONCE, "k");
    assert!(matches!(refused(unformatted).await, KeyNameError::Value(_)));
}

async fn what_a_layer_claimed_and_what_the_handler_behind_it_are_two_names(bench: Bench) {
    let engine = bench.engine().build();
    let routes = Router::new()
        .route("/payments/{id}", post(async || "plain"))
        .route("/payments", post(pay))
        .with_state(App { engine: engine.clone(), gate: Gate::default() });
    let server = Server::start(routes.layer(engine.layer(KEY))).await;
    send(server.post("/payments/a%2Fb", "k", "")).await.assert_is(200, "plain", false);
    let plain = KeyName::of(&KEY, "k").operation(&Method::POST, "/payments/{id}", ["a/b"]);
    assert!(found(&engine, &plain).await.is_none(), "no handler has claimed it");
    let layers = found(&engine, &plain.of_layer()).await.unwrap();
    assert!(matches!(layers.became, Became::Completed(_)), "{layers:?}");
    let first = send(server.post("/payments", "k", "7")).await;
    let handlers = found(&engine, &payment("k")).await.unwrap().record;
    let layers = found(&engine, &payment("k").of_layer()).await.unwrap().record;
    assert_ne!(handlers.operation_id, layers.operation_id);
    assert_eq!(first.header("idempotent-operation"), Some(&*layers.operation_id.to_string()));
}

async fn a_functions_key_is_named_by_its_path(bench: Bench) {
    #[idempotent(anchor = arg(id), scope = arg(tenant))]
    async fn job(idem: &Idempotency, tenant: &'static str, id: u64) -> Result<u64, CallError> {
        Ok(id)
    }
    #[idempotent(anchor = arg(id), scope = arg(tenant), space = "jobs")]
    async fn named(idem: &Idempotency, tenant: &'static str, id: u64) -> Result<u64, CallError> {
        Ok(id)
    }
    // An engine's space is for the requests of an API, and no function's.
    for (id, space) in [(7, None), (8, Some("api"))] {
        let engine = match space {
            Some(space) => bench.engine().space(space),
            None => bench.engine(),
        };
        let engine = engine.build();
        let name = |path: &'static str| KeyName::of_arguments(&id).function(path);
        assert!(found(&engine, &name("look_up::job")).await.is_none());
        job(&engine, "a", id).await.unwrap();
        let record = found(&engine, &name("look_up::job")).await.unwrap();
        let Became::Completed(Answer::Value(value)) = &record.became else { panic!("{record:?}") };
        assert_eq!(value.json, id.to_string());
        assert_eq!(&*record.record.operation, "fn look_up::job");
        assert!(found(&engine, &name("look_up::other")).await.is_none());
        named(&engine, "a", id).await.unwrap();
        assert!(found(&engine, &name("look_up::named")).await.is_none());
        for name in [name("look_up::named"), KeyName::of_arguments(&id)] {
            assert!(found(&engine, &name.space("jobs")).await.is_some());
        }
    }
}

async fn what_is_issued_is_told_until_it_is_forgotten(bench: Bench) {
    let (server, App { engine, .. }) = served(&bench).await;
    let [used, unused] = ["0x00000001", "0x00000002"].map(|nonce| KeyName::of(&NONCE, nonce));
    engine.issue(&NONCE, "a", "0x00000001", ()).await.unwrap();
    engine.issue(&NONCE, "a", "00000002", ()).await.unwrap();
    for name in [&used, &unused] {
        let found = found(&engine, name).await.unwrap();
        assert!(matches!(found.became, Became::Issued), "{found:?}");
        assert_eq!(found.record.valid_left, Ttl::For(VALID));
    }
    assert_eq!(send(server.post("/withdrawals", "00000001", "x")).await.status, 200);
    let done = found(&engine, &used).await.unwrap();
    assert!(matches!(done.became, Became::Completed(_)), "{done:?}");
    bench.pass(VALID);
    for name in [&used, &unused] {
        let found = found(&engine, name).await.unwrap();
        assert!(matches!(found.became, Became::Expired), "{found:?}");
    }
    bench.pass(TTL);
    assert!(found(&engine, &used).await.is_none());
}

async fn an_operation_that_was_forgotten_was_never_seen(bench: Bench) {
    let (server, App { engine, .. }) = served(&bench).await;
    assert_eq!(send(server.post("/payments", "k", "bad")).await.status, 422);
    assert!(became(&engine, "k").await.is_none());
    let claim = bench.store.last_claim();
    assert!(engine.look_up("a").operation(claim.operation_id).await.unwrap().is_none());
}

async fn a_record_that_cannot_be_read_is_an_error_and_another_tenants_is_none(bench: Bench) {
    let (server, App { engine, .. }) = served(&bench).await;
    send(server.post("/payments", "k", "bad")).await;
    let template = bench.store.last_claim();

    // Damaged: an answer that is none.
    let claim = Claim { operation_id: OperationId::random(), ..template.clone() };
    assert!(matches!(bench.store.claim(&claim).await, Ok(Claimed::Granted(_))));
    let completion = Completion {
        key: claim.key,
        token: claim.token,
        ttl: claim.ttl,
        flags: Flags::NONE,
        payload: Bytes::from_static(b"garbage"),
        format: FORMAT,
    };
    bench.store.complete(&completion).await.unwrap();
    let kind = |answer: Result<Option<Found>, LookUpError>| match answer {
        Err(LookUpError::Unreadable(error)) => error.kind(),
        other => panic!("{other:?}"),
    };
    let (a, b) = (engine.look_up("a"), engine.look_up("b"));
    assert_eq!(kind(a.key(&payment("k")).await), StoreErrorKind::Corrupt);
    assert_eq!(kind(a.operation(claim.operation_id).await), StoreErrorKind::Corrupt);
    assert!(b.operation(claim.operation_id).await.unwrap().is_none());
    bench.pass(TTL);

    let newer = Claim { operation_id: OperationId::random(), format: FORMAT + 1, ..template };
    assert!(matches!(bench.store.claim(&newer).await, Ok(Claimed::Granted(_))));
    assert_eq!(kind(a.key(&payment("k")).await), StoreErrorKind::Newer);
    assert_eq!(kind(a.operation(newer.operation_id).await), StoreErrorKind::Newer);
    assert!(b.key(&payment("k")).await.unwrap().is_none());
}

async fn a_store_that_cannot_be_searched_still_finds_by_key(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    send(server.post("/", "k", "x")).await;
    let engine = engine(bench.store.unsearchable()).build();
    let name = KeyName::of(&KEY, "k").operation(&Method::POST, "/", [""; 0]);
    let found = engine.look_up("a").key(&name).await.unwrap().unwrap();
    let by_id = engine.look_up("a").operation(found.record.operation_id).await;
    assert!(matches!(by_id, Err(LookUpError::NotSearchable)), "{by_id:?}");
}
