//! `handler.idempotent(POLICY)`: what the macro does, for functions that cannot bear it.

use axum::{
    Json, Router,
    extract::{FromRef, Path, State},
    handler::Handler,
    http::StatusCode,
    routing,
};
use idem_runtime::{
    Anchor, FingerprintScheme, Idempotency, IdempotentExt, Operation, Policy, Recording,
};
use tests::server::Effects;

use crate::support::{answers_and_replays, ask, at, idem, post, share_a_key, under};

const KEY: Anchor = Anchor::header("Idempotency-Key");
const POLICY: Policy =
    Policy::new(KEY).record(Recording::Final).fingerprint(FingerprintScheme::json());

/// A function of another crate.
mod foreign {
    use axum::extract::Path;

    pub(super) async fn handler(Path(id): Path<u64>, body: String) -> String {
        format!("{id} {body}")
    }
}

#[tokio::test]
async fn a_closure_is_made_idempotent() {
    let effects = Effects::default();
    let counting = {
        let effects = effects.clone();
        move |body: String| async move { format!("{} {body}", effects.happen()) }
    };
    let app = at("/", routing::post(counting.idempotent(KEY)));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "1 a");
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn a_function_of_another_crate_is_made_idempotent() {
    let app = at("/{id}", routing::post(foreign::handler.idempotent(POLICY)));
    assert_eq!(answers_and_replays(&app, post("/7", "{}")).await.text(), "7 {}");
    assert!(share_a_key(&app, &post("/7", "{}"), &post("/7", "{ }")).await);
}

#[tokio::test]
async fn a_handler_that_is_no_function_is_made_idempotent() {
    let app = at("/", routing::post("always the same".idempotent(KEY)));
    answers_and_replays(&app, post("/", "a")).await;
    let layered = foreign::handler.layer(axum::Extension(7_u64)).idempotent(KEY);
    let app = at("/{id}", routing::post(layered));
    answers_and_replays(&app, post("/7", "a")).await;
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    effects: Effects,
}

async fn refuse(
    State(effects): State<Effects>,
    operation: Operation,
    Path(status): Path<u16>,
    body: Option<Json<u64>>,
) -> Result<String, StatusCode> {
    effects.happen();
    match (StatusCode::from_u16(status), body) {
        (Ok(status), None) => Err(status),
        _ => Ok(operation.attempt().to_string()),
    }
}

#[tokio::test]
async fn its_policy_is_the_one_that_it_was_given() {
    let effects = Effects::default();
    let app = Router::new()
        .route("/{status}", routing::post(refuse.idempotent(POLICY)))
        .with_state(App { idem: idem(), effects: effects.clone() });
    answers_and_replays(&app, post("/400", "7")).await;
    assert_eq!(effects.count(), 1);

    let mut refused = under("k-2", post("/404", ""));
    refused.headers_mut().remove("content-type");
    assert_eq!(ask(&app, &refused).await.status, 404);
    assert!(ask(&app, &refused).await.is_replay());
    assert_eq!(effects.count(), 2);
}

/// The one class of handlers that the macro refuses (`ui/generic_over_a_future_that_is_not_send.rs`):
/// `Send` is proved of each concrete handler instead.
#[allow(async_fn_in_trait, reason = "the shape that is shown")]
trait Ledger: Clone + Send + Sync + 'static {
    async fn save(&self, body: String) -> String;
}

async fn save<L: Ledger>(State(ledger): State<L>, body: String) -> String {
    ledger.save(body).await
}

#[derive(Clone)]
struct Memory(Idempotency);

impl Ledger for Memory {
    async fn save(&self, body: String) -> String {
        tokio::task::yield_now().await;
        body
    }
}

impl FromRef<Memory> for Idempotency {
    fn from_ref(state: &Memory) -> Self {
        state.0.clone()
    }
}

#[tokio::test]
async fn a_function_generic_over_futures_is_made_idempotent() {
    let app = Router::new()
        .route("/", routing::post(save::<Memory>.idempotent(KEY)))
        .with_state(Memory(idem()));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "a");
}
