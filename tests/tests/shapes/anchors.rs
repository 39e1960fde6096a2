//! Where the key and the scope come from.

use std::{borrow::Cow, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{Path, Query, State},
    http::Request,
    routing,
};
use idem_runtime::{
    Anchor, AnchorError, AnchorRequest, AnchorValue, Format, Idempotency, Scope, Values, idempotent,
};
use serde::Deserialize;

use crate::support::{answers_and_replays, ask, at, post, share_a_key, under, with, without_key};

/// The key is exactly where the handler says: the second request has the same there, the third
/// another.
async fn keyed(app: Router, [first, same, other]: [Request<String>; 3]) {
    answers_and_replays(&app, first.clone()).await;
    assert!(share_a_key(&app, &first, &same).await, "another key for the same anchor");
    assert!(!share_a_key(&app, &first, &other).await, "the same key for another anchor");
}

#[idempotent(anchor = header("X-Order"))]
async fn header(body: String) -> String {
    body
}

#[tokio::test]
async fn the_key_is_in_a_header() {
    let order = |order| with(without_key(post("/", "a")), "x-order", order);
    keyed(at("/", routing::post(header)), [order("1"), order("\"1\""), order("2")]).await;
}

#[idempotent(anchor = body_field("message.nonce"))]
async fn nested_field(Json(_): Json<serde_json::Value>) {}

#[idempotent(anchor = body_field("/message/a.b~1c"))]
async fn pointed_field(Json(_): Json<serde_json::Value>) {}

#[tokio::test]
async fn the_key_is_in_a_field_of_the_body() {
    let app = at("/", routing::post(nested_field));
    let bodies = [
        r#"{"message":{"nonce":7}}"#,
        r#"{"message":{"nonce":"7"},"amount":1}"#,
        r#"{"message":{"nonce":8}}"#,
    ];
    keyed(app, bodies.map(|body| post("/", body))).await;
    let app = at("/", routing::post(pointed_field));
    let bodies = [
        r#"{"message":{"a.b/c":"x"}}"#,
        r#"{"amount":1,"message":{"a.b/c":"x"}}"#,
        r#"{"message":{"a.b/c":"y"}}"#,
    ];
    keyed(app, bodies.map(|body| post("/", body))).await;
}

#[idempotent(anchor = path("id"), space = "transfers")]
async fn path_parameter(body: String) -> String {
    body
}

#[idempotent(anchor = query("id"))]
async fn query_parameter(body: String) -> String {
    body
}

#[tokio::test]
async fn the_key_is_in_the_path_or_in_the_query() {
    let app = at("/transfers/{id}", routing::post(path_parameter));
    let requests = [("a", "x"), ("%61", "y"), ("b", "x")];
    keyed(app, requests.map(|(id, body)| post(&format!("/transfers/{id}"), body))).await;
    let app = at("/", routing::post(query_parameter));
    keyed(app, ["/?id=a", "/?page=1&id=%61", "/?id=b"].map(|uri| post(uri, "x"))).await;
}

#[idempotent(anchor = (header("X-Order"), query("line"), body_field("nonce")))]
async fn several(body: String) -> String {
    body
}

