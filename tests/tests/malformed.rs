//! Whatever a client sends that is not right is a client error, and nothing runs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use axum::{
    Json, Router,
    extract::{FromRef, State},
    routing::post,
};
use idem_runtime::{Idempotency, idempotent};
use serde::Deserialize;
use tests::{
    on_both_stores,
    server::{Effects, Server, send},
    stores::Bench,
};

on_both_stores! {
    a_malformed_key_is_a_client_error_byte_by_byte,
    a_malformed_quoted_key_is_a_client_error,
    a_malformed_body_is_a_client_error,
    a_body_cut_short_anywhere_is_a_client_error,
    a_body_with_any_byte_broken_is_a_client_error,
    random_bytes_are_a_client_error,
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

#[derive(Deserialize)]
struct Order {
    order: Id,
    amount: u64,
}

#[derive(Deserialize)]
struct Id {
    id: String,
}

impl Order {
    fn carry_out(&self, effects: &Effects) -> String {
        format!("{} {} {}", effects.happen(), self.order.id, self.amount)
    }
}

#[idempotent(anchor = header("Idempotency-Key"), fingerprint = request)]
async fn by_header(State(effects): State<Effects>, Json(order): Json<Order>) -> String {
    order.carry_out(&effects)
}

#[idempotent(anchor = body_field("order.id"), format = uuid, fingerprint = exclude("amount"))]
async fn by_field(State(effects): State<Effects>, Json(order): Json<Order>) -> String {
    order.carry_out(&effects)
}

#[idempotent(anchor = body_field("/order/id"), fingerprint = (body_field("order.id"), header("x-a")))]
async fn by_pointer(State(effects): State<Effects>, Json(order): Json<Order>) -> String {
    order.carry_out(&effects)
}

#[idempotent(anchor = arg(order.order.id), fingerprint = json)]
async fn by_argument(State(effects): State<Effects>, Json(order): Json<Order>) -> String {
    order.carry_out(&effects)
}

const PATHS: [&str; 4] = ["/header", "/field", "/pointer", "/argument"];
const GOOD: &str = r#"{"order":{"id":"8e03978e-40d5-43e8-bc93-6894a57f9324"},"amount":100}"#;

async fn serve(bench: &Bench) -> Server {
    let routes = Router::new()
        .route("/header", post(by_header))
        .route("/field", post(by_field))
        .route("/pointer", post(by_pointer))
        .route("/argument", post(by_argument));
    let state = App { engine: bench.engine().build(), effects: bench.effects.clone() };
    Server::start(routes.with_state(state)).await
}

/// Sends a body to every handler: each answers with a client error, and forgets that it was asked.
async fn assert_refused(bench: &Bench, server: &Server, body: &[u8]) {
    let shown = String::from_utf8_lossy(&body[..body.len().min(200)]);
    for path in PATHS {
        let answer = send(server.post(path, "k", "").body(body.to_vec())).await;
        assert!((400..500).contains(&answer.status), "{path} {shown}: {answer:?}");
        assert_eq!(bench.effects.count(), 0, "{path} {shown}");
    }
}

/// After all that, the keys are as good as new.
async fn assert_unharmed(bench: &Bench, server: &Server) {
    for (path, number) in PATHS.into_iter().zip(1..) {
        let expected = format!("{number} 8e03978e-40d5-43e8-bc93-6894a57f9324 100");
        send(server.post(path, "k", GOOD)).await.assert_is(200, &expected, false);
        send(server.post(path, "k", GOOD)).await.assert_is(200, &expected, true);
    }
    assert_eq!(bench.effects.count(), PATHS.len());
}

async fn a_malformed_key_is_a_client_error_byte_by_byte(bench: Bench) {
    let server = serve(&bench).await;
    let not_a_key = (0..=31).chain(127..=255);
    for (byte, quoted) in not_a_key.flat_map(|byte: u8| [(byte, false), (byte, true)]) {
        let quote = if quoted { "\"" } else { "" };
        let head = "POST /header HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-api-key: a\r\n";
        let mut request = format!("{head}idempotency-key: {quote}a").into_bytes();
        request.push(byte);
        request.extend_from_slice(
            format!("b{quote}\r\ncontent-type: application/json\r\n").as_bytes(),
        );
        request
            .extend_from_slice(format!("content-length: {}\r\n\r\n{GOOD}", GOOD.len()).as_bytes());
        let answer = server.send_raw(&request).await.unwrap();
        assert_eq!(answer.status, 400, "{byte} {quoted}");
        assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0), "{byte}");
    }
    assert_unharmed(&bench, &server).await;
}

async fn a_malformed_quoted_key_is_a_client_error(bench: Bench) {
    let server = serve(&bench).await;
    let inside = ["", "a", "\\", "\\\"", "\\a\"", "a\\", "\\\\\\\"", "\\u0061\"", "é\""];
    let after = [
        "a",
        " a",
        "\"",
        "\"\"",
        ",",
        ", \"b\"",
        "?1",
        "/",
        "=",
        "(",
        ")",
        ";",
        ";;",
        "; ;",
        ";A",
        ";1",
        ";a=",
        ";a= 1",
        ";a=\"",
        ";a=?2",
        ";a=1.",
        ";a=:x",
        ";a=()",
        ";a=é",
        ";a=1;",
        ";a=1234567890123456",
    ];
    let keys = inside.map(|inside| format!("\"{inside}")).into_iter();
    for key in keys.chain(after.map(|after| format!("\"a\"{after}"))) {
        let answer = send(server.post("/header", &key, GOOD)).await;
        assert_eq!(answer.status, 400, "{key}");
        answer.assert_refused(400, "key_malformed");
    }
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
    assert_unharmed(&bench, &server).await;
}

