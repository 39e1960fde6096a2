//! What `quickstart` tells, and what its header promises.

#![cfg(test)]

mod common;

use std::{path::Path, process::Command, time::Duration};

use common::{Answer, Server, Shell, answer_lost, over_each_store, send, slow, sqlite};
use reqwest::RequestBuilder;
use serde_json::json;
use tempfile::TempDir;

const QUICKSTART: &str = env!("CARGO_BIN_EXE_quickstart");
const SOURCE: &str = include_str!("../src/bin/quickstart.rs");
const ADDRESS: &str = "http://127.0.0.1:3000";

/// Plays the story in a directory; says whether it ended well, and what it printed.
fn once(directory: &Path, switches: &[&str]) -> (bool, String) {
    let mut command = Command::new(QUICKSTART);
    command.args(["--once", "--port", "0"]).args(switches).current_dir(directory);
    let output = command.output().expect("it runs");
    (output.status.success(), String::from_utf8(output.stdout).expect("text"))
}

/// A payment by alice.
fn payment(server: &Server, key: &str, amount: u64) -> RequestBuilder {
    let request = server.post("/payments", &json!({ "amount": amount }));
    request.header("X-API-Key", "alice").header("Idempotency-Key", key)
}

/// A server whose story is told, over a database in a directory.
fn after_the_story(directory: &Path) -> Server {
    let server = Server::start(QUICKSTART, &["--store", &sqlite(directory)]);
    server.line_with("Now you");
    server
}

#[test]
fn once_ends_well_on_each_store() {
    for store in ["memory", "sqlite:records.db"] {
        let directory = TempDir::new().unwrap();
        let (success, told) = once(directory.path(), &["--store", store]);
        assert!(success, "{told}");
        assert!(!told.contains("NOT AS TOLD"), "{told}");
        assert!(told.contains("7. Another tenant's same key is another key."), "{told}");
        assert!(told.lines().count() < 30, "more than a screen:\n{told}");
    }
}

#[test]
fn records_are_kept_in_the_working_directory_by_default_and_the_story_can_be_told_again() {
    let directory = TempDir::new().unwrap();
    for _ in 0..2 {
        let (success, told) = once(directory.path(), &[]);
        assert!(success, "{told}");
    }
    assert!(directory.path().join("quickstart.db").exists());
}

/// With a window of a millisecond there are no replays.
#[test]
fn once_fails_if_a_step_is_not_as_told() {
    let directory = TempDir::new().unwrap();
    let (success, told) = once(directory.path(), &["--time-scale", "86400000"]);
    assert!(!success, "{told}");
    assert!(told.contains("NOT AS TOLD: expected a replay"), "{told}");
}

#[tokio::test]
async fn the_lines_in_the_header_do_what_they_say() {
    let directory = TempDir::new().unwrap();
    let server = after_the_story(directory.path());
    let mut shell = Shell::new(&server, ADDRESS);
    let before = server.effects("charges").await;
    let lines = Shell::lines_in(SOURCE);
    let [pay, other_body, downstream, uncertain, effects] = &lines[..] else {
        panic!("other lines: {lines:#?}")
    };
    let first = shell.run(pay).await;
    first.is_created();
    shell.run(pay).await.replays(&first);
    assert_eq!(shell.run(other_body).await.status, 422);
    assert_eq!(shell.run(downstream).await.status, 200);
    assert_eq!(shell.run(uncertain).await.status, 502);
    shell.run(uncertain).await.is_created();
    assert_eq!(shell.run(effects).await.json()["charges"], before + 2);
}

#[tokio::test]
async fn the_lines_that_it_prints_do_what_they_say() {
    let directory = TempDir::new().unwrap();
    let server = after_the_story(directory.path());
    let mut shell = Shell::new(&server, &server.url);
    let pay = server.line_with("curl");
    let first = shell.run(&pay).await;
    first.is_created();
    shell.run(&pay).await.replays(&first);
    assert_eq!(shell.run(&server.line_with("curl")).await.status, 422);
    assert_eq!(shell.run(&server.line_with("curl")).await.json()["charges"], 6);
}

#[tokio::test]
async fn a_key_is_required_and_so_is_a_tenant() {
    for server in over_each_store(QUICKSTART) {
        server.line_with("Now you");
        let before = server.effects("charges").await;
        let body = json!({ "amount": 1 });
        let no_key = send(server.post("/payments", &body).header("X-API-Key", "alice")).await;
        assert_eq!((no_key.status, code(&no_key)), (400, "key_missing".to_owned()));
        let no_tenant = send(server.post("/payments", &body).header("Idempotency-Key", "a")).await;
        assert_eq!((no_tenant.status, code(&no_tenant)), (401, "scope_missing".to_owned()));
        assert_eq!(server.effects("charges").await, before);
    }
}

#[tokio::test]
async fn a_refusal_of_the_bank_frees_the_key() {
    for server in over_each_store(QUICKSTART) {
        server.line_with("Now you");
        server.behave(json!({ "fail": 1, "status": 402 })).await;
        assert_eq!(send(payment(&server, "a", 1)).await.status, 402);
        send(payment(&server, "a", 2)).await.is_created();
    }
}

#[tokio::test]
async fn a_rerun_after_a_lost_answer_charges_once() {
    for server in over_each_store(QUICKSTART) {
        server.line_with("Now you");
        let before = server.effects("charges").await;
        server.behave(answer_lost()).await;
        assert_eq!(send(payment(&server, "a", 1)).await.status, 502);
        send(payment(&server, "a", 1)).await.is_created();
        assert_eq!(server.effects("charges").await, before + 1);
    }
}

#[tokio::test]
async fn a_retry_is_a_replay_through_a_crash_and_a_restart() {
    let directory = TempDir::new().unwrap();
    let server = after_the_story(directory.path());
    let first = send(payment(&server, "a", 1)).await;
    first.is_created();
    drop(server);
    let server = after_the_story(directory.path());
    let before = server.effects("charges").await;
    send(payment(&server, "a", 1)).await.replays(&first);
    assert_eq!(server.effects("charges").await, before);
}

#[cfg(unix)]
#[tokio::test]
async fn stopping_waits_for_the_handler_whose_client_hung_up() {
    let directory = TempDir::new().unwrap();
    let server = after_the_story(directory.path());
    server.behave(slow()).await;
    server.begin(payment(&server, "a", 1)).await.abort();
    // The server must hear of it first, or it would wait for the connection instead.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(server.terminate());
    let server = after_the_story(directory.path());
    let before = server.effects("charges").await;
    let retry = send(payment(&server, "a", 1)).await;
    assert!(retry.is_replay() && retry.status == 201, "{} {}", retry.status, retry.text());
    assert_eq!(server.effects("charges").await, before);
}

#[test]
fn switches_that_make_no_sense_are_explained() {
    let says = |switches: &[&str]| {
        let output = Command::new(QUICKSTART).args(switches).output().expect("it runs");
        assert!(!output.status.success());
        String::from_utf8(output.stderr).expect("text")
    };
    assert!(
        says(&["--store", "disk"]).contains("expected `memory`, `sqlite:PATH`, `postgres://…`")
    );
    assert!(says(&["--time-scale", "0"]).contains("time-scale"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = says(&["--store", "memory", "--port", &port]);
    assert!(said.contains(&port) && said.contains("--port 0"), "{said}");
}

/// The code of a problem document.
fn code(answer: &Answer) -> String {
    answer.json()["code"].as_str().unwrap_or_default().to_owned()
}
