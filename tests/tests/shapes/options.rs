//! Every option of the attribute, and what it changes.

use std::time::Duration;

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Request, Response, StatusCode},
    response::IntoResponse,
    routing::{self, MethodRouter},
};
use idem_runtime::{
    FingerprintScheme, Format, Idempotency, Operation, Refusal, idempotent,
    store::{Clock, MemoryStore},
};
use tests::{
    faults::Ground,
    server::{Effects, Remember, engine},
};
use tokio::sync::Notify;

use crate::support::{answers_and_replays, ask, at, post, share_a_key, under, with, without_key};

const TEN_MINUTES: Duration = Duration::from_secs(600);

#[idempotent(anchor = header("Idempotency-Key"), ttl = "10m")]
async fn for_ten_minutes(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = TEN_MINUTES)]
async fn for_a_constant_time(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = forever)]
async fn for_ever(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn as_the_engine_says(body: String) -> String {
    body
}

#[tokio::test]
async fn ttl_bounds_how_long_an_answer_is_replayed() {
    let clock = Clock::manual();
    let store = MemoryStore::builder().clock(clock.clone()).build();
    let app = Router::new()
        .route("/10m", routing::post(for_ten_minutes))
        .route("/constant", routing::post(for_a_constant_time))
        .route("/ever", routing::post(for_ever))
        .route("/default", routing::post(as_the_engine_says))
        .with_state(engine(store).build());
    for path in ["/10m", "/constant", "/ever", "/default"] {
        answers_and_replays(&app, post(path, "a")).await;
    }
    clock.advance(TEN_MINUTES - Duration::from_millis(1));
    assert!(ask(&app, &post("/10m", "a")).await.is_replay());
    clock.advance(Duration::from_secs(1));
    for path in ["/10m", "/constant"] {
        assert!(!ask(&app, &post(path, "a")).await.is_replay(), "{path}");
    }
    assert!(ask(&app, &post("/default", "a")).await.is_replay());
    clock.advance(Duration::from_secs(400 * 24 * 60 * 60));
    assert!(!ask(&app, &post("/default", "a")).await.is_replay());
    assert!(ask(&app, &post("/ever", "a")).await.is_replay());
}

const SPACE: &str = "payments";

#[idempotent(anchor = header("Idempotency-Key"), space = "payments")]
async fn in_the_space(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), space = SPACE)]
async fn in_the_constant_space(body: String) -> String {
    body
}

#[tokio::test]
async fn handlers_of_one_space_share_their_keys() {
    let app = Router::new()
        .route("/a", routing::post(in_the_space))
        .route("/b", routing::post(in_the_constant_space))
        .route("/c", routing::post(as_the_engine_says))
        .with_state(crate::support::idem());
    assert!(share_a_key(&app, &post("/a", "x"), &post("/b", "x")).await);
    assert!(!share_a_key(&app, &post("/a", "x"), &post("/c", "x")).await);
}

#[idempotent(anchor = header("Idempotency-Key"), format = uuid)]
async fn uuids(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), format = hex(2))]
async fn two_bytes_in_hex(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), format = text(3..=5))]
async fn short_text(body: String) -> String {
    body
}

const FORMAT: Format = Format::Hex(2);

#[idempotent(anchor = header("Idempotency-Key"), format = FORMAT)]
async fn of_a_constant_format(body: String) -> String {
    body
}

#[tokio::test]
async fn format_checks_a_key_and_brings_it_into_one_spelling() {
    async fn accepts(
        handler: MethodRouter<Idempotency>,
        twins: [&'static str; 2],
        not: &'static str,
    ) {
        let app = at("/", handler);
        let [one, two] = twins.map(|key| under(key, post("/", "a")));
        assert!(share_a_key(&app, &one, &two).await);
        let answer = ask(&app, &under(not, post("/", "a"))).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "key_malformed"));
    }
    let twins = ["6F9619FF-8B86-4011-B42D-00C04FC964FF", "6f9619ff8b864011b42d00c04fc964ff"];
    accepts(routing::post(uuids), twins, "6f9619ff").await;
    accepts(routing::post(two_bytes_in_hex), ["0xABCD", "abcd"], "abc").await;
    accepts(routing::post(of_a_constant_format), ["0xABCD", "abcd"], "xyzw").await;
    accepts(routing::post(short_text), ["\"abc\"", "abc"], "abcdef").await;
}

