//! The promises: one effect, one answer, no wrong answer.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{FromRef, State},
    http::StatusCode,
    response::{AppendHeaders, IntoResponse},
    routing::post,
};
use http::{HeaderName, header};
use idem_runtime::{Anchor, Idempotency, Outcome, Policy, RefusalKind, Scope, idempotent};
use tests::{
    on_both_stores,
    server::{Effects, Gate, RawAnswer, Server, send},
    stores::Bench,
};
use tokio::sync::Barrier;

const KEY: Anchor = Anchor::header("Idempotency-Key");
const HOUR: Duration = Duration::from_secs(60 * 60);

on_both_stores! {
    the_first_request_runs_and_its_retry_gets_the_same_answer,
    a_retry_gets_every_byte_and_every_header_in_order,
    what_speaks_to_one_caller_or_of_one_moment_is_given_once,
    an_engine_can_leave_out_more_headers_and_keep_others,
    a_replay_does_not_extend_the_time_to_live,
    the_time_to_live_counts_from_the_answer,
    without_a_time_to_live_of_its_own_an_answer_is_kept_for_a_day,
    an_answer_kept_for_ever_has_no_end,
    what_a_handler_says_wins_over_its_anchor_and_that_over_the_engine,
    another_body_under_the_key_is_refused_and_changes_nothing,
    another_query_under_the_key_is_refused,
    a_key_is_its_tenants_own,
    a_request_that_does_not_say_whose_it_is_is_refused_before_any_look_up,
    a_handlers_own_scope_wins_over_the_engines,
    everybody_shares_the_keys_of_a_global_scope,
    a_duplicate_of_a_running_request_is_told_to_wait,
    a_mismatch_wins_over_in_flight,
    a_duplicate_after_the_lease_is_over_takes_over_and_the_first_owner_keeps_silent,
    an_owner_that_was_taken_over_answers_with_what_the_other_recorded,
    the_version_of_http_does_not_count,
}

/// The state of a server whose handlers are annotated.
#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = "1h")]
async fn pay(State(effects): State<Effects>, body: String) -> (StatusCode, String) {
    (StatusCode::CREATED, format!("{} {body}", effects.happen()))
}

async fn serve(bench: &Bench) -> Server {
    let state = App { engine: bench.engine().build(), effects: bench.effects.clone() };
    Server::start(Router::new().route("/payments", post(pay)).with_state(state)).await
}

async fn the_first_request_runs_and_its_retry_gets_the_same_answer(bench: Bench) {
    let server = serve(&bench).await;
    send(server.post("/payments", "k", "100")).await.assert_is(201, "1 100", false);
    for _ in 0..3 {
        send(server.post("/payments", "k", "100")).await.assert_is(201, "1 100", true);
    }
    send(server.post("/payments", "other", "100")).await.assert_is(201, "2 100", false);
    assert_eq!(bench.effects.count(), 2);
    let replays = [Outcome::Replayed; 3];
    let told = [&[Outcome::Recorded][..], &replays, &[Outcome::Recorded]].concat();
    assert_eq!(bench.told.outcomes(), told);
}

/// An answer with all that a careless recording would lose.
fn rich(effects: &Effects) -> impl IntoResponse + use<> {
    let body: Vec<u8> = (0..=255).chain([b'0' + effects.happen() as u8]).collect();
    let headers = [
        ("location", "/payments/7"),
        ("x-repeated", "one"),
        ("etag", "\"v1\""),
        ("x-repeated", "two"),
        ("x-empty", ""),
        ("link", "</a>; rel=\"next\""),
        ("x-repeated", "one"),
        ("content-type", "application/vnd.bank+octets; v=1"),
    ];
    (StatusCode::ACCEPTED, AppendHeaders(headers), body)
}

fn request(key: &str) -> Vec<u8> {
    let head = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-api-key: a\r\n";
    format!("{head}idempotency-key: {key}\r\ncontent-length: 3\r\n\r\n100").into_bytes()
}

async fn ask(server: &Server) -> RawAnswer {
    server.send_raw(&request("k")).await.unwrap()
}