#[tokio::test]
async fn the_key_has_several_parts_and_each_counts() {
    let app = at("/", routing::post(several));
    let request = |order, line, nonce| {
        let body = format!(r#"{{"nonce":"{nonce}"}}"#);
        with(post(&format!("/?line={line}"), &body), "x-order", order)
    };
    let first = request("1", "2", "3");
    answers_and_replays(&app, first.clone()).await;
    for other in [request("9", "2", "3"), request("1", "9", "3"), request("1", "2", "9")] {
        assert!(!share_a_key(&app, &first, &other).await);
    }
    // Parts keep their limits: 1|23 is not 12|3.
    assert!(!share_a_key(&app, &request("1", "23", "4"), &request("12", "3", "4")).await);
}

const FLOW_ID: Anchor =
    Anchor::body_field("flowId").format(Format::Uuid).ttl(Duration::from_secs(600));

mod receipts {
    use idem_runtime::{Anchor, FingerprintScheme, Format};

    pub(super) const RECEIPT: Anchor = Anchor::all(&[
        Anchor::body_field("network"),
        Anchor::body_field("hash").format(Format::Hex(2)),
    ])
    .space("receipts")
    .fingerprint(FingerprintScheme::none());
}

#[idempotent(anchor = FLOW_ID)]
async fn declared(body: String) -> String {
    body
}

#[idempotent(anchor = receipts::RECEIPT)]
async fn declared_elsewhere(body: String) -> String {
    body
}

#[idempotent(anchor = (FLOW_ID, query("step")))]
async fn declared_and_more(body: String) -> String {
    body
}

#[tokio::test]
async fn an_anchor_is_declared_once_and_used_by_many() {
    let lower = r#"{"flowId":"6f9619ff-8b86-4011-b42d-00c04fc964ff"}"#;
    let upper = r#"{"flowId":"6F9619FF-8B86-4011-B42D-00C04FC964FF"}"#;
    let other = r#"{"flowId":"00000000-8b86-4011-b42d-00c04fc964ff"}"#;
    let bodies = [lower, upper, other];
    keyed(at("/", routing::post(declared)), bodies.map(|body| post("/", body))).await;
    let app = at("/", routing::post(declared_and_more));
    keyed(app, bodies.map(|body| post("/?step=1", body))).await;

    let app = at("/", routing::post(declared_elsewhere).put(declared_elsewhere));
    let bodies = [
        r#"{"network":"base","hash":"0xABCD"}"#,
        r#"{"network":"base","hash":"abcd"}"#,
        r#"{"network":"main","hash":"abcd"}"#,
    ];
    keyed(app, bodies.map(|body| post("/", body))).await;
}

fn order_and_line(request: &AnchorRequest<'_>) -> Result<Values, AnchorError> {
    let order = request.header("X-Order")?.ok_or(AnchorError::missing("X-Order"))?;
    let line = request.body_field("line")?.ok_or(AnchorError::missing("line"))?;
    Ok([order, &line].into_iter().collect())
}

const ORDER_LINE: Anchor = Anchor::custom(order_and_line);

#[idempotent(anchor = ORDER_LINE)]
async fn by_code(body: String) -> String {
    body
}

#[tokio::test]
async fn the_key_is_what_code_of_ones_own_finds() {
    let app = at("/", routing::post(by_code));
    let order = |order, body| with(post("/", body), "x-order", order);
    let requests =
        [order("1", r#"{"line":2}"#), order("1", r#"{"line":"2"}"#), order("1", r#"{"line":3}"#)];
    keyed(app.clone(), requests).await;
    let answer = ask(&app, &order("1", "{}")).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "key_missing"));
}

#[derive(AnchorValue, Deserialize)]
struct InvoiceId(u64);

#[derive(AnchorValue, Deserialize)]
struct Line {
    invoice: InvoiceId,
    number: u32,
    text: Cow<'static, str>,
}

#[derive(AnchorValue, Clone, Deserialize)]
struct Id<T>(u64, std::marker::PhantomData<T>);

#[derive(AnchorValue, Deserialize)]
struct Held<T> {
    value: T,
}

#[derive(Clone, Deserialize)]
struct Account;

#[derive(Deserialize)]
struct Order {
    message: Message,
    invoice: InvoiceId,
}

#[derive(Deserialize)]
struct Message {
    nonce: String,
}

impl Order {
    fn key(&self) -> String {
        format!("{}/{}", self.invoice.0, self.message.nonce)
    }
}

fn key_of(order: &Order) -> &str {
    &order.message.nonce
}

#[idempotent(anchor = arg(order.message.nonce))]
async fn field(Json(order): Json<Order>) -> String {
    order.key()
}

#[idempotent(anchor = arg((order.message.nonce.as_str(), &order.invoice)))]
async fn tuple(Json(order): Json<Order>) -> String {
    order.key()
}

#[idempotent(anchor = arg(order.message.nonce, order.invoice))]
async fn two_expressions(Json(order): Json<Order>) -> String {
    order.key()
}

#[idempotent(anchor = arg(key_of(order)))]
async fn call(Json(order): Json<Order>) -> String {
    order.key()
}

#[idempotent(anchor = arg(order.key().to_lowercase()))]
async fn method(Json(order): Json<Order>) -> String {
    order.key()
}

#[idempotent(anchor = arg({ let Message { nonce } = &order.message; nonce }))]
async fn block(Json(order): Json<Order>) -> String {
    order.key()
}

#[tokio::test]
async fn the_key_is_an_expression_over_the_arguments() {
    let handlers = [
        routing::post(field),
        routing::post(tuple),
        routing::post(two_expressions),
        routing::post(call),
        routing::post(method),
        routing::post(block),
    ];
    let bodies = [
        r#"{"message":{"nonce":"n"},"invoice":1}"#,
        r#"{"invoice":1,"message":{"nonce":"n"}}"#,
        r#"{"message":{"nonce":"m"},"invoice":1}"#,
    ];
    for handler in handlers {
        keyed(at("/", handler), bodies.map(|body| post("/", body))).await;
    }
}

#[idempotent(anchor = arg(line))]
async fn derived(Json(line): Json<Line>) -> String {
    line.text.into_owned()
}

#[idempotent(anchor = arg(held, id))]
async fn derived_generic(
    Query(Marked { id }): Query<Marked>,
    Json(held): Json<Held<String>>,
) -> String {
    format!("{} {}", held.value, id.0)
}

struct Marked {
    id: Id<Account>,
}

impl<'de> Deserialize<'de> for Marked {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            id: u64,
        }
        let Raw { id } = Raw::deserialize(deserializer)?;
        Ok(Self { id: Id(id, std::marker::PhantomData) })
    }
}

