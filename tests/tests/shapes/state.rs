//! Where the state comes from, and the engine in it.

use std::sync::Arc;

use axum::{
    Extension, Router,
    extract::{FromRef, State},
    routing,
};
use idem_runtime::{Idempotency, idempotent};
use tests::server::Effects;

use crate::support::{answers_and_replays, ask, at, idem, post};

trait Ledger: Send + Sync {
    fn book(&self, what: &str) -> String;
}

struct Paper;

impl Ledger for Paper {
    fn book(&self, what: &str) -> String {
        format!("booked {what}")
    }
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    effects: Effects,
    ledger: Arc<dyn Ledger>,
}

fn app(handlers: routing::MethodRouter<App>) -> (Router, Effects) {
    let state = App { idem: idem(), effects: Effects::default(), ledger: Arc::new(Paper) };
    let effects = state.effects.clone();
    (Router::new().route("/payments", handlers).with_state(state), effects)
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn no_state(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn the_engine(State(_engine): State<Idempotency>, body: String) -> String {
    body
}

#[tokio::test]
async fn the_engine_can_be_the_whole_state() {
    let first = answers_and_replays(&at("/", routing::post(no_state)), post("/", "a")).await;
    assert_eq!(first.text(), "a");
    answers_and_replays(&at("/", routing::post(the_engine)), post("/", "a")).await;
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn whole_state(State(app): State<App>, body: String) -> String {
    format!("{} for the {}th time", app.ledger.book(&body), app.effects.happen())
}

#[tokio::test]
async fn a_handler_takes_the_whole_state() {
    let (app, effects) = app(routing::post(whole_state));
    let answer = answers_and_replays(&app, post("/payments", "a")).await;
    assert_eq!(answer.text(), "booked a for the 1th time");
    assert_eq!(effects.count(), 1);
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn parts_of_the_state(
    State(effects): State<Effects>,
    State(ledger): State<Arc<dyn Ledger>>,
    body: String,
) -> String {
    effects.happen();
    ledger.book(&body)
}

#[tokio::test]
async fn a_handler_takes_parts_of_the_state_and_trait_objects_in_it() {
    let (app, effects) = app(routing::post(parts_of_the_state));
    assert_eq!(answers_and_replays(&app, post("/payments", "a")).await.text(), "booked a");
    assert_eq!(effects.count(), 1);
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn state_only(State(ledger): State<Arc<dyn Ledger>>) -> String {
    ledger.book("nothing")
}

#[tokio::test]
async fn the_state_can_be_the_last_argument() {
    let (app, _) = app(routing::post(state_only));
    assert_eq!(answers_and_replays(&app, post("/payments", "")).await.text(), "booked nothing");
}

#[idempotent(anchor = header("Idempotency-Key"), state = App)]
async fn with_its_state_named(State(effects): State<Effects>, body: String) -> String {
    effects.happen();
    body
}

#[tokio::test]
async fn a_handler_that_names_its_state_is_checked_and_serves() {
    let (app, effects) = app(routing::post(with_its_state_named));
    answers_and_replays(&app, post("/payments", "a")).await;
    assert_eq!(effects.count(), 1);
}

#[idempotent(anchor = header("Idempotency-Key"), engine = state)]
async fn engine_in_state(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), engine = extension)]
async fn engine_in_extension(body: String) -> String {
    body
}

#[tokio::test]
async fn the_engine_can_be_said_to_be_in_the_state() {
    answers_and_replays(&at("/", routing::post(engine_in_state)), post("/", "a")).await;
}

#[tokio::test]
async fn the_engine_can_be_an_extension_of_a_router_without_state() {
    let app: Router =
        Router::new().route("/", routing::post(engine_in_extension)).layer(Extension(idem()));
    answers_and_replays(&app, post("/", "a")).await;
}

#[tokio::test]
async fn a_missing_extension_is_a_server_error_and_runs_nothing() {
    let app: Router = Router::new().route("/", routing::post(engine_in_extension));
    let answer = ask(&app, &post("/", "a")).await;
    assert_eq!(answer.status, 500);
    assert!(answer.text().contains("Extension<Idempotency>"), "{}", answer.text());
}

fn routes<S>() -> Router<S>
where
    S: Clone + Send + Sync + 'static,
    Idempotency: FromRef<S>,
{
    Router::new().route("/", routing::post(no_state))
}

#[tokio::test]
async fn routes_can_be_generic_over_their_state() {
    answers_and_replays(&routes().with_state(idem()), post("/", "a")).await;
    let (app, _) = app(routing::post(whole_state).merge(routing::put(state_only)));
    let state = App { idem: idem(), effects: Effects::default(), ledger: Arc::new(Paper) };
    let nested = Router::new().nest("/nested", routes::<App>()).with_state(state).merge(app);
    answers_and_replays(&nested, post("/nested", "a")).await;
}

fn over<L: Ledger + Clone + 'static>(ledger: L) -> Router {
    #[derive(Clone)]
    struct Generic<L>(Idempotency, L);

    impl<L> FromRef<Generic<L>> for Idempotency {
        fn from_ref(state: &Generic<L>) -> Self {
            state.0.clone()
        }
    }

    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn book<L: Ledger + Clone>(State(state): State<Generic<L>>, body: String) -> String {
        state.1.book(&body)
    }

    Router::new().route("/", routing::post(book::<L>)).with_state(Generic(idem(), ledger))
}

#[tokio::test]
async fn the_state_can_be_generic() {
    #[derive(Clone)]
    struct Stone;
    impl Ledger for Stone {
        fn book(&self, what: &str) -> String {
            format!("carved {what}")
        }
    }
    assert_eq!(answers_and_replays(&over(Stone), post("/", "a")).await.text(), "carved a");
}