async fn a_malformed_body_is_a_client_error(bench: Bench) {
    let server = serve(&bench).await;
    let id = "8e03978e-40d5-43e8-bc93-6894a57f9324";
    let order = |order: &str| format!(r#"{{"order":{order},"amount":100}}"#);
    let amount = |amount: &str| format!(r#"{{"order":{{"id":7}},"amount":{amount}}}"#);
    let numbers = ["7", "-0", "1e400", "1e18446744073709551615", "1e99999999999999999999"];
    let ids = ["null", "true", "{}", "[]"]
        .into_iter()
        .chain(numbers)
        .map(|id| order(&format!(r#"{{"id":{id}}}"#)))
        .collect::<Vec<_>>();
    let long = [("9", 5_000), ("\"x\"", 1)]
        .map(|(digit, times)| order(&format!(r#"{{"id":[{}]}}"#, digit.repeat(times))));
    let orders =
        ["null", "7", "\"id\"", "[]", "[{\"id\":\"a\"}]", "{}", r#"{"ID":"a"}"#].map(order);
    let amounts =
        ["", "-", "+1", "01", "1.", ".5", "1e", "0x1", "NaN", "Infinity", "'1'", "1 1", "1,"]
            .map(amount);
    let twice = [
        format!(r#"{{"order":{{"id":"{id}","id":"{id}"}},"amount":1}}"#),
        format!(r#"{{"order":{{"id":"{id}","\u0069d":"x"}},"amount":1}}"#),
        format!(r#"{{"order":{{"id":"{id}"}},"order":{{"id":"{id}"}},"amount":1}}"#),
        format!(r#"{{"order":{{"id":"{id}"}},"amount":1,"amount":2}}"#),
    ];
    let deep =
        ["[", "{\"a\":", "{\"order\":", "{\"order\":{\"id\":"].map(|open| open.repeat(20_000));
    let closed = ["[".repeat(20_000) + &"]".repeat(20_000), order(&"[".repeat(20_000))];
    let garbage = [
        "",
        " ",
        "\n",
        "{",
        "}",
        "[",
        "]",
        "{]",
        "[}",
        "\"",
        "nul",
        "nulll",
        "tru",
        "undefined",
        "id",
        ":",
        ",",
        "{,}",
        "{:}",
        "{\"order\"}",
        "{\"order\":}",
        "{order:1}",
        "/* */{}",
        "// \n{}",
        "{}{}",
        "\u{feff}{}",
        "\0",
        "{\"\\u12\":1}",
        "{\"\\ud800\":1}",
        "\"\\x\"",
        "<xml/>",
        "a=b&c=d",
        "--x\r\n",
        "null",
        "true",
        "7",
        "\"text\"",
        "[]",
        "{}",
        "[[]]",
        "{\"\":{}}",
    ]
    .map(str::to_owned);
    let spoilt =
        [format!("{GOOD},"), format!("{GOOD}]"), format!("{GOOD}\0"), format!("\u{b}{GOOD}")];
    let bodies: Vec<String> = [ids, long.to_vec(), orders.to_vec(), amounts.to_vec()]
        .into_iter()
        .chain([twice.to_vec(), deep.to_vec(), closed.to_vec(), garbage.to_vec(), spoilt.to_vec()])
        .flatten()
        .collect();
    assert!(bodies.len() > 80, "{}", bodies.len());
    for body in bodies {
        assert_refused(&bench, &server, body.as_bytes()).await;
    }
    assert_unharmed(&bench, &server).await;
}

async fn a_body_cut_short_anywhere_is_a_client_error(bench: Bench) {
    let server = serve(&bench).await;
    for length in 0..GOOD.len() {
        assert_refused(&bench, &server, &GOOD.as_bytes()[..length]).await;
    }
    assert_unharmed(&bench, &server).await;
}

async fn a_body_with_any_byte_broken_is_a_client_error(bench: Bench) {
    let server = serve(&bench).await;
    for at in 0..GOOD.len() {
        for byte in *b"\xff\xc0\0\"" {
            let mut body = GOOD.as_bytes().to_vec();
            if std::mem::replace(&mut body[at], byte) == byte {
                continue;
            }
            assert_refused(&bench, &server, &body).await;
        }
    }
    assert_unharmed(&bench, &server).await;
}

async fn random_bytes_are_a_client_error(bench: Bench) {
    let server = serve(&bench).await;
    let alphabet = b"{}[]\",:\\u0 \xff\"orderid\"amount1eE+-.";
    for _ in 0..100 {
        let length = rand::random::<u8>() as usize;
        let body: Vec<u8> =
            std::iter::repeat_with(|| alphabet[rand::random::<u16>() as usize % alphabet.len()])
                .take(length)
                .collect();
        assert_refused(&bench, &server, &body).await;
    }
    assert_unharmed(&bench, &server).await;
}
