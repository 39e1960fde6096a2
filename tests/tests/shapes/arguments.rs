//! How many arguments, and the patterns that take them apart.

use std::{cell::Cell, convert::Infallible, sync::Arc};

use axum::{
    Extension, Json,
    extract::{FromRequestParts, Path, Query, State},
    http::{HeaderMap, Method, StatusCode, Uri, request::Parts},
    routing,
};
use idem_runtime::{Idempotency, Operation, idempotent};
use serde::Deserialize;

use crate::support::{answers_and_replays, at, post};

macro_rules! handlers_with {
    ($($number:ident($($argument:ident)*);)*) => {$(
        #[allow(clippy::too_many_arguments, reason = "axum takes sixteen")]
        #[idempotent(anchor = header("Idempotency-Key"))]
        async fn $number($($argument: Method),*) -> String {
            let arguments: Vec<Method> = vec![$($argument),*];
            arguments.len().to_string()
        }
    )*};
}

handlers_with! {
    none();
    one(a);
    two(a b);
    three(a b c);
    four(a b c d);
    five(a b c d e);
    six(a b c d e f);
    seven(a b c d e f g);
    eight(a b c d e f g h);
    nine(a b c d e f g h i);
    ten(a b c d e f g h i j);
    eleven(a b c d e f g h i j k);
    twelve(a b c d e f g h i j k l);
    thirteen(a b c d e f g h i j k l m);
    fourteen(a b c d e f g h i j k l m n);
    fifteen(a b c d e f g h i j k l m n o);
    sixteen(a b c d e f g h i j k l m n o p);
}

#[tokio::test]
async fn a_handler_has_as_many_arguments_as_axum_allows() {
    let handlers = [
        routing::post(none),
        routing::post(one),
        routing::post(two),
        routing::post(three),
        routing::post(four),
        routing::post(five),
        routing::post(six),
        routing::post(seven),
        routing::post(eight),
        routing::post(nine),
        routing::post(ten),
        routing::post(eleven),
        routing::post(twelve),
        routing::post(thirteen),
        routing::post(fourteen),
        routing::post(fifteen),
        routing::post(sixteen),
    ];
    for (count, handler) in handlers.into_iter().enumerate() {
        let answer = answers_and_replays(&at("/", handler), post("/", "")).await;
        assert_eq!(answer.text(), count.to_string());
    }
}

#[derive(Deserialize)]
struct Payment {
    amount: u64,
    note: Option<Note>,
}

#[derive(Deserialize)]
struct Note {
    text: String,
}

#[derive(Deserialize)]
struct Page {
    page: u32,
}

#[allow(clippy::too_many_arguments, reason = "axum takes sixteen")]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn everything(
    State(_engine): State<Idempotency>,
    Path((account, number)): Path<(String, u64)>,
    Query(Page { page }): Query<Page>,
    Extension(greeting): Extension<&'static str>,
    headers: HeaderMap,
    method: Method,
    uri: Uri,
    Json(Payment { amount, note: _ }): Json<Payment>,
) -> String {
    let keyed = headers.contains_key("idempotency-key");
    format!("{greeting} {account} {number} {page} {keyed} {method} {} {amount}", uri.path())
}

