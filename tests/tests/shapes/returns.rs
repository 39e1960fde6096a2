//! What handlers return, and the ways in which their bodies get there.

use std::{error::Error, fmt};

use axum::{
    Json,
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{AppendHeaders, Html, IntoResponse, Redirect, Response},
    routing,
};
use idem_runtime::idempotent;
use serde::{Deserialize, Serialize};

use crate::support::{answers_and_replays, ask, at, post, under};

#[derive(Serialize, Deserialize)]
struct Receipt {
    amount: u64,
}

#[derive(Debug)]
enum Problem {
    Declined,
    NotANumber(std::num::ParseIntError),
}

impl From<std::num::ParseIntError> for Problem {
    fn from(error: std::num::ParseIntError) -> Self {
        Self::NotANumber(error)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Declined => f.write_str("declined"),
            Self::NotANumber(error) => error.fmt(f),
        }
    }
}

impl Error for Problem {}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (StatusCode::UNPROCESSABLE_ENTITY, self.to_string()).into_response()
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn nothing(_body: String) {}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn unit(_body: String) -> () {}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn response(body: String) -> Response {
    body.into_response()
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn tuple(body: String) -> (StatusCode, [(HeaderName, &'static str); 1], String) {
    (StatusCode::CREATED, [(header::LOCATION, "/payments/7")], body)
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn appended() -> impl IntoResponse {
    (AppendHeaders([(header::LINK, "</a>"), (header::LINK, "</b>")]), Html("<p>paid</p>"))
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn redirect() -> Redirect {
    Redirect::to("/payments/7")
}

#[tokio::test]
async fn any_response_is_recorded_with_its_status_and_headers() {
    answers_and_replays(&at("/", routing::post(nothing)), post("/", "")).await;
    answers_and_replays(&at("/", routing::post(unit)), post("/", "")).await;
    answers_and_replays(&at("/", routing::post(response)), post("/", "a")).await;

    let app = at("/", routing::post(tuple));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.status, 201);
    let replay = ask(&app, &post("/", "a")).await;
    assert_eq!(
        replay.headers.get("location").map(|value| value.as_bytes()),
        Some(&b"/payments/7"[..])
    );

    let app = at("/", routing::post(appended));
    answers_and_replays(&app, post("/", "")).await;
    let replay = ask(&app, &post("/", "")).await;
    assert_eq!(replay.headers.get_all("link").iter().collect::<Vec<_>>(), ["</a>", "</b>"]);

    let app = at("/", routing::post(redirect));
    assert_eq!(ask(&app, &post("/", "")).await.status, 303);
    let replay = ask(&app, &post("/", "")).await;
    assert!(replay.is_replay() && replay.status == 303);
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn opaque(body: String) -> impl IntoResponse {
    if body.is_empty() {
        return (StatusCode::NO_CONTENT, Json(None));
    }
    (StatusCode::OK, Json(Some(Receipt { amount: 5 })))
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn result(body: String) -> Result<(StatusCode, Json<Receipt>), Problem> {
    let amount = body.parse()?;
    if amount > 100 {
        Err(Problem::Declined)?;
    }
    Ok((StatusCode::CREATED, Json(Receipt { amount })))
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn opaque_result(body: String) -> Result<impl IntoResponse, Problem> {
    let amount: u64 = body.parse()?;
    Ok(Json(Receipt { amount }))
}

type Answered<T> = Result<Json<T>, Problem>;

#[idempotent(anchor = header("Idempotency-Key"))]
async fn alias(body: String) -> Answered<Receipt> {
    Ok(Json(Receipt { amount: body.parse()? }))
}

struct Internal(Box<dyn Error + Send + Sync>);

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for Internal {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Internal {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, self.0.to_string()).into_response()
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn boxed_error(body: String) -> Result<String, Internal> {
    let sum = async {
        let amount = body.parse::<u64>()?;
        if amount > 100 {
            return Err(Box::<dyn Error + Send + Sync>::from("too much"));
        }
        Ok(amount + 1)
    };
    Ok(sum.await?.to_string())
}

/// Errors of an application's own, behind a pointer.
trait Failure: Send {
    fn status(&self) -> StatusCode;
}

struct Declined;

impl Failure for Declined {
    fn status(&self) -> StatusCode {
        StatusCode::PAYMENT_REQUIRED
    }
}

impl IntoResponse for Box<dyn Failure> {
    fn into_response(self) -> Response {
        self.status().into_response()
    }
}

impl From<std::num::ParseIntError> for Box<dyn Failure> {
    fn from(_: std::num::ParseIntError) -> Self {
        Box::new(Declined)
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn trait_object_error(body: String) -> Result<String, Box<dyn Failure>> {
    let amount: u64 = body.parse()?;
    if amount > 100 {
        return Err(Box::new(Declined));
    }
    Ok(amount.to_string())
}

#[tokio::test]
async fn an_error_becomes_the_trait_object_that_is_returned() {
    let app = at("/", routing::post(trait_object_error));
    assert_eq!(ask(&app, &post("/", "500")).await.status, 402);
    assert_eq!(answers_and_replays(&app, post("/", "5")).await.text(), "5");
}

#[tokio::test]
async fn a_question_mark_finds_the_type_of_the_error() {
    let handlers = [
        routing::post(result),
        routing::post(opaque_result),
        routing::post(alias),
        routing::post(opaque),
    ];
    for handler in handlers {
        let app = at("/", handler);
        assert_eq!(answers_and_replays(&app, post("/", "5")).await.text(), r#"{"amount":5}"#);
    }
    let app = at("/", routing::post(boxed_error));
    assert_eq!(answers_and_replays(&app, post("/", "5")).await.text(), "6");
    assert_eq!(ask(&app, &under("k-2", post("/", "500"))).await.text(), "too much");
}

#[tokio::test]
async fn an_error_leaves_its_key_free() {
    let app = at("/", routing::post(result));
    assert_eq!(ask(&app, &post("/", "500")).await.text(), "declined");
    assert_eq!(ask(&app, &post("/", "x")).await.status, 422);
    assert_eq!(answers_and_replays(&app, post("/", "5")).await.status, 201);
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn early_return(body: String) -> String {
    if body.is_empty() {
        return "nothing".to_owned();
    }
    let Some((first, _)) = body.split_once(' ') else {
        return "one word".to_owned();
    };
    first.to_owned()
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn loops(body: String) -> usize_text::Text {
    let mut words = body.split(' ');
    let mut count = 0;
    'words: loop {
        let Some(word) = words.next() else { break 'words };
        for letter in word.chars() {
            if letter == '!' {
                continue 'words;
            }
        }
        tokio::task::yield_now().await;
        count += 1;
    }
    usize_text::Text(count.to_string())
}

mod usize_text {
    use axum::response::{IntoResponse, Response};

    pub(super) struct Text(pub(super) String);

    impl IntoResponse for Text {
        fn into_response(self) -> Response {
            self.0.into_response()
        }
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn always_returns(body: String) -> Result<String, StatusCode> {
    match body.len() {
        0 => return Err(StatusCode::BAD_REQUEST),
        length => return Ok(length.to_string()),
    }
}

#[expect(clippy::todo, reason = "a handler that is still being written compiles")]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn unfinished(body: String) -> Result<Json<Receipt>, Problem> {
    match &*body {
        "refund" => todo!(),
        "panic" => unreachable!("nobody sends this"),
        amount => Ok(Json(Receipt { amount: amount.parse()? })),
    }
}

#[expect(clippy::todo, reason = "a handler that is still being written compiles")]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn hardly_begun(_headers: HeaderMap, _body: String) -> Result<Json<Receipt>, Problem> {
    todo!()
}

#[tokio::test]
async fn bodies_return_early_loop_and_remain_unfinished() {
    let app = at("/", routing::post(early_return));
    assert_eq!(answers_and_replays(&app, post("/", "a b")).await.text(), "a");
    assert_eq!(answers_and_replays(&app, under("k-2", post("/", "a"))).await.text(), "one word");
    assert_eq!(answers_and_replays(&app, under("k-3", post("/", ""))).await.text(), "nothing");

    let app = at("/", routing::post(loops));
    assert_eq!(answers_and_replays(&app, post("/", "a !b c")).await.text(), "2");
    let app = at("/", routing::post(always_returns));
    assert_eq!(answers_and_replays(&app, post("/", "a b")).await.text(), "3");
    let app = at("/", routing::post(unfinished));
    answers_and_replays(&app, post("/", "5")).await;
}

#[tokio::test]
async fn a_panic_is_an_answer_and_leaves_its_key_free() {
    let app = at("/", routing::post(unfinished).put(hardly_begun));
    assert_eq!(ask(&app, &post("/", "refund")).await.status, 500);
    assert_eq!(ask(&app, &post("/", "refund")).await.status, 500);
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn begins_with_items(body: String) -> String {
    #![allow(clippy::items_after_statements, reason = "an inner attribute stays one")]
    use std::fmt::Write as _;
    const MARK: char = '!';
    fn marked(mut text: String) -> String {
        let _ = write!(text, "{MARK}");
        text
    }
    marked(body)
}

#[tokio::test]
async fn bodies_have_items_and_inner_attributes() {
    let app = at("/", routing::post(begins_with_items));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "a!");
}