async fn a_retry_gets_every_byte_and_every_header_in_order(bench: Bench) {
    let effects = bench.effects.clone();
    let server = bench.serve(KEY, async move || rich(&effects)).await;
    let (first, retry) = (ask(&server).await, ask(&server).await);
    assert_eq!((first.status, first.body.len()), (202, 257));
    assert_eq!((retry.status, &retry.body), (first.status, &first.body));
    let moment = ["date", "connection", "idempotent-replayed"];
    assert_eq!(retry.lines_but(&moment), first.lines_but(&moment));
    assert!(first.lines.iter().any(|line| line == "x-empty: " || line == "x-empty:"));
    assert_eq!(first.lines.iter().filter(|line| line.starts_with("x-repeated:")).count(), 3);
    assert!(!first.lines.iter().any(|line| line.starts_with("idempotent-replayed")));
    assert!(retry.lines.contains(&"idempotent-replayed: true".to_owned()));
    assert_eq!(bench.effects.count(), 1);
}

/// An answer that speaks to its caller, through its connection, at its time.
fn personal(effects: &Effects) -> impl IntoResponse + use<> {
    effects.happen();
    let headers = [
        (header::SET_COOKIE, "session=1"),
        (header::SET_COOKIE, "theme=dark"),
        (header::DATE, "Thu, 01 Jan 1970 00:00:00 GMT"),
        (header::WWW_AUTHENTICATE, "Bearer"),
        (header::PROXY_AUTHENTICATE, "Basic"),
        (HeaderName::from_static("keep-alive"), "timeout=5"),
        (HeaderName::from_static("server-timing"), "db;dur=53"),
        (header::CONNECTION, "X-Hop , x-none"),
        (HeaderName::from_static("x-hop"), "1"),
        (HeaderName::from_static("x-request"), "1"),
        (HeaderName::from_static("x-kept"), "yes"),
    ];
    (AppendHeaders(headers), "done")
}

const PERSONAL: [&str; 7] = [
    "x-hop",
    "set-cookie",
    "www-authenticate",
    "proxy-authenticate",
    "keep-alive",
    "server-timing",
    "x-request",
];

fn present(answer: &RawAnswer) -> Vec<&'static str> {
    let there = |name: &&str| answer.lines.iter().any(|line| line.starts_with(&format!("{name}:")));
    PERSONAL.into_iter().filter(there).collect()
}

async fn what_speaks_to_one_caller_or_of_one_moment_is_given_once(bench: Bench) {
    let effects = bench.effects.clone();
    let server = bench.serve(KEY, async move || personal(&effects)).await;
    let (first, retry) = (ask(&server).await, ask(&server).await);
    assert_eq!(present(&first), PERSONAL);
    assert!(first.lines.contains(&"date: Thu, 01 Jan 1970 00:00:00 GMT".to_owned()));
    assert_eq!(present(&retry), ["x-request"]);
    assert!(!retry.lines.contains(&"date: Thu, 01 Jan 1970 00:00:00 GMT".to_owned()));
    assert_eq!(retry.lines.iter().filter(|line| line.starts_with("date:")).count(), 1);
    assert!(retry.lines.contains(&"x-kept: yes".to_owned()));
    assert_eq!(bench.effects.count(), 1);
}

