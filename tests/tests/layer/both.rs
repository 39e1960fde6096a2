//! A layer and a handler's own policy on one request.

use std::time::Duration;

use axum::{
    Router,
    extract::{FromRef, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn_with_state, map_response},
    response::{AppendHeaders, IntoResponse, Response},
    routing::post,
};
use idem_runtime::{
    Anchor, Handled, Idempotency, IdempotentExt, InFlight, OnUnknown, Operation, Outcome, Policy,
    Recovered, Settle, idempotent,
};
use reqwest::Method;
use tests::{
    faults::{Call, Ground, PATIENCE, eventually},
    on_both_stores,
    server::{Effects, Server, send},
    shop::{Place, Shop},
    stores::Bench,
    with_faults_on_both_stores,
};
use tokio::time::Instant;

use super::{KEY, WRITES, ask, operation_of};

on_both_stores! {
    each_has_a_record_of_its_own,
    a_replay_of_the_handlers_is_an_answer_to_the_layer,
    a_layer_that_comes_later_finds_the_handlers_records,
    a_space_that_both_name_has_one_record,
    under_one_record_the_handler_says_what_an_unknown_outcome_leads_to,
    a_key_that_only_the_handler_uses_is_used,
    what_a_handler_says_of_its_answer_holds_for_both,
    what_a_layer_in_between_did_counts_after_a_refusal,
}

with_faults_on_both_stores!(
    a_crash_between_the_two_records_leaves_one_effect,
    a_lapse_of_both_leases_leaves_one_answer,
    both_waits_share_one_bound,
    a_client_that_does_not_wait_waits_for_neither,
);

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = "2h")]
async fn charge(State(effects): State<Effects>, operation: Operation) -> String {
    format!("{} {}", effects.happen(), operation.id())
}

fn app(bench: &Bench) -> App {
    App { engine: bench.engine().build(), effects: bench.effects.clone() }
}

fn routes(app: &App) -> Router {
    Router::new().route("/", post(charge)).with_state(app.clone())
}

async fn each_has_a_record_of_its_own(bench: Bench) {
    let app = app(&bench);
    let server = Server::start(routes(&app).layer(app.engine.layer(WRITES))).await;
    let first = ask(&server, Method::POST, "/").await;
    assert!(first.text().starts_with("1 ") && !first.text().contains(&operation_of(&first)));
    let claims = bench.store.claims();
    assert_eq!(claims.len(), 2);
    assert_ne!(claims[0].key, claims[1].key);
    assert_eq!(operation_of(&first), claims[0].operation_id.to_string());
    assert_eq!(first.text(), format!("1 {}", claims[1].operation_id));
    assert_eq!(bench.told.outcomes(), [Outcome::Recorded; 2]);

    // The retry does not get as far as the handler's policy.
    let retry = ask(&server, Method::POST, "/").await;
    retry.assert_is(200, &first.text(), true);
    assert_eq!((bench.store.claims().len(), operation_of(&retry)), (3, operation_of(&first)));
}

async fn a_replay_of_the_handlers_is_an_answer_to_the_layer(bench: Bench) {
    let app = app(&bench);
    let hour = WRITES.ttl(Duration::from_secs(60 * 60));
    let server = Server::start(routes(&app).layer(app.engine.layer(hour))).await;
    let first = ask(&server, Method::POST, "/").await;
    bench.pass(Duration::from_secs(90 * 60));
    let again = ask(&server, Method::POST, "/").await;
    again.assert_is(200, &first.text(), true);
    assert_ne!(operation_of(&again), operation_of(&first), "the layer's record was over");
    let told = [Outcome::Recorded, Outcome::Recorded, Outcome::Replayed, Outcome::Recorded];
    assert_eq!(bench.told.outcomes(), told);
    // By now the handler's is over, and the layer's is not.
    bench.pass(Duration::from_secs(45 * 60));
    let last = ask(&server, Method::POST, "/").await;
    last.assert_is(200, &first.text(), true);
    assert_eq!((operation_of(&last), bench.effects.count()), (operation_of(&again), 1));
}