#[tokio::test]
async fn ids_of_ones_own_are_anchors() {
    let bodies = [
        r#"{"invoice":1,"number":2,"text":"a"}"#,
        r#"{"text":"a","number":2,"invoice":1}"#,
        r#"{"invoice":1,"number":3,"text":"a"}"#,
    ];
    keyed(at("/", routing::post(derived)), bodies.map(|body| post("/", body))).await;
    let app = at("/", routing::post(derived_generic));
    let uris = ["/?id=7", "/?id=07", "/?id=8"];
    keyed(app, uris.map(|uri| post(uri, r#"{"value":"a"}"#))).await;
}

#[idempotent(anchor = arg(id), space = "accounts")]
async fn of_the_path(Path((_, id)): Path<(String, u64)>, body: String) -> String {
    format!("{id} {body}")
}

#[tokio::test]
async fn the_key_is_an_argument_of_the_path() {
    let app = at("/{kind}/{id}", routing::post(of_the_path));
    keyed(app, ["/a/7", "/b/7", "/a/8"].map(|uri| post(uri, "x"))).await;
}

#[derive(Clone)]
struct User {
    tenant: String,
}

#[idempotent(anchor = header("Idempotency-Key"), scope = arg(user.tenant))]
async fn scoped_by_an_extension(Extension(user): Extension<User>, body: String) -> String {
    format!("{} {body}", user.tenant)
}

#[idempotent(anchor = arg(body), scope = arg(user.tenant))]
async fn scoped_and_anchored(
    State(_engine): State<Idempotency>,
    Extension(user): Extension<User>,
    body: String,
) -> String {
    format!("{} {body}", user.tenant)
}

#[tokio::test]
async fn the_scope_is_an_expression_over_the_arguments() {
    for handler in [routing::post(scoped_by_an_extension), routing::post(scoped_and_anchored)] {
        let app = at("/", handler);
        let of = |tenant: &str| app.clone().layer(Extension(User { tenant: tenant.to_owned() }));
        assert_eq!(answers_and_replays(&of("a"), post("/", "x")).await.text(), "a x");
        assert_eq!(answers_and_replays(&of("b"), post("/", "x")).await.text(), "b x");
        assert!(ask(&of("a"), &post("/", "x")).await.is_replay());
    }
}

const TENANT: Scope = Scope::header("X-Tenant");

#[idempotent(anchor = header("Idempotency-Key"), scope = header("X-Tenant"))]
async fn scoped_by_header(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), scope = TENANT)]
async fn scoped_by_constant(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), scope = (header("X-Tenant"), query("region")))]
async fn scoped_by_two(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"), scope = global)]
async fn scoped_by_nothing(body: String) -> String {
    body
}

#[tokio::test]
async fn keys_of_one_tenant_are_not_those_of_another() {
    let of = |tenant| with(post("/?region=eu", "x"), "x-tenant", tenant);
    for handler in [
        routing::post(scoped_by_header),
        routing::post(scoped_by_constant),
        routing::post(scoped_by_two),
    ] {
        let app = at("/", handler);
        assert!(!share_a_key(&app, &of("a"), &of("b")).await);
        assert!(share_a_key(&app, &of("a"), &with(of("a"), "x-api-key", "b")).await);
        let answer = ask(&app, &post("/?region=eu", "x")).await;
        assert_eq!((answer.status, answer.code().as_str()), (401, "scope_missing"));
    }
    let app = at("/", routing::post(scoped_by_nothing));
    let (a, b) = (post("/", "x"), with(post("/", "x"), "x-api-key", "b"));
    assert!(share_a_key(&app, &a, &b).await);
    assert!(!share_a_key(&app, &a, &under("k-2", b)).await);
}
