//! Keys: what is one, what is none, and which spellings are the same.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use axum::{
    Json, Router,
    extract::{FromRef, Path, Query, State},
    routing::post,
};
use idem_runtime::{
    Anchor, AnchorError, AnchorRequest, FingerprintScheme, Format, Idempotency, IdempotentExt,
    Outcome, Policy, RefusalKind, Scope, Values, idempotent, store::MemoryStore,
};
use serde_json::{Value, json};
use tests::{
    on_both_stores,
    server::{Effects, Server, send},
    stores::Bench,
};

const KEY: Anchor = Anchor::header("Idempotency-Key");

on_both_stores! {
    keys_of_real_clients_pass,
    a_quoted_key_is_the_raw_key,
    keys_that_differ_are_different_keys,
    a_request_without_a_key_is_refused_before_any_look_up,
    what_cannot_be_a_key_is_refused_before_any_look_up,
    a_header_that_stands_there_twice_is_refused,
    the_longest_key_passes_and_one_character_more_does_not,
    a_uuid_is_one_key_in_all_its_spellings,
    hexadecimal_digits_are_one_key_in_all_their_spellings,
    a_text_has_the_length_that_its_format_says,
    a_body_field_is_found_by_name_by_pointer_and_in_forms,
    a_scalar_is_a_key_by_its_text,
    what_is_no_scalar_is_no_key,
    parameters_of_path_and_query_are_keys_decoded,
    a_formatted_parameter_is_one_key_in_all_its_spellings,
    several_anchors_are_one_key_and_their_values_do_not_run_together,
    an_argument_of_the_handler_is_a_key,
    code_of_the_applications_makes_a_key,
    without_an_optional_key_the_handler_runs_each_time,
    an_optional_key_that_is_there_is_a_key_and_must_be_one,
    a_part_of_an_optional_key_is_no_key_and_not_none,
}

/// Sends one body under keys that are one key: the first runs, the others are its retries.
async fn assert_same(bench: &Bench, server: &Server, keys: &[&str]) {
    let before = bench.effects.count();
    for (sent, key) in keys.iter().enumerate() {
        let answer = send(server.post("/", key, "")).await;
        answer.assert_is(200, &format!("effect {}", before + 1), sent > 0);
    }
    assert_eq!(bench.effects.count(), before + 1);
}

/// Sends one body under keys of which none is a key.
async fn assert_malformed(bench: &Bench, server: &Server, keys: &[&str]) {
    let (effects, claims) = (bench.effects.count(), bench.store.claims().len());
    for key in keys {
        let refused = send(server.post("/", key, "")).await;
        refused.assert_refused(400, "key_malformed");
        let detail = refused.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.starts_with("Idempotency-Key: "), "{detail}");
        assert!(key.len() < 5 || !detail.contains(key), "the detail repeats the key: {detail}");
    }
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (effects, claims));
}

async fn keys_of_real_clients_pass(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    for key in [
        "stripe-node-retry-8e03978e-40d5-43e8-bc93-6894a57f9324",
        "stainless-python-retry-8e03978e-40d5-43e8-bc93-6894a57f9324",
        "8e03978e-40d5-13e8-bc93-6894a57f9324",
        "KG5LxwFBepaKHyUD+Kvx/wB1eEXAMPLE==",
        "123",
        "a",
        "an order of 2024, the third (urgent!)",
        "?1",
        ":YWJj:",
        "{\"json\": true}",
        "a\"b\"",
    ] {
        assert_same(&bench, &server, &[key, key]).await;
    }
}

async fn a_quoted_key_is_the_raw_key(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    assert_same(&bench, &server, &["abc", "\"abc\"", "\"abc\";p=1", "\"abc\" ", " abc"]).await;
    assert_same(&bench, &server, &["\"a \\\"b\\\"\"", "a \"b\""]).await;
    assert_same(&bench, &server, &["\"a\\\\b\"", "a\\b"]).await;
    assert_same(&bench, &server, &["\"x\";a;b=?0;c=\"y, z\"", "x"]).await;
}

async fn keys_that_differ_are_different_keys(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    for key in ["a", "A", "a b", "a  b", "'a'", "a;p=1", "a,b", "%61", "0", "00", "0.0"] {
        assert_same(&bench, &server, &[key]).await;
    }
}

async fn a_request_without_a_key_is_refused_before_any_look_up(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    let refused = send(server.post_without_key("/", "100")).await;
    refused.assert_refused(400, "key_missing");
    let detail = refused.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.starts_with("Idempotency-Key is missing."), "{detail}");
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
    assert_eq!(bench.told.outcomes(), [Outcome::Refused(RefusalKind::KeyMissing)]);
}

