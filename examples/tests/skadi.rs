//! The sentences of Skadi's document that speak of the server, each a test.

#![cfg(test)]

#[path = "skadi/budget.rs"]
mod budget;
mod common;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{
    Answer, Server, Shell, all, answer_lost, failing, over_each_store, over_each_store_with, send,
    send_at_once, slow, sqlite,
};
use hmac::{Hmac, KeyInit, Mac};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sha2::Sha256;
use tempfile::TempDir;

const SKADI: &str = env!("CARGO_BIN_EXE_skadi");
const SOURCE: &str = include_str!("../src/bin/skadi.rs");
const ADDRESS: &str = "http://127.0.0.1:3004";

const KEY: &str = "0b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d";

const SUBMIT: &str = "/create-submission";
const PROCESS: &str = "/process-transaction";
const QUOTED: [&str; 7] = [
    "endorsements",
    "cancellations",
    "extensions",
    "renewals",
    "rewrites",
    "audits",
    "oos-rebases",
];

/// The budget refills every two milliseconds, so that it is in no test's way; a day is a minute and
/// a half.
const AMPLE: &[&str] = &["--time-scale", "1000"];

/// An API key and its secret.
type Credentials = (&'static str, &'static str);
const HARBOR: Credentials = ("harbor-1", "oak");
const HARBOR_TOO: Credentials = ("harbor-2", "elm");
const TERN: Credentials = ("tern-1", "ash");

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn signature(secret: &str, timestamp: &str, body: &str) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    let mac = mac.chain_update(timestamp).chain_update(body);
    format!("sha256={}", hex::encode(mac.finalize().into_bytes()))
}

/// A request with whatever signing headers.
fn presented(
    server: &Server,
    (method, path): (Method, &str),
    [api_key, timestamp, signature]: [&str; 3],
    body: &str,
) -> RequestBuilder {
    let request = server.request(method, path).header("Content-Type", "application/json");
    let request = request.header("X-API-Key", api_key).header("X-Timestamp", timestamp);
    request.header("X-Signature", signature).body(body.to_owned())
}

/// A request that was signed so many seconds ago.
fn signed_ago(
    seconds: u64,
    server: &Server,
    target: (Method, &str),
    (api_key, secret): Credentials,
    body: &str,
) -> RequestBuilder {
    let timestamp = (now() - seconds).to_string();
    let signature = signature(secret, &timestamp, body);
    presented(server, target, [api_key, &timestamp, &signature], body)
}

fn write_as(who: Credentials, server: &Server, path: &str, body: &Value) -> RequestBuilder {
    signed_ago(0, server, (Method::POST, path), who, &body.to_string())
}

fn write(server: &Server, path: &str, body: &Value) -> RequestBuilder {
    write_as(HARBOR, server, path, body)
}

fn keyed(server: &Server, path: &str, key: &str, body: &Value) -> RequestBuilder {
    write(server, path, body).header("Idempotency-Key", key)
}

fn read(server: &Server, path: &str) -> RequestBuilder {
    signed_ago(0, server, (Method::GET, path), HARBOR, "")
}

/// A body that every write endpoint takes.
fn body() -> Value {
    json!({ "insured": "Acme", "policy": "P-7", "amount": "125.00", "effective": "2027-01-01" })
}

/// Another one.
fn other_body() -> Value {
    json!({ "insured": "Emca", "policy": "P-8", "amount": "7.00", "effective": "2028-01-01" })
}

/// A write endpoint that takes keys, its success, and what it makes happen.
struct Write {
    path: String,
    status: u16,
    effect: &'static str,
}

async fn quote(server: &Server, kind: &str) -> String {
    let quoted = send(write(server, &format!("/{kind}"), &body())).await;
    quoted.is_created();
    format!("/{kind}/{}/bind", quoted.json()["id"].as_str().unwrap())
}

/// All of them, with a fresh quote for each that binds one.
async fn writes(server: &Server) -> Vec<Write> {
    let mut writes = vec![
        Write { path: SUBMIT.to_owned(), status: 201, effect: "submissions" },
        Write { path: PROCESS.to_owned(), status: 200, effect: "transactions" },
    ];
    for kind in QUOTED {
        writes.push(Write { path: quote(server, kind).await, status: 200, effect: kind });
    }
    writes
}

#[track_caller]
fn ran(answer: &Answer, status: u16) {
    assert_eq!((answer.status, answer.is_replay()), (status, false), "{}", answer.text());
}