async fn an_engine_can_leave_out_more_headers_and_keep_others(bench: Bench) {
    let engine = bench
        .engine()
        .leave_out([HeaderName::from_static("x-request")])
        .keep(&HeaderName::from_static("server-timing"));
    let effects = bench.effects.clone();
    let server = bench.serve_with(engine, KEY, async move || personal(&effects)).await;
    assert_eq!(present(&ask(&server).await), PERSONAL);
    assert_eq!(present(&ask(&server).await), ["server-timing"]);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_replay_does_not_extend_the_time_to_live(bench: Bench) {
    let server = serve(&bench).await;
    send(server.post("/payments", "k", "100")).await.assert_is(201, "1 100", false);
    for _ in 0..2 {
        bench.pass(HOUR / 2 - Duration::from_millis(1));
        send(server.post("/payments", "k", "100")).await.assert_is(201, "1 100", true);
    }
    bench.pass(Duration::from_millis(2));
    send(server.post("/payments", "k", "200")).await.assert_is(201, "2 200", false);
    assert_eq!(bench.effects.count(), 2);
}

async fn the_time_to_live_counts_from_the_answer(bench: Bench) {
    let gate = Gate::default();
    // One that is shorter than the lease, and one that is longer.
    for ttl in [Duration::from_secs(1), HOUR] {
        let (bench, key) = (bench.anew(), format!("{ttl:?}"));
        let server = bench.serve(KEY.ttl(ttl), gate.handler(&bench.effects)).await;
        let first = tokio::spawn(send(server.post("/", &key, "")));
        gate.begun().await;
        bench.pass(ttl / 2);
        gate.end();
        first.await.unwrap().assert_is(200, "effect 1", false);
        bench.pass(ttl - Duration::from_millis(1));
        send(server.post("/", &key, "")).await.assert_is(200, "effect 1", true);
        bench.pass(Duration::from_millis(1));
        gate.end();
        send(server.post("/", &key, "")).await.assert_is(200, "effect 2", false);
        gate.begun().await;
    }
}

async fn without_a_time_to_live_of_its_own_an_answer_is_kept_for_a_day(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    send(server.post("/", "k", "")).await.assert_is(200, "effect 1", false);
    bench.pass(24 * HOUR - Duration::from_millis(1));
    send(server.post("/", "k", "")).await.assert_is(200, "effect 1", true);
    bench.pass(Duration::from_millis(1));
    send(server.post("/", "k", "")).await.assert_is(200, "effect 2", false);
}

async fn an_answer_kept_for_ever_has_no_end(bench: Bench) {
    let server = bench.serve(KEY.forever(), bench.numbered()).await;
    send(server.post("/", "k", "")).await.assert_is(200, "effect 1", false);
    bench.pass(Duration::MAX);
    send(server.post("/", "k", "")).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn what_a_handler_says_wins_over_its_anchor_and_that_over_the_engine(bench: Bench) {
    const ANCHOR: Anchor = KEY.ttl(Duration::from_secs(2 * 3600));
    let policies = [
        (Policy::new(KEY), HOUR),
        (Policy::new(ANCHOR), 2 * HOUR),
        (Policy::new(ANCHOR).ttl(Duration::from_secs(3 * 3600)), 3 * HOUR),
    ];
    for (policy, ttl) in policies {
        let server = bench.serve_with(bench.engine().ttl(HOUR), policy, bench.numbered()).await;
        let key = format!("{ttl:?}");
        let effects = bench.effects.count();
        assert!(!send(server.post("/", &key, "")).await.is_replay());
        bench.pass(ttl - Duration::from_millis(1));
        assert!(send(server.post("/", &key, "")).await.is_replay(), "{ttl:?}");
        bench.pass(Duration::from_millis(1));
        assert!(!send(server.post("/", &key, "")).await.is_replay(), "{ttl:?}");
        assert_eq!(bench.effects.count(), effects + 2);
    }
}

async fn another_body_under_the_key_is_refused_and_changes_nothing(bench: Bench) {
    let server = serve(&bench).await;
    send(server.post("/payments", "k", "100")).await.assert_is(201, "1 100", false);
    let record = bench.store.last_record().await;
    for body in ["101", "100 ", "", "1000"] {
        send(server.post("/payments", "k", body)).await.assert_refused(422, "mismatch");
    }
    assert_eq!(bench.store.last_record().await, record);
    send(server.post("/payments", "k", "100")).await.assert_is(201, "1 100", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn another_query_under_the_key_is_refused(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    send(server.post("/?to=a", "k", "")).await.assert_is(200, "effect 1", false);
    send(server.post("/?to=b", "k", "")).await.assert_refused(422, "mismatch");
    send(server.post("/", "k", "to=a")).await.assert_refused(422, "mismatch");
    send(server.post("/?to=a", "k", "")).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_key_is_its_tenants_own(bench: Bench) {
    let server = serve(&bench).await;
    let by = |tenant: &str, body: &str| {
        let request = server.request(reqwest::Method::POST, "/payments");
        request.header("x-api-key", tenant).header("idempotency-key", "k").body(body.to_owned())
    };
    send(by("a", "100")).await.assert_is(201, "1 100", false);
    send(by("b", "100")).await.assert_is(201, "2 100", false);
    send(by("A", "7")).await.assert_is(201, "3 7", false);
    send(by("a", "100")).await.assert_is(201, "1 100", true);
    send(by("b", "100")).await.assert_is(201, "2 100", true);
    assert_eq!(bench.effects.count(), 3);
}

async fn a_request_that_does_not_say_whose_it_is_is_refused_before_any_look_up(bench: Bench) {
    let server = serve(&bench).await;
    let post = || {
        let request = server.request(reqwest::Method::POST, "/payments");
        request.header("idempotency-key", "k").body("100")
    };
    send(post()).await.assert_refused(401, "scope_missing");
    send(post().header("x-api-key", "")).await.assert_refused(401, "scope_missing");
    let twice = post().header("x-api-key", "a").header("x-api-key", "b");
    send(twice).await.assert_refused(401, "scope_missing");
    let unreadable = post().header("x-api-key", &b"\xff"[..]);
    send(unreadable).await.assert_refused(401, "scope_missing");
    assert_eq!(bench.store.claims().len(), 0);
    assert_eq!(bench.effects.count(), 0);
    assert_eq!(bench.told.outcomes(), [Outcome::Refused(RefusalKind::ScopeMissing); 4]);
}

async fn a_handlers_own_scope_wins_over_the_engines(bench: Bench) {
    const BY_TENANT: Policy = Policy::new(KEY).scope(Scope::header("X-Tenant"));
    let server = bench.serve(BY_TENANT, bench.numbered()).await;
    let by = |tenant: &str| server.post("/", "k", "").header("x-tenant", tenant.to_owned());
    send(by("one")).await.assert_is(200, "effect 1", false);
    send(by("two")).await.assert_is(200, "effect 2", false);
    send(by("one")).await.assert_is(200, "effect 1", true);
    send(server.post("/", "k", "")).await.assert_refused(401, "scope_missing");
    assert_eq!(bench.effects.count(), 2);
}

async fn everybody_shares_the_keys_of_a_global_scope(bench: Bench) {
    let server = bench.serve(Policy::new(KEY).scope(Scope::global()), bench.numbered()).await;
    send(server.post("/", "k", "")).await.assert_is(200, "effect 1", false);
    let nobody = server.request(reqwest::Method::POST, "/").header("idempotency-key", "k");
    send(nobody).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_duplicate_of_a_running_request_is_told_to_wait(bench: Bench) {
    let gate = Gate::default();
    let server = bench.serve(KEY, gate.handler(&bench.effects)).await;
    let first = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    for _ in 0..3 {
        let refused = send(server.post("/", "k", "100")).await;
        refused.assert_refused(409, "in_flight");
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    gate.end();
    first.await.unwrap().assert_is(200, "effect 1", false);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_mismatch_wins_over_in_flight(bench: Bench) {
    let gate = Gate::default();
    let server = bench.serve(KEY, gate.handler(&bench.effects)).await;
    let first = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    let refused = send(server.post("/", "k", "200")).await;
    refused.assert_refused(422, "mismatch");
    assert_eq!(refused.header("retry-after"), None);
    gate.end();
    first.await.unwrap().assert_is(200, "effect 1", false);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_duplicate_after_the_lease_is_over_takes_over_and_the_first_owner_keeps_silent(
    bench: Bench,
) {
    let gate = Gate::default();
    let server = bench.serve(KEY, gate.handler(&bench.effects)).await;
    let first = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    bench.pass(Duration::from_secs(30));
    send(server.post("/", "k", "200")).await.assert_refused(422, "mismatch");
    let second = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    // The first to have begun is the first to end: its claim is lost, and it has no answer.
    gate.end();
    first.await.unwrap().assert_refused(409, "lease_lost");
    gate.end();
    second.await.unwrap().assert_is(200, "effect 2", false);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 2", true);
    assert_eq!(bench.store.last_record().await.unwrap().attempt, 2);
    assert_eq!(bench.effects.count(), 2);
}

async fn an_owner_that_was_taken_over_answers_with_what_the_other_recorded(bench: Bench) {
    let (first_gate, gate, effects) = (Gate::default(), Gate::default(), bench.effects.clone());
    let handler = {
        let (first_gate, gate) = (first_gate.clone(), gate.clone());
        async move || {
            let number = effects.happen();
            if number == 1 {
                first_gate.pass().await
            } else {
                gate.pass().await
            }
            format!("effect {number}")
        }
    };
    let server = bench.serve(KEY, handler).await;
    let first = tokio::spawn(send(server.post("/", "k", "100")));
    first_gate.begun().await;
    bench.pass(Duration::from_secs(30));
    let second = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    gate.end();
    second.await.unwrap().assert_is(200, "effect 2", false);
    first_gate.end();
    first.await.unwrap().assert_is(200, "effect 2", true);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 2", true);
    assert_eq!(bench.effects.count(), 2);
}

async fn the_version_of_http_does_not_count(bench: Bench) {
    let server = serve(&bench).await;
    let newer = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
    let newer = newer.post(format!("http://{}/payments", server.address)).body("100");
    let newer = newer.header("x-api-key", "a").header("idempotency-key", "k");
    send(server.post("/payments", "k", "100")).await.assert_is(201, "1 100", false);
    let replay = newer.send().await.unwrap();
    assert_eq!(replay.version(), reqwest::Version::HTTP_2);
    assert_eq!(replay.headers()["idempotent-replayed"], "true");
    assert_eq!(replay.text().await.unwrap(), "1 100");
    assert_eq!(bench.effects.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_duplicates_at_once_one_runs_in_memory() {
    one_of_a_hundred_runs(Bench::in_memory()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_duplicates_at_once_one_runs_in_sqlite() {
    one_of_a_hundred_runs(Bench::in_sqlite().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_requests_under_one_key_at_once_one_runs() {
    for bench in [Bench::in_memory(), Bench::in_sqlite().await] {
        let server = serve(&bench).await;
        let all = Arc::new(Barrier::new(100));
        let requests: Vec<_> = (0..100)
            .map(|body| {
                let request = server.post("/payments", "k", &body.to_string());
                let all = Arc::clone(&all);
                tokio::spawn(async move {
                    all.wait().await;
                    send(request).await
                })
            })
            .collect();
        let mut owners = 0;
        for (body, request) in requests.into_iter().enumerate() {
            let answer = request.await.unwrap();
            match answer.status {
                201 => answer.assert_is(201, &format!("1 {body}"), false),
                _ => answer.assert_refused(422, "mismatch"),
            }
            owners += usize::from(answer.status == 201);
        }
        assert_eq!((owners, bench.effects.count()), (1, 1));
    }
}

async fn one_of_a_hundred_runs(bench: Bench) {
    let server = serve(&bench).await;
    for round in 1..=5 {
        let key = format!("k{round}");
        let all = Arc::new(Barrier::new(100));
        let requests: Vec<_> = (0..100)
            .map(|_| {
                let (request, all) = (server.post("/payments", &key, "100"), Arc::clone(&all));
                tokio::spawn(async move {
                    all.wait().await;
                    send(request).await
                })
            })
            .collect();
        let mut owners = 0;
        for request in requests {
            let answer = request.await.unwrap();
            match answer.status {
                201 => assert_eq!(answer.text(), format!("{round} 100")),
                _ => answer.assert_refused(409, "in_flight"),
            }
            owners += usize::from(answer.status == 201 && !answer.is_replay());
        }
        assert_eq!((owners, bench.effects.count()), (1, round));
        let retry = send(server.post("/payments", &key, "100")).await;
        retry.assert_is(201, &format!("{round} 100"), true);
    }
}
