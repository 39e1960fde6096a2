//! Fingerprints: what makes two requests the same, also across a deploy that changes it.

use axum::{
    Router,
    body::Body,
    extract::{FromRef, Path, State},
    http::StatusCode,
    routing::post,
};
use idem_runtime::{Anchor, FingerprintScheme, Idempotency, IdempotentExt, Policy, idempotent};
use tests::{
    on_both_stores,
    server::{Answer, Effects, Gate, Server, send},
    stores::Bench,
};

const KEY: Anchor = Anchor::header("Idempotency-Key");

on_both_stores! {
    request_covers_every_byte,
    json_covers_what_the_body_means,
    json_refuses_a_body_that_can_be_read_in_two_ways,
    body_field_covers_nothing_else,
    exclude_covers_everything_else,
    none_covers_nothing,
    named_headers_count_and_what_clients_change_in_each_attempt_does_not,
    after_a_deploy_that_changes_the_scheme_a_retry_is_replayed,
    after_a_deploy_that_changes_the_scheme_a_released_request_runs_again,
    after_a_deploy_that_changes_the_scheme_a_running_request_is_in_flight,
    after_a_deploy_a_body_that_the_old_scheme_would_refuse_is_a_mismatch,
    after_a_deploy_that_ignores_the_body_a_body_beyond_the_limit_is_no_retry,
    after_a_deploy_a_body_that_the_handler_has_taken_is_no_mismatch,
    a_record_under_a_scheme_of_another_release_is_neither_replayed_nor_run_over,
}

const SENT: &str = r#"{"amount":100,"to":"a","at":{"ms":1}}"#;

/// Sends a body that runs, then others that are its retries, then others that are not.
async fn check(bench: &Bench, scheme: FingerprintScheme, same: &[&str], other: &[&str]) {
    let server = bench.serve(Policy::new(KEY).fingerprint(scheme), bench.numbered()).await;
    send(server.post("/", "k", SENT)).await.assert_is(200, "effect 1", false);
    for body in same {
        let answer = send(server.post("/", "k", body)).await;
        assert!(answer.is_replay(), "{body}: {}", answer.text());
    }
    for body in other {
        let answer = send(server.post("/", "k", body)).await;
        assert_eq!((answer.status, answer.code().as_str()), (422, "mismatch"), "{body}");
    }
    assert_eq!(bench.effects.count(), 1);
}

async fn request_covers_every_byte(bench: Bench) {
    let other = [
        r#"{"amount":100.0,"to":"a","at":{"ms":1}}"#,
        r#"{"to":"a","amount":100,"at":{"ms":1}}"#,
        r#"{"amount":100,"to":"a","at":{"ms":1}} "#,
        "",
    ];
    check(&bench, FingerprintScheme::request(), &[SENT], &other).await;
}

const REWRITTEN: &str = "{ \"to\": \"\\u0061\",\n\"amount\": 1.00e2, \"at\": {\"ms\": 1} }";

async fn json_covers_what_the_body_means(bench: Bench) {
    let other = [
        r#"{"amount":101,"to":"a","at":{"ms":1}}"#,
        r#"{"amount":"100","to":"a","at":{"ms":1}}"#,
        r#"{"amount":100,"to":"a","at":{"ms":1},"x":null}"#,
        r#"{"amount":100.00000000000000000001,"to":"a","at":{"ms":1}}"#,
        "not json",
        "",
    ];
    check(&bench, FingerprintScheme::json(), &[SENT, REWRITTEN], &other).await;
}