#[track_caller]
fn is_conflict(answer: &Answer) {
    answer.is_error(409, "idempotency-conflict");
}

#[tokio::test]
async fn the_same_key_and_body_get_the_original_response_byte_for_byte_on_every_write_endpoint() {
    for server in over_each_store(SKADI) {
        for Write { path, status, effect } in writes(&server).await {
            let original = send(keyed(&server, &path, &path, &body())).await;
            ran(&original, status);
            for _ in 0..3 {
                send(keyed(&server, &path, &path, &body())).await.replays(&original);
            }
            assert_eq!(server.effects(effect).await, 1, "{path}");
        }
    }
}

#[tokio::test]
async fn the_same_key_with_another_body_is_an_idempotency_conflict_on_every_write_endpoint() {
    for server in over_each_store(SKADI) {
        for Write { path, effect, .. } in writes(&server).await {
            let original = send(keyed(&server, &path, &path, &body())).await;
            is_conflict(&send(keyed(&server, &path, &path, &other_body())).await);
            // Byte for byte: signed as it is.
            let spaced = format!("{} ", body());
            let spaced = signed_ago(0, &server, (Method::POST, &path), HARBOR, &spaced);
            is_conflict(&send(spaced.header("Idempotency-Key", &path)).await);
            send(keyed(&server, &path, &path, &body())).await.replays(&original);
            assert_eq!(server.effects(effect).await, 1, "{path}");
        }
    }
}

#[tokio::test]
async fn a_retry_before_the_first_finishes_is_in_flight_on_every_write_endpoint() {
    for server in over_each_store(SKADI) {
        let writes = writes(&server).await;
        // Time enough to begin nine and to repeat each.
        server.behave(json!({ "latency_ms": 3_000 })).await;
        let requests = writes.iter().map(|it| keyed(&server, &it.path, &it.path, &body()));
        let requests = requests.collect::<Vec<_>>();
        let mut originals = Vec::new();
        for request in &requests {
            originals.push(server.begin(request.try_clone().unwrap()).await);
        }
        for request in &requests {
            for duplicate in send_at_once(request, 3).await {
                duplicate.is_error(409, "in_flight");
                assert!(duplicate.headers.contains_key("retry-after"));
            }
        }
        for ((original, request), Write { path, status, effect }) in
            originals.into_iter().zip(&requests).zip(writes)
        {
            let original = original.await.unwrap();
            ran(&original, status);
            // It backs off and retries.
            server.patiently(request).await.replays(&original);
            assert_eq!(server.effects(effect).await, 1, "{path}");
        }
    }
}

/// A day is two seconds.
#[tokio::test]
async fn a_key_whose_24_hours_are_over_is_fresh() {
    for server in over_each_store_with(SKADI, &["--time-scale", "43200"]) {
        let original = send(keyed(&server, SUBMIT, KEY, &body())).await;
        send(keyed(&server, SUBMIT, KEY, &body())).await.replays(&original);
        tokio::time::sleep(Duration::from_millis(2_100)).await;
        let fresh = send(keyed(&server, SUBMIT, KEY, &body())).await;
        fresh.is_created();
        assert_ne!(fresh.body, original.body);
        assert_eq!(server.effects("submissions").await, 2);
        // Then any body may have it.
        tokio::time::sleep(Duration::from_millis(2_100)).await;
        send(keyed(&server, SUBMIT, KEY, &other_body())).await.is_created();
    }
}

/// A day is four seconds.
#[tokio::test]
async fn the_window_begins_with_the_first_answer_and_a_replay_does_not_prolong_it() {
    for server in over_each_store_with(SKADI, &["--time-scale", "21600"]) {
        server.behave(slow()).await;
        let sent = Instant::now();
        let original = send(keyed(&server, SUBMIT, KEY, &body())).await;
        let answered = Instant::now();
        assert!(answered - sent >= Duration::from_secs(1));
        server.behave(json!({})).await;
        // The last one is more than four seconds after the request and less than that after the
        // answer, unless the machine is that slow.
        for tenths in [10, 20, 35] {
            tokio::time::sleep_until((answered + Duration::from_millis(tenths * 100)).into()).await;
            let replay = send(keyed(&server, SUBMIT, KEY, &body())).await;
            if answered.elapsed() < Duration::from_secs(4) {
                replay.replays(&original);
            }
        }
        tokio::time::sleep_until((answered + Duration::from_millis(4_100)).into()).await;
        send(keyed(&server, SUBMIT, KEY, &body())).await.is_created();
    }
}