#[idempotent(anchor = header("Idempotency-Key"), optional)]
async fn optional(State(_engine): State<Idempotency>, operation: Operation) -> String {
    operation.id().to_string()
}

#[tokio::test]
async fn optional_lets_requests_without_a_key_run_as_plain_axum() {
    let app = at("/", routing::post(optional));
    let request = without_key(post("/", ""));
    let (first, second) = (ask(&app, &request).await, ask(&app, &request).await);
    assert!(first.status == 200 && second.status == 200 && first.text() != second.text());
    answers_and_replays(&app, post("/", "")).await;

    let answer = ask(&at("/", routing::post(as_the_engine_says)), &request).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "key_missing"));
}

#[idempotent(anchor = header("Idempotency-Key"), fingerprint = request)]
async fn by_request(_body: String) {}

#[idempotent(anchor = header("Idempotency-Key"), fingerprint = json)]
async fn by_json(_body: String) {}

#[idempotent(anchor = header("Idempotency-Key"), fingerprint = none)]
async fn by_nothing(_body: String) {}

#[idempotent(anchor = header("Idempotency-Key"), fingerprint = body_field("a", "/b/c"))]
async fn by_fields(_body: String) {}

#[idempotent(anchor = header("Idempotency-Key"), fingerprint = exclude("at"))]
async fn by_all_but_one(_body: String) {}

#[idempotent(
    anchor = header("Idempotency-Key"),
    fingerprint = (json, header("X-Version"), header("X-Region")),
)]
async fn by_json_and_headers(_body: String) {}

const SCHEME: FingerprintScheme = FingerprintScheme::exclude(&["at"]);

#[idempotent(anchor = header("Idempotency-Key"), fingerprint = SCHEME)]
async fn by_a_constant(_body: String) {}