async fn what_cannot_be_a_key_is_refused_before_any_look_up(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    let broken = [
        "",
        "\"",
        "\"\"",
        "\"abc",
        "\"abc\\\"",
        "\"a\\n\"",
        "\"a\" b",
        "\"a\", \"b\"",
        "\"a\";",
        "\"a\";P=1",
        "\"a\"b",
        "a\tb",
        "\"a\tb\"",
        "schlüssel",
        "\"schlüssel\"",
    ];
    assert_malformed(&bench, &server, &broken).await;
    let long = "k".repeat(4_000);
    assert_malformed(&bench, &server, &[&long, &format!("\"{long}\"")]).await;
}

async fn a_header_that_stands_there_twice_is_refused(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    for second in ["k", "other", ""] {
        let twice = server.post("/", "k", "").header("idempotency-key", second);
        send(twice).await.assert_refused(400, "key_malformed");
    }
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
}

async fn the_longest_key_passes_and_one_character_more_does_not(bench: Bench) {
    let (longest, longer) = ("k".repeat(255), "k".repeat(256));
    let server = bench.serve(KEY, bench.numbered()).await;
    assert_same(&bench, &server, &[&longest, &format!("\"{longest}\"")]).await;
    assert_malformed(&bench, &server, &[&longer, &format!("\"{longer}\"")]).await;
    let server = bench.serve_with(bench.engine().key_length(3), KEY, bench.numbered()).await;
    assert_same(&bench, &server, &["abc", "\"abc\""]).await;
    assert_malformed(&bench, &server, &["abcd", "abcde"]).await;
}

async fn a_uuid_is_one_key_in_all_its_spellings(bench: Bench) {
    let server = bench.serve(KEY.format(Format::Uuid), bench.numbered()).await;
    let spellings = [
        "8e03978e-40d5-43e8-bc93-6894a57f9324",
        "8E03978E-40D5-43E8-BC93-6894A57F9324",
        "\"8e03978e-40d5-43e8-bc93-6894a57f9324\"",
        "8e03978e40d543e8bc936894a57f9324",
        "urn:uuid:8e03978e-40d5-43e8-bc93-6894a57f9324",
    ];
    assert_same(&bench, &server, &spellings).await;
    assert_same(&bench, &server, &["8e03978e-40d5-43e8-bc93-6894a57f9325"]).await;
    let broken =
        ["8e03978e", "8e03978e-40d5-43e8-bc93-6894a57f932", "8e03978e-40d5-43e8-bc93-6894a57f932g"];
    assert_malformed(&bench, &server, &broken).await;
}

async fn hexadecimal_digits_are_one_key_in_all_their_spellings(bench: Bench) {
    let server = bench.serve(KEY.format(Format::Hex(4)), bench.numbered()).await;
    let spellings = ["0xDEADbeef", "deadbeef", "DEADBEEF", "0Xdeadbeef", "\"0xdeadbeef\""];
    assert_same(&bench, &server, &spellings).await;
    assert_same(&bench, &server, &["0xdeadbee0"]).await;
    let broken = ["0x", "0xdeadbee", "0xdeadbeef0", "0xdeadbeeg", "0x0xdeadbeef", "-0xdeadbee"];
    assert_malformed(&bench, &server, &broken).await;
}

async fn a_text_has_the_length_that_its_format_says(bench: Bench) {
    let server = bench.serve(KEY.format(Format::text(3..=5)), bench.numbered()).await;
    assert_same(&bench, &server, &["abc"]).await;
    assert_same(&bench, &server, &["abcde", "\"abcde\""]).await;
    assert_malformed(&bench, &server, &["ab", "abcdef", "\"ab\""]).await;
    // The format has the last word over the engine's own bound.
    let long = Policy::new(KEY).format(Format::text(1..=1_000));
    let server = bench.serve(long, bench.numbered()).await;
    assert_same(&bench, &server, &[&"k".repeat(1_000)]).await;
}