#[tokio::test]
async fn without_the_header_two_equal_requests_run_twice() {
    for server in over_each_store(SKADI) {
        for (path, status, effect) in [(SUBMIT, 201, "submissions"), (PROCESS, 200, "transactions")]
        {
            let [first, second] = [(); 2].map(|()| write(&server, path, &body()));
            let (first, second) = (send(first).await, send(second).await);
            ran(&first, status);
            ran(&second, status);
            assert_ne!(first.json()["id"], second.json()["id"]);
            assert_eq!(server.effects(effect).await, 2);
        }
    }
}

#[tokio::test]
async fn a_quote_is_bound_once_with_a_key_or_without() {
    for server in over_each_store(SKADI) {
        for kind in QUOTED {
            let bind = quote(&server, kind).await;
            let bound = send(keyed(&server, &bind, kind, &body())).await;
            ran(&bound, 200);
            assert_eq!(bound.json()["status"], "bound");
            send(write(&server, &bind, &body())).await.is_error(409, "already_bound");
            assert_eq!(server.effects(kind).await, 1);
        }
        // What was answered is replayed, also if it was no.
        let refused = send(keyed(&server, "/renewals/NONE/bind", KEY, &body())).await;
        refused.is_error(404, "not_found");
        send(keyed(&server, "/renewals/NONE/bind", KEY, &body())).await.replays(&refused);
        is_conflict(&send(keyed(&server, "/renewals/NONE/bind", KEY, &other_body())).await);
    }
}

#[tokio::test]
async fn quoting_takes_no_key() {
    for server in over_each_store(SKADI) {
        for kind in QUOTED {
            let path = format!("/{kind}");
            let first = send(keyed(&server, &path, KEY, &body())).await;
            let second = send(keyed(&server, &path, KEY, &body())).await;
            ran(&first, 201);
            ran(&second, 201);
            assert_ne!(first.json()["id"], second.json()["id"]);
        }
    }
}

#[tokio::test]
async fn a_key_sent_to_another_endpoint_is_a_conflict() {
    for server in over_each_store_with(SKADI, AMPLE) {
        let writes = writes(&server).await;
        for first in &writes {
            let original = send(keyed(&server, &first.path, &first.path, &body())).await;
            ran(&original, first.status);
            for second in writes.iter().filter(|second| second.path != first.path) {
                is_conflict(&send(keyed(&server, &second.path, &first.path, &body())).await);
            }
            send(keyed(&server, &first.path, &first.path, &body())).await.replays(&original);
        }
        // Also to another quote of the same kind.
        let (one, other) = (quote(&server, "audits").await, quote(&server, "audits").await);
        ran(&send(keyed(&server, &one, KEY, &body())).await, 200);
        is_conflict(&send(keyed(&server, &other, KEY, &body())).await);
        for Write { effect, .. } in &writes {
            let expected = if *effect == "audits" { 2 } else { 1 };
            assert_eq!(server.effects(effect).await, expected, "{effect}");
        }
    }
}

#[tokio::test]
async fn a_key_has_up_to_255_characters() {
    for server in over_each_store(SKADI) {
        for key in [&*"k".repeat(255), KEY, "submission draft 2041", "k"] {
            let original = send(keyed(&server, SUBMIT, key, &body())).await;
            original.is_created();
            send(keyed(&server, SUBMIT, key, &body())).await.replays(&original);
        }
        for key in [&*"k".repeat(256), "", "\"open"] {
            send(keyed(&server, SUBMIT, key, &body())).await.is_error(400, "key_malformed");
        }
        assert_eq!(server.effects("submissions").await, 4);
    }
}

#[tokio::test]
async fn a_business_identifier_collapses_retries_across_process_restarts() {
    let directory = TempDir::new().unwrap();
    let store = sqlite(directory.path());
    let server = Server::start(SKADI, &["--store", &store]);
    let original = send(keyed(&server, SUBMIT, "draft-2041", &body())).await;
    original.is_created();
    server.crash();
    let server = Server::start(SKADI, &["--store", &store]);
    send(keyed(&server, SUBMIT, "draft-2041", &body())).await.replays(&original);
    assert_eq!(server.effects("submissions").await, 0);
}