async fn json_refuses_a_body_that_can_be_read_in_two_ways(bench: Bench) {
    let policy = Policy::new(KEY).fingerprint(FingerprintScheme::json());
    let server = bench.serve(policy, bench.numbered()).await;
    for body in [r#"{"a":1,"a":2}"#, r#"[{"b":{"a":1,"\u0061":1}}]"#] {
        send(server.post("/", "k", body)).await.assert_refused(400, "body_malformed");
    }
    let fields = Policy::new(KEY).fingerprint(FingerprintScheme::body_fields(&["to"]));
    let server = bench.serve(fields, bench.numbered()).await;
    for body in [r#"{"to":1,"to":1}"#, r#"{"to":{"a":1,"a":2}}"#] {
        send(server.post("/", "k", body)).await.assert_refused(400, "body_malformed");
    }
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
}

async fn body_field_covers_nothing_else(bench: Bench) {
    let scheme = FingerprintScheme::body_fields(&["to", "at.ms"]);
    let same = [REWRITTEN, r#"{"to":"a","at":{"ms":1}}"#, r#"{"to":"a","at":{"ms":1.0,"x":[]}}"#];
    let other = [
        r#"{"to":"b","at":{"ms":1}}"#,
        r#"{"to":"a","at":{"ms":2}}"#,
        r#"{"to":"a","at":{"ms":null}}"#,
        r#"{"to":"a"}"#,
        "not json",
    ];
    check(&bench, scheme, &same, &other).await;
}

async fn exclude_covers_everything_else(bench: Bench) {
    let same = [
        REWRITTEN,
        r#"{"amount":100,"to":"a","at":{"ms":2}}"#,
        r#"{"amount":100,"to":"a","at":{}}"#,
    ];
    let other = [
        r#"{"amount":101,"to":"a","at":{"ms":1}}"#,
        r#"{"amount":100,"to":"a","at":{"ms":1},"ms":1}"#,
        r#"{"amount":100,"to":"a"}"#,
    ];
    check(&bench, FingerprintScheme::exclude(&["at.ms"]), &same, &other).await;
}

async fn none_covers_nothing(bench: Bench) {
    check(&bench, FingerprintScheme::none(), &["", "other", "{"], &[]).await;
}

async fn named_headers_count_and_what_clients_change_in_each_attempt_does_not(bench: Bench) {
    const SCHEME: FingerprintScheme = FingerprintScheme::request().headers(&["X-Currency"]);
    let server = bench.serve(Policy::new(KEY).fingerprint(SCHEME), bench.numbered()).await;
    let pay = |currency: &str, retry: &str| {
        let request = server.post("/", "k", SENT).header("x-stainless-retry-count", retry);
        request.header("x-currency", currency)
    };
    send(pay("EUR", "0")).await.assert_is(200, "effect 1", false);
    send(pay("EUR", "1")).await.assert_is(200, "effect 1", true);
    send(pay("USD", "1")).await.assert_refused(422, "mismatch");
    send(pay("EUR", "1").header("x-currency", "EUR")).await.assert_refused(422, "mismatch");
    send(server.post("/", "k", SENT)).await.assert_refused(422, "mismatch");
    assert_eq!(bench.effects.count(), 1);
}

/// Every scheme, so that each is deployed after each.
const SCHEMES: [FingerprintScheme; 7] = [
    FingerprintScheme::request(),
    FingerprintScheme::json(),
    FingerprintScheme::body_fields(&["amount", "to"]),
    FingerprintScheme::exclude(&["at"]),
    FingerprintScheme::none(),
    FingerprintScheme::request().headers(&["x-currency"]),
    FingerprintScheme::none().headers(&["x-currency"]),
];

/// What is another request under each of them.
const OTHER: &str = r#"{"amount":7,"to":"a","at":{"ms":1}}"#;

fn post_in(
    server: &Server,
    key: &str,
    body: &str,
    currency: &'static str,
) -> reqwest::RequestBuilder {
    server.post("/", key, body).header("x-currency", currency)
}

/// For each pair of schemes: a server before the deploy, one after it, and a key.
async fn deploys<H, T>(
    bench: &Bench,
    handler: H,
) -> Vec<(FingerprintScheme, Server, Server, String)>
where
    H: axum::handler::Handler<T, Idempotency>,
    T: 'static,
{
    let mut deploys = Vec::new();
    for (i, old) in SCHEMES.into_iter().enumerate() {
        for (j, new) in SCHEMES.into_iter().enumerate().filter(|(j, _)| i != *j) {
            let before = bench.serve(Policy::new(KEY).fingerprint(old), handler.clone()).await;
            let after = bench.serve(Policy::new(KEY).fingerprint(new), handler.clone()).await;
            deploys.push((old, before, after, format!("key {i} {j}")));
        }
    }
    deploys
}

/// A request that is another one under the scheme, if there is any.
async fn send_another(server: &Server, scheme: FingerprintScheme, key: &str) -> Option<Answer> {
    match scheme {
        _ if scheme == FingerprintScheme::none() => None,
        _ if scheme == SCHEMES[6] => Some(send(post_in(server, key, SENT, "USD")).await),
        _ => Some(send(post_in(server, key, OTHER, "EUR")).await),
    }
}

async fn after_a_deploy_that_changes_the_scheme_a_retry_is_replayed(bench: Bench) {
    for (old, before, after, key) in deploys(&bench, bench.numbered()).await {
        let first = send(post_in(&before, &key, SENT, "EUR")).await;
        let effects = bench.effects.count();
        let retry = send(post_in(&after, &key, SENT, "EUR")).await;
        retry.assert_is(200, &first.text(), true);
        if let Some(other) = send_another(&after, old, &key).await {
            other.assert_refused(422, "mismatch");
        }
        assert_eq!(bench.effects.count(), effects, "{old} {key}");
    }
}

async fn after_a_deploy_that_changes_the_scheme_a_released_request_runs_again(bench: Bench) {
    let effects = bench.effects.clone();
    // Every second run has an answer.
    let handler = async move || match effects.happen() % 2 {
        0 => Ok(format!("effect {}", effects.count())),
        _ => Err(StatusCode::BAD_GATEWAY),
    };
    for (old, before, after, key) in deploys(&bench, handler).await {
        assert_eq!(send(post_in(&before, &key, SENT, "EUR")).await.status, 502);
        let effects = bench.effects.count();
        if let Some(other) = send_another(&after, old, &key).await {
            other.assert_refused(422, "mismatch");
        }
        assert_eq!(bench.effects.count(), effects, "{old} {key}");
        let retry = send(post_in(&after, &key, SENT, "EUR")).await;
        retry.assert_is(200, &format!("effect {}", effects + 1), false);
        assert_eq!(bench.store.last_record().await.map(|record| record.attempt), Some(2));
        // Whichever release is asked, the record is the same request's.
        for server in [&before, &after] {
            assert!(send(post_in(server, &key, SENT, "EUR")).await.is_replay(), "{old} {key}");
        }
    }
}

async fn after_a_deploy_that_changes_the_scheme_a_running_request_is_in_flight(bench: Bench) {
    let gate = Gate::default();
    for (old, before, after, key) in deploys(&bench, gate.handler(&bench.effects)).await {
        let first = tokio::spawn(send(post_in(&before, &key, SENT, "EUR")));
        gate.begun().await;
        send(post_in(&after, &key, SENT, "EUR")).await.assert_refused(409, "in_flight");
        if let Some(other) = send_another(&after, old, &key).await {
            other.assert_refused(422, "mismatch");
        }
        gate.end();
        assert_eq!(first.await.map(|answer| answer.status).ok(), Some(200));
    }
    assert_eq!(bench.effects.count(), SCHEMES.len() * (SCHEMES.len() - 1));
}

async fn after_a_deploy_a_body_that_the_old_scheme_would_refuse_is_a_mismatch(bench: Bench) {
    let of = |scheme| Policy::new(KEY).fingerprint(scheme);
    let before = bench.serve(of(FingerprintScheme::json()), bench.numbered()).await;
    let after = bench.serve(of(FingerprintScheme::request()), bench.numbered()).await;
    send(before.post("/", "k", SENT)).await.assert_is(200, "effect 1", false);
    send(after.post("/", "k", r#"{"a":1,"a":1}"#)).await.assert_refused(422, "mismatch");
    send(after.post("/", "k", SENT)).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn after_a_deploy_that_ignores_the_body_a_body_beyond_the_limit_is_no_retry(bench: Bench) {
    let of = |scheme| post(bench.numbered().idempotent(Policy::new(KEY).fingerprint(scheme)));
    let engine = bench.engine().request_body_limit(SENT.len()).build();
    let before = Router::new().route("/", of(FingerprintScheme::request()));
    let after = Router::new().route("/", of(FingerprintScheme::none()));
    let before = Server::start(before.with_state(engine.clone())).await;
    let after = Server::start(after.with_state(engine)).await;
    send(before.post("/", "k", SENT)).await.assert_is(200, "effect 1", false);
    let larger = format!("{SENT} ");
    send(after.post("/", "k", &larger)).await.assert_refused(422, "mismatch");
    send(after.post("/", "k", SENT)).await.assert_is(200, "effect 1", true);
    send(after.post("/", "new", &larger)).await.assert_is(200, "effect 2", false);
    assert_eq!(bench.effects.count(), 2);
}

#[idempotent(anchor = arg(order))]
async fn upload(State(effects): State<Effects>, Path(order): Path<u32>, _body: Body) -> String {
    format!("{order} {}", effects.happen())
}

#[idempotent(anchor = arg(order), fingerprint = none)]
async fn stream(State(effects): State<Effects>, Path(order): Path<u32>, _body: Body) -> String {
    format!("{order} {}", effects.happen())
}

async fn after_a_deploy_a_body_that_the_handler_has_taken_is_no_mismatch(bench: Bench) {
    let state = App { engine: bench.engine().build(), effects: bench.effects.clone() };
    let before = Router::new().route("/{order}", post(upload)).with_state(state.clone());
    let after = Router::new().route("/{order}", post(stream)).with_state(state);
    let (before, after) = (Server::start(before).await, Server::start(after).await);
    send(before.post_without_key("/7", SENT)).await.assert_is(200, "7 1", false);
    send(before.post_without_key("/7", SENT)).await.assert_is(200, "7 1", true);
    send(after.post_without_key("/7", SENT)).await.assert_refused(503, "record_unreadable");
    send(after.post_without_key("/8", SENT)).await.assert_is(200, "8 2", false);
    send(before.post_without_key("/8", SENT)).await.assert_is(200, "8 2", true);
    assert_eq!(bench.effects.count(), 2);
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

async fn a_record_under_a_scheme_of_another_release_is_neither_replayed_nor_run_over(bench: Bench) {
    use idem_runtime::{Flags, RecordedResponse, Token, store::Store};
    let server = bench.serve(KEY, async || StatusCode::BAD_REQUEST).await;
    assert_eq!(send(server.post("/", "k", SENT)).await.status, 400);
    let mut claim = bench.store.last_claim();
    claim.fingerprint.scheme = "quantum/7".into();
    claim.token = Token::random();
    assert!(bench.store.claim(&claim).await.is_ok());
    send(server.post("/", "k", SENT)).await.assert_refused(503, "record_unreadable");
    let completion = idem_runtime::store::Completion {
        key: claim.key,
        token: claim.token,
        ttl: claim.ttl,
        flags: Flags::NONE,
        payload: RecordedResponse::encode(200, &[], b"theirs"),
        format: claim.format,
    };
    assert!(bench.store.complete(&completion).await.is_ok());
    let record = bench.store.last_record().await;
    let server = bench.serve(KEY, bench.numbered()).await;
    send(server.post("/", "k", SENT)).await.assert_refused(503, "record_unreadable");
    assert_eq!((bench.effects.count(), bench.store.last_record().await), (0, record));
}