async fn a_body_field_is_found_by_name_by_pointer_and_in_forms(bench: Bench) {
    let anchors = [
        ("message.nonce", Anchor::body_field("message.nonce"), r#"{"message":{"nonce":"7"}}"#),
        ("pointer", Anchor::body_field("/a.b/0/c~1d"), r#"{"a.b":[{"c/d":"7"}]}"#),
    ];
    for (name, anchor, body) in anchors {
        let before = bench.effects.count();
        let server = bench.serve(Policy::new(anchor).space(name), bench.numbered()).await;
        for replay in [false, true] {
            let answer = send(server.post_without_key("/", body)).await;
            answer.assert_is(200, &format!("effect {}", before + 1), replay);
        }
        let without = send(server.post_without_key("/", r#"{"nonce":"7"}"#)).await;
        without.assert_refused(400, "key_missing");
    }
    let server = bench.serve(Anchor::body_field("message.nonce"), bench.numbered()).await;
    let form = |body: &str| {
        let request = server.request(reqwest::Method::POST, "/").header("x-api-key", "a");
        let form = "application/x-www-form-urlencoded; charset=utf-8";
        request.header("content-type", form).body(body.to_owned())
    };
    send(form("message.nonce=a%20b&x=1")).await.assert_is(200, "effect 3", false);
    send(form("message.nonce=a%20b&x=1")).await.assert_is(200, "effect 3", true);
    send(form("message.nonce=a+b&x=1")).await.assert_refused(422, "mismatch");
    send(form("x=1")).await.assert_refused(400, "key_missing");
    send(form("message.nonce=1&message.nonce=1")).await.assert_refused(400, "key_malformed");
    assert_eq!(bench.effects.count(), 3);
}

async fn a_scalar_is_a_key_by_its_text(bench: Bench) {
    let policy = Policy::new(Anchor::body_field("id")).fingerprint(FingerprintScheme::none());
    let server = bench.serve(policy, bench.numbered()).await;
    let same: [&[&str]; 6] = [
        &["7", "7.0", "\"7\"", "70e-1"],
        &["0", "-0", "\"0\"", "0.0"],
        &["false", "\"false\""],
        &["9007199254740993", "\"9007199254740993\""],
        &["9007199254740992"],
        &["\"\\u0061\"", "\"a\""],
    ];
    for (effects, values) in same.iter().enumerate() {
        for (sent, value) in values.iter().enumerate() {
            let answer = send(server.post_without_key("/", &format!("{{\"id\":{value}}}"))).await;
            answer.assert_is(200, &format!("effect {}", effects + 1), sent > 0);
        }
    }
    assert_eq!(bench.effects.count(), same.len());
}

async fn what_is_no_scalar_is_no_key(bench: Bench) {
    let server = bench.serve(Anchor::body_field("a.id"), bench.numbered()).await;
    for body in ["", "{}", "[]", "7", "null", r#"{"a":7}"#, r#"{"a":[]}"#, r#"{"a":{"id":null}}"#] {
        let refused = send(server.post_without_key("/", body)).await;
        refused.assert_refused(400, "key_missing");
    }
    for value in ["{}", "[]", "[7]", "\"\"", "\"a\\u0000b\"", "\"\\ud800\""] {
        let body = format!("{{\"a\":{{\"id\":{value}}}}}");
        let refused = send(server.post_without_key("/", &body)).await;
        refused.assert_refused(400, "key_malformed");
    }
    for body in [
        r#"{"a":{"id":"1","id":"1"}}"#,
        r#"{"a":{"id":"1"},"a":{"id":"1"}}"#,
        r#"{"a":{"id":"1","\u0069d":"2"}}"#,
        r#"{"a":{"id":"1"}} x"#,
        r#"{"a":{"id":"1"}"#,
        " ",
    ] {
        let refused = send(server.post_without_key("/", body)).await;
        refused.assert_refused(400, "key_malformed");
    }
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
}

async fn parameters_of_path_and_query_are_keys_decoded(bench: Bench) {
    let route = |anchor: Anchor| post(bench.numbered().idempotent(anchor));
    let app = Router::new()
        .route("/intents/{id}", route(Anchor::path("id")))
        .route("/query", route(Anchor::query("id")));
    let server = Server::start(app.with_state(bench.engine().build())).await;
    let send = async |path: &str| send(server.post_without_key(path, "")).await;
    send("/intents/a%20b").await.assert_is(200, "effect 1", false);
    send("/intents/%61%20b").await.assert_is(200, "effect 1", true);
    send("/intents/a+b").await.assert_is(200, "effect 2", false);
    send("/intents/%ff").await.assert_refused(400, "key_malformed");
    send("/intents/a%00b").await.assert_refused(400, "key_malformed");
    send("/query?id=a%20b").await.assert_is(200, "effect 3", false);
    send("/query?id=a%20b").await.assert_is(200, "effect 3", true);
    // One key in another spelling; the query string counts byte for byte.
    send("/query?id=a+b").await.assert_refused(422, "mismatch");
    send("/query?id=x&id=x").await.assert_refused(400, "key_malformed");
    send("/query?id=").await.assert_refused(400, "key_malformed");
    send("/query").await.assert_refused(400, "key_missing");
    assert_eq!(bench.effects.count(), 3);
}

async fn a_formatted_parameter_is_one_key_in_all_its_spellings(bench: Bench) {
    const ID: Anchor = Anchor::path("id").format(Format::Uuid);
    const BOTH: Anchor = Anchor::all(&[ID, Anchor::path("line")]);
    let uuid = "8e03978e-40d5-43e8-bc93-6894a57f9324";
    let spellings =
        [uuid, "8E03978E-40D5-43E8-BC93-6894A57F9324", "8e03978e40d543e8bc936894a57f9324"];
    let route = |policy: Policy| post(bench.numbered().idempotent(policy));
    let app = Router::new()
        .route("/alone/{id}", route(ID.into()))
        // The operation is in the fingerprint here, and not in the key.
        .route("/shared/{id}", route(Policy::new(ID).space("intents")))
        .route("/both/{id}/{line}", route(BOTH.into()))
        .route("/other/{id}", route(KEY.into()));
    let server = Server::start(app.with_state(bench.engine().build())).await;
    for (count, (prefix, rest)) in
        [("/alone", ""), ("/shared", ""), ("/both", "/A"), ("/both", "/a")].iter().enumerate()
    {
        for (i, spelling) in spellings.iter().enumerate() {
            let path = format!("{prefix}/{spelling}{rest}");
            let answer = send(server.post_without_key(&path, "")).await;
            answer.assert_is(200, &format!("effect {}", count + 1), i > 0);
        }
    }
    // Where the parameter is no key, it is as it was sent.
    for (i, spelling) in spellings.iter().enumerate() {
        let answer = send(server.post(&format!("/other/{spelling}"), "k", "")).await;
        answer.assert_is(200, &format!("effect {}", i + 5), false);
    }
    send(server.post_without_key("/alone/8e03978e", "")).await.assert_refused(400, "key_malformed");
}

#[test]
fn names_that_cannot_be_are_refused_where_they_are_said() {
    let mistakes: [fn(); 12] = [
        || _ = Anchor::path(""),
        || _ = Anchor::query(""),
        || _ = Scope::path(""),
        || _ = Scope::query(""),
        || _ = KEY.space(""),
        || _ = Policy::new(KEY).space(""),
        || _ = Idempotency::builder(MemoryStore::new()).space(""),
        || _ = Idempotency::builder(MemoryStore::new()).secret(""),
        || _ = Policy::new(KEY).format(Format::Hex(0)),
        || _ = FingerprintScheme::body_fields(&["a", "b..c"]),
        || _ = FingerprintScheme::request().headers(&["X-A", "X B"]),
        || _ = FingerprintScheme::request().headers(&["X-A"]).headers(&["X-B"]),
    ];
    for (i, mistake) in mistakes.into_iter().enumerate() {
        assert!(std::panic::catch_unwind(mistake).is_err(), "{i}");
    }
}

async fn several_anchors_are_one_key_and_their_values_do_not_run_together(bench: Bench) {
    const BOTH: Anchor = Anchor::all(&[Anchor::body_field("network"), Anchor::body_field("hash")]);
    let server = bench.serve(BOTH, bench.numbered()).await;
    let post = async |network: &str, hash: &str| {
        let body = json!({ "network": network, "hash": hash }).to_string();
        send(server.post_without_key("/", &body)).await
    };
    post("ab", "c").await.assert_is(200, "effect 1", false);
    post("ab", "c").await.assert_is(200, "effect 1", true);
    post("a", "bc").await.assert_is(200, "effect 2", false);
    post("c", "ab").await.assert_is(200, "effect 3", false);
    post("a\u{0}", "c").await.assert_refused(400, "key_malformed");
    let half = send(server.post_without_key("/", r#"{"network":"ab"}"#)).await;
    half.assert_refused(400, "key_missing");
    assert_eq!(bench.effects.count(), 3);
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

#[idempotent(anchor = arg(order, body["line"].as_u64().unwrap_or_default()))]
async fn add_line(
    State(effects): State<Effects>,
    Path(order): Path<String>,
    Json(body): Json<Value>,
) -> String {
    format!("{order} {} {}", body["line"], effects.happen())
}

async fn an_argument_of_the_handler_is_a_key(bench: Bench) {
    let state = App { engine: bench.engine().build(), effects: bench.effects.clone() };
    let app = Router::new().route("/orders/{order}", post(add_line)).with_state(state);
    let server = Server::start(app).await;
    let send = async |path: &str, body: &str| send(server.post_without_key(path, body)).await;
    send("/orders/7", r#"{"line":1}"#).await.assert_is(200, "7 1 1", false);
    send("/orders/7", r#"{"line":1}"#).await.assert_is(200, "7 1 1", true);
    send("/orders/7", r#"{"line":2}"#).await.assert_is(200, "7 2 2", false);
    send("/orders/8", r#"{"line":1}"#).await.assert_is(200, "8 1 3", false);
    send("/orders/7", r#"{"line":1,"x":0}"#).await.assert_refused(422, "mismatch");
    // The handler's own extractor turns it away before there is a key.
    assert_eq!(send("/orders/7", r#"{"line":"#).await.status, 400);
    assert_eq!(send("/orders/%ff", r#"{"line":1}"#).await.status, 400);
    assert_eq!(bench.effects.count(), 3);
}

async fn code_of_the_applications_makes_a_key(bench: Bench) {
    fn order_and_line(request: &AnchorRequest<'_>) -> Result<Values, AnchorError> {
        let order = request.header("X-Order")?.ok_or(AnchorError::missing("X-Order"))?;
        let line = request.body_field("line")?.ok_or(AnchorError::missing("line"))?;
        Ok(Values::from_iter([order, line.as_str()]))
    }
    let server = bench.serve(Anchor::custom(order_and_line), bench.numbered()).await;
    let order = |order: &str, body: &str| {
        server.post_without_key("/", body).header("x-order", order.to_owned())
    };
    send(order("7", r#"{"line":1}"#)).await.assert_is(200, "effect 1", false);
    send(order("7", r#"{"line":1}"#)).await.assert_is(200, "effect 1", true);
    send(order("8", r#"{"line":1}"#)).await.assert_is(200, "effect 2", false);
    send(order("7", r#"{}"#)).await.assert_refused(400, "key_missing");
    send(order("", r#"{"line":1}"#)).await.assert_refused(400, "key_malformed");
    assert_eq!(bench.effects.count(), 2);
}

#[idempotent(anchor = header("Idempotency-Key"), format = text(1..=8), optional)]
async fn post_note(
    State(effects): State<Effects>,
    Query(query): Query<Vec<(String, String)>>,
) -> String {
    format!("{} {}", effects.happen(), query.len())
}

async fn notes(bench: &Bench) -> Server {
    let state = App { engine: bench.engine().build(), effects: bench.effects.clone() };
    Server::start(Router::new().route("/", post(post_note)).with_state(state)).await
}

async fn without_an_optional_key_the_handler_runs_each_time(bench: Bench) {
    let server = notes(&bench).await;
    send(server.post_without_key("/?a=1", "")).await.assert_is(200, "1 1", false);
    send(server.post_without_key("/?a=1", "")).await.assert_is(200, "2 1", false);
    // Not even a scope is asked for.
    send(server.request(reqwest::Method::POST, "/")).await.assert_is(200, "3 0", false);
    assert_eq!(bench.store.claims().len(), 0);
    assert_eq!(bench.told.outcomes(), [Outcome::Unprotected; 3]);
}

async fn an_optional_key_that_is_there_is_a_key_and_must_be_one(bench: Bench) {
    let server = notes(&bench).await;
    send(server.post("/", "k", "")).await.assert_is(200, "1 0", false);
    send(server.post("/", "k", "")).await.assert_is(200, "1 0", true);
    send(server.post("/", "k", "x")).await.assert_refused(422, "mismatch");
    for key in ["", "\"", "123456789"] {
        send(server.post("/", key, "")).await.assert_refused(400, "key_malformed");
    }
    assert_eq!(bench.effects.count(), 1);
}

async fn a_part_of_an_optional_key_is_no_key_and_not_none(bench: Bench) {
    const BOTH: Anchor =
        Anchor::all(&[Anchor::body_field("network"), Anchor::body_field("hash")]).optional();
    let server = bench.serve(BOTH, bench.numbered()).await;
    for body in [r#"{"network":"a"}"#, r#"{"hash":"b","network":null}"#] {
        send(server.post_without_key("/", body)).await.assert_refused(400, "key_missing");
    }
    let malformed = send(server.post_without_key("/", r#"{"hash":[]}"#)).await;
    malformed.assert_refused(400, "key_malformed");
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
    send(server.post_without_key("/", "{}")).await.assert_is(200, "effect 1", false);
    send(server.post_without_key("/", "")).await.assert_is(200, "effect 2", false);
}