#[tokio::test]
async fn the_signing_headers_differ_between_retries_and_do_not_matter() {
    for server in over_each_store(SKADI) {
        let raw = body().to_string();
        let attempt = |seconds, who| {
            let request = signed_ago(seconds, &server, (Method::POST, SUBMIT), who, &raw);
            request.header("Idempotency-Key", KEY)
        };
        let original = send(attempt(120, HARBOR)).await;
        original.is_created();
        send(attempt(60, HARBOR)).await.replays(&original);
        send(attempt(0, HARBOR)).await.replays(&original);
        // The key is the principal's, whichever of its API keys it has now.
        send(attempt(0, HARBOR_TOO)).await.replays(&original);
        assert_eq!(server.effects("submissions").await, 1);
    }
}

#[tokio::test]
async fn another_principals_same_key_is_another_key() {
    for server in over_each_store(SKADI) {
        let theirs = || write_as(TERN, &server, SUBMIT, &body()).header("Idempotency-Key", KEY);
        let first = send(keyed(&server, SUBMIT, KEY, &body())).await;
        let second = send(theirs()).await;
        second.is_created();
        assert_ne!(first.json()["id"], second.json()["id"]);
        send(theirs()).await.replays(&second);
        send(keyed(&server, SUBMIT, KEY, &body())).await.replays(&first);
        // Nor is a quote theirs.
        let bind = quote(&server, "rewrites").await;
        let stolen = write_as(TERN, &server, &bind, &body()).header("Idempotency-Key", "steal");
        send(stolen).await.is_error(404, "not_found");
    }
}

#[tokio::test]
async fn a_forged_retry_gets_no_replay() {
    for server in over_each_store(SKADI) {
        send(keyed(&server, SUBMIT, KEY, &body())).await.is_created();
        let (raw, at) = (body().to_string(), now().to_string());
        let (early, late) = ((now() - 400).to_string(), (now() + 400).to_string());
        let sign = |secret, at: &str| signature(secret, at, &raw);
        let (good, theirs) = (sign("oak", &at), sign("ash", &at));
        let other = signature("oak", &at, &other_body().to_string());
        let bare = good.trim_start_matches("sha256=");
        let forgeries = [
            ([HARBOR.0, &at, &theirs], "invalid_signature"),
            ([HARBOR.0, &at, &other], "invalid_signature"),
            ([HARBOR.0, &at, bare], "invalid_signature"),
            ([HARBOR.0, &at, &good[..good.len() - 2]], "invalid_signature"),
            ([HARBOR.0, &at, "sha256="], "invalid_signature"),
            ([HARBOR.0, &at, "sha256=none"], "invalid_signature"),
            ([HARBOR.0, &at, ""], "invalid_signature"),
            // What was signed is the timestamp that is sent.
            ([HARBOR.0, &(now() - 1).to_string(), &good], "invalid_signature"),
            ([HARBOR.0, &early, &sign("oak", &early)], "stale_timestamp"),
            ([HARBOR.0, &late, &sign("oak", &late)], "stale_timestamp"),
            ([HARBOR.0, "today", &sign("oak", "today")], "stale_timestamp"),
            ([HARBOR.0, "", &sign("oak", "")], "stale_timestamp"),
            (["kidd", &at, &good], "unauthorized"),
            (["", &at, &good], "unauthorized"),
        ];
        for (headers, code) in forgeries {
            for target in [(Method::POST, SUBMIT), (Method::GET, "/submissions")] {
                let request = presented(&server, target, headers, &raw);
                let refused = send(request.header("Idempotency-Key", KEY)).await;
                refused.is_error(401, code);
                assert!(!refused.is_replay());
            }
        }
        let unsigned = server.post(SUBMIT, &body()).header("Idempotency-Key", KEY);
        send(unsigned).await.is_error(401, "unauthorized");
        // The same headers are good for the body that they sign.
        let target = (Method::POST, SUBMIT);
        let honest = presented(&server, target, [HARBOR.0, &at, &good], &raw);
        assert!(send(honest.header("Idempotency-Key", KEY)).await.is_replay());
    }
}

#[tokio::test]
async fn of_many_at_once_with_one_key_one_runs() {
    for server in over_each_store(SKADI) {
        let bodies = (0..40).map(|n| if n % 2 == 0 { body() } else { other_body() });
        let requests = bodies.map(|body| keyed(&server, SUBMIT, KEY, &body)).collect::<Vec<_>>();
        server.behave(slow()).await;
        let answers = all(requests).await;
        let created = |it: &&Answer| it.status == 201 && !it.is_replay();
        assert_eq!(answers.iter().filter(created).count(), 1);
        for answer in answers.iter().filter(|it| it.status != 201) {
            assert!(matches!(&*answer.code(), "idempotency-conflict" | "in_flight"));
            assert_eq!(answer.status, 409);
        }
        assert_eq!(server.effects("submissions").await, 1);
    }
}