#[tokio::test]
async fn fingerprint_says_what_makes_two_requests_the_same() {
    async fn compares(handler: MethodRouter<Idempotency>, first: &str, same: &str, other: &str) {
        let app = at("/", handler);
        answers_and_replays(&app, post("/", first)).await;
        assert!(ask(&app, &post("/", same)).await.is_replay(), "{same}");
        let answer = ask(&app, &post("/", other)).await;
        assert_eq!((answer.status, answer.code().as_str()), (422, "mismatch"), "{other}");
    }
    compares(routing::post(by_request), "{}", "{}", "{ }").await;
    let (one, same) = (r#"{"a":1,"b":{"c":2}}"#, r#"{"b":{"c":2.0},"a":1}"#);
    compares(routing::post(by_json), one, same, r#"{"a":2,"b":{"c":2}}"#).await;
    let same = r#"{"a":1,"b":{"c":2,"d":3}}"#;
    compares(routing::post(by_fields), one, same, r#"{"a":1,"b":{"c":3}}"#).await;
    let (one, same) = (r#"{"a":1,"at":1}"#, r#"{"a":1,"at":2}"#);
    compares(routing::post(by_all_but_one), one, same, r#"{"a":2,"at":1}"#).await;
    compares(routing::post(by_a_constant), one, same, r#"{"a":2,"at":1}"#).await;

    let app = at("/", routing::post(by_nothing));
    answers_and_replays(&app, post("/", "a")).await;
    assert!(ask(&app, &post("/?page=2", "b")).await.is_replay());

    let app = at("/", routing::post(by_json_and_headers));
    let request = with(with(post("/", "{}"), "x-version", "1"), "x-region", "eu");
    answers_and_replays(&app, request.clone()).await;
    for (name, value) in [("x-version", "2"), ("x-region", "us")] {
        let answer = ask(&app, &with(request.clone(), name, value)).await;
        assert_eq!((answer.status, answer.code().as_str()), (422, "mismatch"));
    }
}

/// Answers with the status that it is sent, and says how often it ran.
async fn echo(status: &str, effects: &Effects) -> impl IntoResponse + use<> {
    let status = status.parse().unwrap_or(StatusCode::IM_A_TEAPOT);
    (status, effects.happen().to_string())
}

#[idempotent(anchor = header("Idempotency-Key"), record = success)]
async fn records_success(effects: axum::Extension<Effects>, body: String) -> impl IntoResponse {
    echo(&body, &effects).await
}

#[idempotent(anchor = header("Idempotency-Key"), record = final)]
async fn records_final(effects: axum::Extension<Effects>, body: String) -> impl IntoResponse {
    echo(&body, &effects).await
}

#[idempotent(anchor = header("Idempotency-Key"), record = all)]
async fn records_all(effects: axum::Extension<Effects>, body: String) -> impl IntoResponse {
    echo(&body, &effects).await
}

#[tokio::test]
async fn record_says_which_answers_are_kept() {
    type Handlers = fn() -> MethodRouter<Idempotency>;
    let cases: [(Handlers, [bool; 4]); 3] = [
        (|| routing::post(records_success), [true, false, false, false]),
        (|| routing::post(records_final), [true, true, false, false]),
        (|| routing::post(records_all), [true, true, true, true]),
    ];
    for (handler, kept) in cases {
        for (status, kept) in ["201", "404", "429", "500"].into_iter().zip(kept) {
            let app = at("/", handler().layer(axum::Extension(Effects::default())));
            let (first, retry) =
                (ask(&app, &post("/", status)).await, ask(&app, &post("/", status)).await);
            assert_eq!((first.status.to_string().as_str(), first.text().as_str()), (status, "1"));
            assert_eq!((retry.is_replay(), retry.text() == "1"), (kept, kept), "{status}");
        }
    }
}

#[derive(Clone, Default)]
struct Gate(std::sync::Arc<(Notify, Notify)>);

#[idempotent(anchor = header("Idempotency-Key"), in_flight = reject)]
async fn waits(axum::Extension(gate): axum::Extension<Gate>, body: String) -> String {
    gate.0.0.notify_one();
    gate.0.1.notified().await;
    body
}

#[tokio::test]
async fn in_flight_rejects_a_duplicate_at_once() {
    let gate = Gate::default();
    let app = at("/", routing::post(waits).layer(axum::Extension(gate.clone())));
    let first = tokio::spawn({
        let app = app.clone();
        async move { ask(&app, &post("/", "a")).await }
    });
    gate.0.0.notified().await;
    let duplicate = ask(&app, &post("/", "a")).await;
    assert_eq!((duplicate.status, duplicate.code().as_str()), (409, "in_flight"));
    assert!(duplicate.headers.contains_key("retry-after"));
    gate.0.1.notify_one();
    assert_eq!(first.await.unwrap().text(), "a");
    assert!(ask(&app, &post("/", "a")).await.is_replay());
}

#[idempotent(anchor = header("Idempotency-Key"), on_unknown = rerun, lease = "1s")]
async fn fails_once(operation: Operation, _body: String) -> (StatusCode, String) {
    let failed = operation.attempt() == 1;
    let status = if failed { StatusCode::BAD_GATEWAY } else { StatusCode::OK };
    (status, format!("{} {}", operation.attempt(), operation.derive("psp")))
}

const LEASE: Duration = Duration::from_secs(1);

#[idempotent(anchor = header("Idempotency-Key"), lease = LEASE)]
async fn leased(body: String) -> String {
    body
}

#[tokio::test]
async fn on_unknown_reruns_under_the_same_operation() {
    let app = at("/", routing::post(fails_once));
    let first = ask(&app, &post("/", "a")).await;
    assert_eq!(first.status, 502);
    let second = answers_and_replays(&app, post("/", "a")).await;
    let (first, second) = (first.text(), second.text());
    assert_eq!(first.strip_prefix("1 "), second.strip_prefix("2 "));
    answers_and_replays(&at("/", routing::post(leased)), post("/", "a")).await;
}

fn teapots(_: &Refusal) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from_static(b"no tea"));
    *response.status_mut() = StatusCode::IM_A_TEAPOT;
    response
}

#[idempotent(anchor = header("Idempotency-Key"), refusals = teapots)]
async fn refuses_in_its_own_words(body: String) -> String {
    body
}

#[tokio::test]
async fn refusals_have_the_shape_that_the_handler_gives_them() {
    let app = at("/", routing::post(refuses_in_its_own_words));
    let answer = ask(&app, &without_key(post("/", "a"))).await;
    assert_eq!((answer.status, answer.text().as_str()), (418, "no tea"));
    answers_and_replays(&app, post("/", "a")).await;
}

#[idempotent(anchor = header("Idempotency-Key"), mode = enforce)]
async fn enforced(State(effects): State<WithEffects>) -> String {
    effects.1.happen().to_string()
}

#[idempotent(anchor = header("Idempotency-Key"), mode = observe)]
async fn observed(State(effects): State<WithEffects>) -> String {
    effects.1.happen().to_string()
}

#[idempotent(anchor = header("Idempotency-Key"), mode = off)]
async fn off(State(effects): State<WithEffects>) -> String {
    effects.1.happen().to_string()
}

#[derive(Clone, axum::extract::FromRef)]
struct WithEffects(Idempotency, Effects);

#[tokio::test]
async fn mode_says_how_much_is_in_force() {
    let remember = Remember::default();
    let idem = engine(MemoryStore::new()).observer(remember.observer()).build();
    let effects = Effects::default();
    let app = Router::new()
        .route("/enforced", routing::post(enforced))
        .route("/observed", routing::post(observed))
        .route("/off", routing::post(off))
        .with_state(WithEffects(idem, effects.clone()));

    answers_and_replays(&app, post("/enforced", "")).await;
    assert_eq!(effects.count(), 1);
    for path in ["/observed", "/off"] {
        for _ in 0..2 {
            let answer = ask(&app, &post(path, "")).await;
            assert!(answer.status == 200 && !answer.is_replay());
        }
    }
    assert_eq!(effects.count(), 5);
    // What would have been replayed is heard of, and of what is off nothing is.
    assert_eq!(remember.unenforced().len(), 1, "{remember:?}");
}

#[idempotent(anchor = header("Idempotency-Key"), store_outage = closed)]
async fn closed(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), store_outage = open)]
async fn open(body: String) -> String {
    body
}

#[tokio::test]
async fn store_outage_says_whether_to_run_without_protection() {
    for (handler, status) in [(routing::post(closed), 503), (routing::post(open), 200)] {
        let (store, faults) = Ground::memory().await.faulty();
        let app = Router::new().route("/", handler).with_state(engine(store).build());
        answers_and_replays(&app, post("/", "a")).await;
        faults.cut_off();
        let request: Request<String> = under("k-2", post("/", "a"));
        for _ in 0..2 {
            let answer = ask(&app, &request).await;
            assert_eq!((answer.status, answer.is_replay()), (status, false));
        }
    }
}

/// An application that re-exports idem.
mod framework {
    pub(crate) mod inner {
        pub(crate) use idem_runtime as idem;
    }
}

#[idempotent(
    anchor = arg(id, body),
    ttl = "1d 12h",
    scope = (arg(body.len()), header("X-Api-Key")),
    space = "everything",
    fingerprint = (exclude("at"), header("X-Version")),
    record = final,
    in_flight = reject,
    on_unknown = rerun,
    lease = "1500ms",
    refusals = teapots,
    mode = enforce,
    store_outage = closed,
    engine = state,
    state = Idempotency,
    crate = framework::inner::idem,
)]
async fn everything(
    axum::extract::Path(id): axum::extract::Path<Id>,
    State(_engine): State<Idempotency>,
    body: String,
) -> Result<String, StatusCode> {
    if body.is_empty() {
        return Err(StatusCode::NOT_FOUND);
    }
    Ok(format!("{} {body}", id.0))
}

#[derive(framework::inner::idem::AnchorValue, serde::Deserialize)]
#[anchor(crate = framework::inner::idem)]
struct Id(u64);

#[tokio::test]
async fn all_options_stand_together_and_idem_may_be_reexported() {
    let app = at("/{id}", routing::post(everything));
    assert_eq!(answers_and_replays(&app, post("/7", "a")).await.text(), "7 a");
}