#[tokio::test]
async fn extractors_of_all_kinds_stand_side_by_side() {
    let handler = routing::post(everything).layer(Extension("hello"));
    let app = at("/{account}/{number}", handler);
    let answer = answers_and_replays(&app, post("/a/7?page=2", r#"{"amount":5}"#)).await;
    assert_eq!(answer.text(), "hello a 7 2 true POST /a/7 5");
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn nested_pattern(
    Json(Payment { amount: mut left, note: ref _note }): Json<Payment>,
) -> String {
    left -= 1;
    left.to_string()
}

#[idempotent(anchor = arg(left, note.as_ref().map_or("", |note| &note.text)))]
async fn nested_pattern_in_the_anchor(
    Json(Payment { amount: mut left, ref note }): Json<Payment>,
) -> String {
    left -= 1;
    format!("{left} {}", note.is_some())
}

#[idempotent(anchor = arg(whole.amount, first))]
async fn bound_twice(
    Path((mut first, Word::<1>(second))): Path<(u64, Word<1>)>,
    Query(Page { mut page }): Query<Page>,
    Json(ref whole @ Payment { amount, .. }): Json<Payment>,
) -> String {
    first += 1;
    page += 1;
    format!("{first} {second} {page} {amount} {}", whole.amount)
}

#[derive(Deserialize)]
struct Word<const LENGTH: usize>(String);

#[tokio::test]
async fn patterns_bind_the_whole_and_its_parts() {
    let app = at("/{first}/{second}", routing::post(bound_twice));
    let answer = answers_and_replays(&app, post("/1/a?page=2", r#"{"amount":5}"#)).await;
    assert_eq!(answer.text(), "2 a 3 5 5");
}

#[tokio::test]
async fn patterns_take_arguments_apart() {
    let body = r#"{"amount":5,"note":{"text":"rent"}}"#;
    let answer =
        answers_and_replays(&at("/", routing::post(nested_pattern)), post("/", body)).await;
    assert_eq!(answer.text(), "4");
    let app = at("/", routing::post(nested_pattern_in_the_anchor));
    assert_eq!(answers_and_replays(&app, post("/", body)).await.text(), "4 true");
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn mutable(mut headers: HeaderMap, mut body: String) -> String {
    headers.clear();
    body.push('!');
    body
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn unnamed(_: Method, _: State<Idempotency>, _: String) -> &'static str {
    "done"
}

#[tokio::test]
async fn arguments_can_be_mutable_or_unnamed() {
    let app = at("/", routing::post(mutable));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "a!");
    answers_and_replays(&at("/", routing::post(unnamed)), post("/", "a")).await;
}

/// Holds something for as long as it lives.
struct Permit {
    _held: Arc<()>,
}

impl<S: Send + Sync> FromRequestParts<S> for Permit {
    type Rejection = StatusCode;

    async fn from_request_parts(head: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        let held = head.extensions.get().cloned().ok_or(StatusCode::INTERNAL_SERVER_ERROR)?;
        Ok(Self { _held: held })
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn holds_permits(_: Permit, Extension(permits): Extension<Arc<()>>, _: Permit) -> String {
    tokio::task::yield_now().await;
    (Arc::strong_count(&permits) - 1).to_string()
}

#[tokio::test]
async fn what_is_not_named_lives_as_long_as_the_body() {
    // One that is handed out; the test has one, and the layer, and the request's extensions.
    let permits = Arc::new(());
    let app = at("/", routing::post(holds_permits).layer(Extension(Arc::clone(&permits))));
    let idle = Arc::strong_count(&permits);
    let busy: usize = answers_and_replays(&app, post("/", "a")).await.text().parse().unwrap();
    assert!(busy >= idle + 2, "{busy} while running, {idle} before");
    assert_eq!(Arc::strong_count(&permits), idle);
}

/// An extractor that threads cannot share.
struct Unshared(Cell<u64>);

impl<S: Send + Sync> FromRequestParts<S> for Unshared {
    type Rejection = Infallible;

    async fn from_request_parts(_: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(Cell::new(7)))
    }
}

#[idempotent(anchor = arg(cell.get(), body))]
async fn unshared(Unshared(cell): Unshared, body: String) -> String {
    cell.set(cell.get() + 1);
    tokio::task::yield_now().await;
    format!("{} {body}", cell.get())
}

#[idempotent(anchor = arg(last.0.get()))]
async fn unshared_last(_: Unshared, last: Unshared) -> String {
    tokio::task::yield_now().await;
    last.0.get().to_string()
}

#[tokio::test]
async fn extractors_need_not_be_shared_between_threads() {
    let app = at("/", routing::post(unshared));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "8 a");
    let app = at("/", routing::post(unshared_last));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "7");
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn lints_on_arguments(
    #[allow(unused_variables, reason = "shown")] method: Method,
    #[expect(unused_mut, reason = "shown")] mut body: String,
) -> String {
    body
}

#[tokio::test]
async fn lint_levels_may_stand_on_arguments() {
    answers_and_replays(&at("/", routing::post(lints_on_arguments)), post("/", "a")).await;
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn operation_last(_: Method, operation: Operation) -> String {
    format!("{} {}", operation.id(), operation.attempt())
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn operation_first(operation: Operation, body: String) -> String {
    format!("{} {} {body}", operation.id(), operation.attempt())
}

#[idempotent(anchor = arg(body))]
async fn operation_and_arg(operation: Operation, _: Method, body: String) -> String {
    format!("{} {} {body}", operation.id(), operation.attempt())
}

#[tokio::test]
async fn the_operation_is_an_argument_like_any_other() {
    let handlers = [
        routing::post(operation_last),
        routing::post(operation_first),
        routing::post(operation_and_arg),
    ];
    for handler in handlers {
        let answer = answers_and_replays(&at("/", handler), post("/", "a")).await.text();
        assert_eq!(answer.split(' ').nth(1), Some("1"), "{answer}");
    }
}