#[tokio::test]
async fn after_a_failure_the_same_key_runs_again_with_one_effect() {
    for server in over_each_store_with(SKADI, AMPLE) {
        for (name, behaviour) in [("lost", answer_lost()), ("failed", failing(1, 503))] {
            for Write { path, status, effect } in writes(&server).await {
                let (before, key) = (server.effects(effect).await, format!("{path} {name}"));
                server.behave(behaviour.clone()).await;
                let failed = send(keyed(&server, &path, &key, &body())).await;
                failed.is_error(502, "carrier_unavailable");
                is_conflict(&send(keyed(&server, &path, &key, &other_body())).await);
                let retry = send(keyed(&server, &path, &key, &body())).await;
                ran(&retry, status);
                send(keyed(&server, &path, &key, &body())).await.replays(&retry);
                assert_eq!(server.effects(effect).await, before + 1, "{path}");
            }
        }
        // What was tried again is there once.
        let submissions = send(read(&server, "/submissions")).await.json();
        assert_eq!(submissions["data"].as_array().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_client_that_hung_up_finds_its_answer() {
    for server in over_each_store(SKADI) {
        server.behave(slow()).await;
        server.begin(keyed(&server, SUBMIT, KEY, &body())).await.abort();
        let retry = server.patiently(&keyed(&server, SUBMIT, KEY, &body())).await;
        assert!(retry.is_replay() && retry.status == 201, "{}", retry.text());
        assert_eq!(server.effects("submissions").await, 1);
    }
}

#[tokio::test]
async fn a_body_that_cannot_be_read_uses_no_key_up() {
    for server in over_each_store(SKADI) {
        let large = format!("{{\"insured\":\"{}\"}}", "x".repeat(1024 * 1024));
        for raw in ["{", "[]", r#"{"insured":7}"#, &large] {
            let request = signed_ago(0, &server, (Method::POST, SUBMIT), HARBOR, raw);
            let refused = send(request.header("Idempotency-Key", KEY)).await;
            assert!(matches!(refused.status, 400 | 413 | 422), "{}", refused.text());
            assert!(!refused.code().is_empty());
        }
        server.behave(failing(1, 400)).await;
        let declined = send(keyed(&server, SUBMIT, "declined", &body())).await;
        declined.is_error(422, "declined");
        send(keyed(&server, SUBMIT, "declined", &body())).await.replays(&declined);
        send(keyed(&server, SUBMIT, KEY, &body())).await.is_created();
    }
}

#[tokio::test]
async fn reads_ignore_the_header() {
    for server in over_each_store(SKADI) {
        let submission = send(keyed(&server, SUBMIT, KEY, &body())).await.json();
        let one = format!("/submissions/{}", submission["id"].as_str().unwrap());
        for path in [&*one, "/submissions", "/transactions", "/endorsements/ENDORSEMENT", "/audits"]
        {
            for key in [KEY, "", "another key"] {
                let answer = send(read(&server, path).header("Idempotency-Key", key)).await;
                ran(&answer, 200);
            }
        }
        assert_eq!(send(read(&server, &one)).await.json(), submission);
        send(read(&server, "/submissions/none")).await.is_error(404, "not_found");
        let theirs = signed_ago(0, &server, (Method::GET, &one), TERN, "");
        send(theirs).await.is_error(404, "not_found");
    }
}

#[tokio::test]
async fn the_lines_in_the_header_do_what_they_say() {
    let server = Server::start(SKADI, &[]);
    let mut shell = Shell::new(&server, ADDRESS);
    let lines = Shell::lines_in(SOURCE);
    let [submit, other_body, other_principal, renewal, bind, process, show, effects] = &lines[..]
    else {
        panic!("other lines: {lines:#?}")
    };
    let original = shell.run(submit).await;
    original.is_created();
    // The second is signed anew.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    shell.run(submit).await.replays(&original);
    is_conflict(&shell.run(other_body).await);
    shell.run(other_principal).await.is_created();
    shell.run(renewal).await.is_created();
    for line in [bind, process] {
        let original = shell.run(line).await;
        ran(&original, 200);
        shell.run(line).await.replays(&original);
    }
    assert_eq!(shell.run(show).await.json()["status"], "bound");
    let expected = json!({ "submissions": 2, "endorsements": 1, "transactions": 1 });
    assert_eq!(shell.run(effects).await.json(), expected);
}
