//! What the last argument can be: everything that takes the body, and what does not.

use axum::{
    Form, Json,
    body::{Body, Bytes, to_bytes},
    extract::{
        FromRequest, Multipart, Path, RawForm, Request,
        rejection::{FormRejection, JsonRejection},
    },
    http::StatusCode,
    response::{IntoResponse, Response},
    routing,
};
use idem_runtime::idempotent;
use serde::{Deserialize, de::DeserializeOwned};

use crate::support::{answers_and_replays, ask, at, post, post_form, under, with};

#[derive(Deserialize)]
struct Payment {
    amount: u64,
}

const FIVE: &str = r#"{"amount":5}"#;

#[idempotent(anchor = header("Idempotency-Key"))]
async fn json(Json(payment): Json<Payment>) -> String {
    payment.amount.to_string()
}

#[tokio::test]
async fn json_comes_last() {
    let app = at("/", routing::post(json));
    assert_eq!(answers_and_replays(&app, post("/", FIVE)).await.text(), "5");
}

#[tokio::test]
async fn a_body_that_does_not_parse_leaves_its_key_free() {
    let app = at("/", routing::post(json));
    assert_eq!(ask(&app, &post("/", "{")).await.status, 400);
    assert_eq!(answers_and_replays(&app, post("/", FIVE)).await.text(), "5");
}

#[idempotent(anchor = body_field("amount"))]
async fn form(Form(payment): Form<Payment>) -> String {
    payment.amount.to_string()
}

#[tokio::test]
async fn a_form_comes_last_and_one_of_its_fields_can_be_the_key() {
    let app = at("/", routing::post(form));
    assert_eq!(answers_and_replays(&app, post_form("/", "amount=5&to=a")).await.text(), "5");
    let other = ask(&app, &post_form("/", "amount=5&to=b")).await;
    assert_eq!((other.status, other.code().as_str()), (422, "mismatch"));
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn bytes(body: Bytes) -> Bytes {
    body
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn string(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn body(body: Body) -> Bytes {
    to_bytes(body, 1024).await.unwrap_or_default()
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn request(request: Request) -> String {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, 1024).await.unwrap_or_default();
    format!("{} {}", head.method, String::from_utf8_lossy(&body))
}

#[tokio::test]
async fn raw_bodies_come_last() {
    for handler in [routing::post(bytes), routing::post(string), routing::post(body)] {
        let answer = answers_and_replays(&at("/", handler), post("/", "a b")).await;
        assert_eq!(answer.text(), "a b");
    }
    let app = at("/", routing::post(request));
    assert_eq!(answers_and_replays(&app, post("/", "a b")).await.text(), "POST a b");
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn raw_form(RawForm(form): RawForm) -> Bytes {
    form
}

#[tokio::test]
async fn a_raw_form_comes_last() {
    let app = at("/", routing::post(raw_form));
    assert_eq!(answers_and_replays(&app, post_form("/", "a=b")).await.text(), "a=b");
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn multipart(mut form: Multipart) -> Result<String, StatusCode> {
    let mut names = Vec::new();
    while let Some(field) = form.next_field().await.map_err(|error| error.status())? {
        let name = field.name().unwrap_or_default().to_owned();
        names.push(format!("{name}={}", field.text().await.map_err(|error| error.status())?));
    }
    Ok(names.join(" "))
}

#[tokio::test]
async fn multipart_comes_last() {
    let part = |name, value| {
        format!("--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    };
    let body = format!("{}{}--x--\r\n", part("a", "1"), part("b", "2"));
    let request = with(post("/", &body), "content-type", "multipart/form-data; boundary=x");
    let answer = answers_and_replays(&at("/", routing::post(multipart)), request).await;
    assert_eq!(answer.text(), "a=1 b=2");
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn perhaps_json(payment: Option<Json<Payment>>) -> String {
    payment.map_or_else(String::new, |Json(payment)| payment.amount.to_string())
}

#[tokio::test]
async fn the_body_can_be_optional() {
    let app = at("/", routing::post(perhaps_json));
    assert_eq!(answers_and_replays(&app, post("/", FIVE)).await.text(), "5");
    let mut empty = under("k-2", post("/", ""));
    empty.headers_mut().remove("content-type");
    assert_eq!(answers_and_replays(&app, empty).await.text(), "");
}

#[idempotent(anchor = header("Idempotency-Key"), record = all)]
async fn json_or_why_not(payment: Result<Json<Payment>, JsonRejection>) -> Response {
    match payment {
        Ok(Json(payment)) => payment.amount.to_string().into_response(),
        Err(rejection) => (rejection.status(), "our own words").into_response(),
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn form_or_why_not(
    payment: Result<Form<Payment>, FormRejection>,
) -> Result<String, FormRejection> {
    let Form(payment) = payment?;
    Ok(payment.amount.to_string())
}

#[tokio::test]
async fn a_handler_can_answer_a_body_that_does_not_parse_itself() {
    let app = at("/", routing::post(json_or_why_not));
    assert_eq!(answers_and_replays(&app, post("/", FIVE)).await.text(), "5");
    let request = under("k-2", post("/", "{"));
    assert_eq!(ask(&app, &request).await.text(), "our own words");
    let retry = ask(&app, &request).await;
    assert!(retry.is_replay() && retry.status == 400 && retry.text() == "our own words");

    let app = at("/", routing::post(form_or_why_not));
    assert_eq!(answers_and_replays(&app, post_form("/", "amount=5")).await.text(), "5");
}

/// A body extractor of an application's own.
struct Valid<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Valid<T> {
    type Rejection = StatusCode;

    async fn from_request(request: Request, state: &S) -> Result<Self, StatusCode> {
        let Json(body) = Json::from_request(request, state)
            .await
            .map_err(|_: JsonRejection| StatusCode::UNPROCESSABLE_ENTITY)?;
        Ok(Self(body))
    }
}

#[idempotent(anchor = body_field("amount"), fingerprint = json)]
async fn own_extractor(Valid(payment): Valid<Payment>) -> String {
    payment.amount.to_string()
}

#[tokio::test]
async fn an_extractor_of_ones_own_comes_last() {
    let app = at("/", routing::post(own_extractor));
    assert_eq!(answers_and_replays(&app, post("/", FIVE)).await.text(), "5");
}

#[idempotent(anchor = path("id"))]
async fn parts_only(Path(id): Path<u64>) -> String {
    id.to_string()
}

#[tokio::test]
async fn the_last_argument_need_not_take_the_body() {
    let app = at("/payments/{id}", routing::put(parts_only).post(parts_only));
    assert_eq!(answers_and_replays(&app, post("/payments/7", "")).await.text(), "7");
}