async fn a_layer_that_comes_later_finds_the_handlers_records(bench: Bench) {
    let app = app(&bench);
    let before = Server::start(routes(&app)).await;
    let first = ask(&before, Method::POST, "/").await;
    let after = Server::start(routes(&app).layer(app.engine.layer(WRITES))).await;
    ask(&after, Method::POST, "/").await.assert_is(200, &first.text(), true);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_space_that_both_name_has_one_record(bench: Bench) {
    let engine = bench.engine().build();
    const SHARED: Policy = Policy::new(KEY).space("money");
    let effects = bench.effects.clone();
    let handler =
        async move |operation: Operation| format!("{} {}", effects.happen(), operation.id());
    let routes = Router::new().route("/", post(handler.idempotent(SHARED)));
    let routes = routes.with_state(engine.clone()).layer(engine.layer(SHARED));
    let server = Server::start(routes).await;
    let first = ask(&server, Method::POST, "/").await;
    assert_eq!(first.text(), format!("1 {}", operation_of(&first)));
    ask(&server, Method::POST, "/").await.assert_is(200, &first.text(), true);
    assert_eq!(bench.told.outcomes(), [Outcome::Recorded, Outcome::Replayed]);
}

/// The layer by itself would have it run again.
async fn under_one_record_the_handler_says_what_an_unknown_outcome_leads_to(bench: Bench) {
    const REFUSE: Policy = Policy::new(KEY).on_unknown(OnUnknown::Refuse);
    const ASK: Policy = Policy::new(KEY).recover(|request| {
        Box::pin(async move {
            match request.headers().contains_key("x-known") {
                true => Recovered::answered((StatusCode::CREATED, "as the bank says")),
                false => Recovered::unknown(),
            }
        })
    });
    let engine = bench.engine().space("money").build();
    let effects = bench.effects.clone();
    let handler = async move || (Settle::uncertain(), effects.happen().to_string());
    let routes = Router::new()
        .route("/refuse", post(handler.clone().idempotent(REFUSE)))
        .route("/ask", post(handler.idempotent(ASK)));
    let layered = routes.with_state(engine.clone()).layer(engine.layer(KEY));
    let server = Server::start(layered).await;
    for (path, key, effect) in [("/refuse", "1", "1"), ("/ask", "2", "2")] {
        send(server.post(path, key, "")).await.assert_is(200, effect, false);
        for _ in 0..2 {
            send(server.post(path, key, "")).await.assert_refused(409, "unknown_outcome");
        }
    }
    let known = send(server.post("/ask", "2", "").header("x-known", "1")).await;
    known.assert_is(201, "as the bank says", true);
    send(server.post("/ask", "2", "")).await.assert_is(201, "as the bank says", true);
    assert_eq!(bench.effects.count(), 2);
}

async fn a_key_that_only_the_handler_uses_is_used(bench: Bench) {
    let app = app(&bench);
    let other = Policy::new(Anchor::header("X-Other")).optional();
    let see = async |response: Response| -> Response {
        let handled = response.extensions().get::<Handled>().copied();
        let seen = handled.map_or("nothing", |handled| handled.outcome.name());
        ([("x-seen", seen)], response).into_response()
    };
    let layered = routes(&app).layer(app.engine.layer(other)).layer(map_response(see));
    let server = Server::start(layered).await;
    for (replay, seen) in [(false, "recorded"), (true, "replayed")] {
        let answer = ask(&server, Method::POST, "/").await;
        assert_eq!((answer.is_replay(), answer.header("x-seen")), (replay, Some(seen)));
        assert!(answer.text().ends_with(&operation_of(&answer)), "{answer:?}");
    }
    let both = server.post("/", "k2", "").header("x-other", "o");
    assert_eq!(send(both).await.header("x-seen"), Some("recorded"));
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn says(State(effects): State<Effects>, body: String) -> (StatusCode, Settle, String) {
    let settle = match body.as_str() {
        "secret" => Settle::tombstone(),
        "unsure" => Settle::uncertain(),
        _ => Settle::recorded(),
    };
    let status = if body == "final" { StatusCode::CONFLICT } else { StatusCode::OK };
    (status, settle, format!("effect {}", effects.happen()))
}

async fn what_a_handler_says_of_its_answer_holds_for_both(bench: Bench) {
    let app = app(&bench);
    let routes = Router::new().route("/", post(says)).with_state(app.clone());
    let server = Server::start(routes.layer(app.engine.layer(WRITES))).await;
    send(server.post("/", "1", "final")).await.assert_is(409, "effect 1", false);
    send(server.post("/", "1", "final")).await.assert_is(409, "effect 1", true);
    send(server.post("/", "2", "secret")).await.assert_is(200, "effect 2", false);
    send(server.post("/", "2", "secret")).await.assert_refused(410, "not_replayable");
    // Recorded by the layer, it would never be tried again.
    send(server.post("/", "3", "unsure")).await.assert_is(200, "effect 3", false);
    send(server.post("/", "3", "unsure")).await.assert_is(200, "effect 4", false);
    let ends = [Outcome::Recorded, Outcome::Tombstoned, Outcome::Released];
    let twice: Vec<_> =
        bench.told.outcomes().into_iter().filter(|told| ends.contains(told)).collect();
    assert_eq!(twice, [ends[0], ends[0], ends[1], ends[1], ends[2], ends[2], ends[2], ends[2]]);
}

/// A layer that takes a step of its own.
async fn audit(
    State(effects): State<Effects>,
    operation: Operation,
    request: Request,
    next: Next,
) -> impl IntoResponse {
    let audit = async || Ok::<_, StatusCode>(effects.happen());
    let number = operation.step("audit", audit()).await.unwrap();
    (AppendHeaders([("x-audit", number.to_string())]), next.run(request).await)
}

async fn what_a_layer_in_between_did_counts_after_a_refusal(bench: Bench) {
    let app = app(&bench);
    let audit = from_fn_with_state(app.effects.clone(), audit);
    let other = Policy::new(Anchor::header("X-Own"));
    let routes = Router::new().route("/", post((async || "done").idempotent(other)));
    let routes = routes.with_state(app.engine.clone()).layer(audit);
    let server = Server::start(routes.layer(app.engine.layer(WRITES))).await;
    let refused = ask(&server, Method::POST, "/").await;
    refused.assert_refused(400, "key_missing");
    assert_eq!(bench.told.outcomes()[1..], [Outcome::Released]);
    let retry = send(server.post("/", "k", "").header("x-own", "o")).await;
    retry.assert_is(200, "done", false);
    assert_eq!(
        (retry.header("x-audit"), operation_of(&retry)),
        (Some("1"), operation_of(&refused))
    );
    assert_eq!(bench.effects.count(), 1);
}

/// A process: the shop's annotated handler under a layer.
async fn layered(shop: &Shop, policy: Policy) -> Server {
    Server::start(shop.router().layer(shop.engine.layer(policy))).await
}

const LAPSE: Duration = Duration::from_secs(31);

async fn a_crash_between_the_two_records_leaves_one_effect(ground: Ground) {
    let (dead, faults) = Shop::over(&ground);
    let server = layered(&dead, WRITES).await;
    let (inner, outer) = (faults.hold_after(Call::Complete), faults.hold_before(Call::Complete));
    let caller = tokio::spawn(server.post("/pay", "k", "201").send());
    inner.reached().await;
    inner.open();
    outer.reached().await;
    // The handler's record is written, the layer's is not: from here on nothing of it is heard.
    faults.cut_off();
    ground.clock.advance(LAPSE);

    let (alive, _) = Shop::over(&ground);
    let server = layered(&alive, WRITES).await;
    let retry = send(server.post("/pay", "k", "201")).await;
    assert_eq!((retry.status, retry.is_replay()), (201, true));
    assert!(retry.text().starts_with("attempt 1 of"), "{}", retry.text());
    assert_eq!((dead.effects.count(), alive.effects.count()), (1, 0));
    assert_eq!((alive.told(Outcome::Replayed), alive.told(Outcome::Recorded)), (1, 1));
    let again = send(server.post("/pay", "k", "201")).await;
    assert_eq!((again.text(), operation_of(&again)), (retry.text(), operation_of(&retry)));
    caller.abort();
}

async fn a_lapse_of_both_leases_leaves_one_answer(ground: Ground) {
    let (slow, _) = Shop::over(&ground);
    let slow_server = layered(&slow, WRITES).await;
    let held = slow.hold_at(Place::AfterEffect);
    let running = tokio::spawn(send(slow_server.post("/pay", "k", "201")));
    held.reached().await;
    ground.clock.advance(LAPSE);
    let (other, _) = Shop::over(&ground);
    let other_server = layered(&other, WRITES).await;
    let taken_over = send(other_server.post("/pay", "k", "201")).await;
    assert!(taken_over.text().starts_with("attempt 2 of"), "{}", taken_over.text());
    held.open();
    let late = running.await.expect("an answer");
    assert_eq!((late.text(), late.is_replay()), (taken_over.text(), true));
    assert_eq!(operation_of(&late), operation_of(&taken_over));
    // What both attempts of the handler would send downstream is the same.
    assert_eq!(slow.operation().derive("psp"), other.operation().derive("psp"));
}

const SHORT: Duration = Duration::from_millis(300);

/// Two keys of the layer's for one key of the handler's, of which the first is held up.
async fn two_for_one(ground: &Ground, outer: InFlight) -> (Shop, Server, tests::faults::Gate) {
    let (shop, _) = Shop::with(ground, |engine| engine.in_flight(InFlight::Wait(PATIENCE)));
    let policy = Policy::new(Anchor::header("X-Outer")).in_flight(outer);
    let server = layered(&shop, policy).await;
    let held = shop.hold_at(Place::BeforeEffect);
    tokio::spawn(server.post("/pay", "k", "201").header("x-outer", "one").send());
    held.reached().await;
    (shop, server, held)
}

async fn both_waits_share_one_bound(ground: Ground) {
    let (shop, server, held) = two_for_one(&ground, InFlight::Wait(SHORT)).await;
    let start = Instant::now();
    let ask =
        async |outer: &str| send(server.post("/pay", "k", "201").header("x-outer", outer)).await;
    // One waits at the handler's policy, the other one at the layer's.
    for outer in ["two", "one"] {
        let start = Instant::now();
        ask(outer).await.assert_refused(409, "in_flight");
        let waited = start.elapsed();
        assert!(waited >= SHORT && waited < PATIENCE / 2, "{outer}: {waited:?}");
    }
    assert!(start.elapsed() < PATIENCE / 2);
    held.open();
    eventually("it is done", || shop.told(Outcome::Recorded) == 2).await;
    assert!(ask("two").await.is_replay() && ask("one").await.is_replay());
    assert_eq!(shop.effects.count(), 1);

    // A layer that does not wait sets no bound: the handler's own holds.
    let (shop, server, held) = two_for_one(&Ground::memory().await, InFlight::Reject).await;
    let waiting = server.post("/pay", "k", "201").header("x-outer", "two");
    let waiting = tokio::spawn(send(waiting));
    tokio::time::sleep(SHORT).await;
    assert!(!waiting.is_finished());
    held.open();
    assert!(waiting.await.expect("an answer").is_replay());
    assert_eq!(shop.effects.count(), 1);
}

async fn a_client_that_does_not_wait_waits_for_neither(ground: Ground) {
    let (_shop, server, held) = two_for_one(&ground, InFlight::Wait(PATIENCE)).await;
    for outer in ["two", "one"] {
        let start = Instant::now();
        let request = server.post("/pay", "k", "201").header("x-outer", outer);
        send(request.header("prefer", "wait=0")).await.assert_refused(409, "in_flight");
        assert!(start.elapsed() < PATIENCE / 2, "{outer}");
    }
    held.open();
}
