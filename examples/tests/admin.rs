//! The operator's tool on stores that examples have written, and crashed on.

#![cfg(test)]

mod common;

use std::{path::Path, process::Command, time::Duration};

use alloy_primitives::Address;
use common::{Server, answer_lost, send, slow, sqlite};
use examples::wallet::{Wallet, Withdrawal};
use idem_runtime::{Anchor, Format, Idempotency, Scope, store::SqliteStore};
use reqwest::RequestBuilder;
use serde_json::{Value, json};
use tempfile::TempDir;

const ADMIN: &str = env!("CARGO_BIN_EXE_admin");
const QUICKSTART: &str = env!("CARGO_BIN_EXE_quickstart");
const PORTFOLIO: &str = env!("CARGO_BIN_EXE_portfolio");

/// What the tool says about the store in a directory; what is wrong, where it fails.
fn admin(directory: &Path, words: &[&str]) -> Result<String, String> {
    let mut command = Command::new(ADMIN);
    command.args(["--store", &sqlite(directory)]).args(words);
    let output = command.output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

/// A payment by a tenant.
fn payment(server: &Server, tenant: &str, key: &str) -> RequestBuilder {
    let request = server.post("/payments", &json!({ "amount": 100 }));
    request.header("X-API-Key", tenant).header("Idempotency-Key", key)
}

/// A server whose story is told, over a database in a directory.
fn after_the_story(directory: &Path) -> Server {
    let server = Server::start(QUICKSTART, &["--store", &sqlite(directory)]);
    server.line_with("Now you");
    server
}

/// The words that name the key of a payment.
fn name<'a>(tenant: &'a str, key: &'a str) -> [&'a str; 8] {
    ["--scope", tenant, "--key", key, "--method", "POST", "--route", "/payments"]
}

/// The operation id in what the tool has said of one record.
fn id_in(said: &str) -> &str {
    let line = said.lines().find_map(|line| line.strip_prefix("id "));
    line.expect("an operation id").trim()
}

#[tokio::test]
async fn a_refusals_operation_id_leads_to_the_record() {
    let directory = TempDir::new().unwrap();
    let server = after_the_story(directory.path());
    server.behave(slow()).await;
    let cut_off = server.begin(payment(&server, "alice", "order-9")).await;
    server.crash();
    assert!(cut_off.await.is_err(), "there was an answer");

    // The client tries again, and quotes to the support what it was told.
    let server = after_the_story(directory.path());
    let refused = send(payment(&server, "alice", "order-9")).await;
    assert_eq!(refused.status, 409, "{}", refused.text());
    let id = refused.json()["operation_id"].as_str().expect("an id").to_owned();
    let said = admin(directory.path(), &["find", &id]).unwrap();
    assert!(
        said.contains("POST /payments") && said.contains("running, under a lease of"),
        "{said}"
    );
    assert_eq!(id_in(&said), id);
    let by_name = [&["find"][..], &name("alice", "order-9")].concat();
    assert_eq!(id_in(&admin(directory.path(), &by_name).unwrap()), id);
    let another_tenants = [&["find"][..], &name("bob", "order-9")].concat();
    let said = admin(directory.path(), &another_tenants).unwrap_err();
    assert!(said.contains("there is no such record"), "{said}");
    let running = admin(directory.path(), &["list", "running"]).unwrap();
    assert!(running.lines().count() == 1 && running.starts_with(&id), "{running}");

    // Nobody may settle or purge what may still be at work.
    let done = admin(directory.path(), &["settle", "done", &id, "--status", "201"]).unwrap_err();
    assert!(done.contains("it is running, under a lease of"), "{done}");
    let purged = admin(directory.path(), &["purge", "key", &id]).unwrap_err();
    assert!(purged.contains("nothing was removed"), "{purged}");
}

/// Stages 1 and 2 of a withdrawal: the request, and the nonce that is its key.
async fn withdrawal(server: &Server) -> (Value, String) {
    let order = json!({ "to": Address::repeat_byte(0xaa), "amount": 2_500 });
    let begun = server.post("/v2/portfolios/acme-1/withdraw/signature", &order);
    let begun = send(begun.header("X-API-Key", "acme-1")).await.json();
    let message: Withdrawal = serde_json::from_value(begun["message"].clone()).expect("a message");
    let owner = Wallet::demo().next().expect("a wallet");
    let signature = owner.sign(&message).expect("a signature");
    let body = json!({ "message": message, "signature": signature });
    (body, message.nonce.to_string())
}

fn withdraw(server: &Server, body: &Value) -> RequestBuilder {
    server.post("/v2/portfolios/acme-1/withdraw", body).header("X-API-Key", "acme-1")
}

#[tokio::test]
async fn what_a_crash_left_open_is_settled_and_replayed() {
    let directory = TempDir::new().unwrap();
    let store = sqlite(directory.path());
    let server = Server::start(PORTFOLIO, &["--store", &store]);
    let (body, nonce) = withdrawal(&server).await;
    server.behave(slow()).await;
    let cut_off = server.begin(withdraw(&server, &body)).await;
    server.crash();
    assert!(cut_off.await.is_err(), "there was an answer");

    // The owner's lease, of five seconds, ends by itself.
    let digits = nonce.trim_start_matches("0x").to_uppercase();
    let name = ["--scope", "acme-1", "--space", "withdrawals", "--format", "hex:32"];
    let find = [&["find"][..], &name, &["--key", &digits]].concat();
    let mut said = admin(directory.path(), &find).unwrap();
    for _ in 0..100 {
        if !said.contains("running") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        said = admin(directory.path(), &find).unwrap();
    }
    assert!(said.contains("unknown outcome"), "{said}");
    assert!(said.contains("POST /v2/portfolios/{id}/withdraw"), "{said}");
    let id = id_in(&said).to_owned();
    for scope in [&[][..], &["--scope", "acme-1"]] {
        let list = [&["list", "unsettled"][..], scope].concat();
        let unsettled = admin(directory.path(), &list).unwrap();
        assert!(unsettled.lines().count() == 1 && unsettled.starts_with(&id), "{unsettled}");
    }
    let elsewhere = admin(directory.path(), &["list", "unsettled", "--scope", "globex-1"]).unwrap();
    assert_eq!(elsewhere, "none\n");

    // The books of the chain say that it was made.
    let answer = "{\"status\":\"submitted\"}";
    let done = ["settle", "done", &id, "--status", "202", "--body", answer];
    let done = [&done[..], &["--header", "content-type: application/json"]].concat();
    let said = admin(directory.path(), &done).unwrap();
    assert!(said.starts_with("settled as done"), "{said}");
    let again = admin(directory.path(), &done).unwrap_err();
    assert!(again.contains("it has been completed"), "{again}");
    let said = admin(directory.path(), &find).unwrap();
    assert!(said.contains("completed: 202 (headers: 1, body: 22 bytes)"), "{said}");
    assert!(!said.contains("submitted"), "an answer is shown to who asks for it: {said}");
    let said = admin(directory.path(), &[&find[..], &["--answer"]].concat()).unwrap();
    assert!(said.contains("content-type: application/json") && said.contains(answer), "{said}");

    let server = Server::start(PORTFOLIO, &["--store", &store]);
    for _ in 0..2 {
        let retry = send(withdraw(&server, &body)).await;
        assert!(retry.is_replay() && retry.status == 202, "{} {}", retry.status, retry.text());
        assert_eq!(retry.text(), answer);
        assert_eq!(retry.headers["content-type"], "application/json");
    }
    assert_eq!(server.effects("transfers").await, 0, "nothing ran again");
}

/// Said by mistake, this is a double charge: nothing downstream knows the next request for a
/// repetition.
#[tokio::test]
async fn what_is_said_not_to_be_done_runs_as_another_operation() {
    let directory = TempDir::new().unwrap();
    let server = after_the_story(directory.path());
    let charges = server.effects("charges").await;
    server.behave(answer_lost()).await;
    assert_eq!(send(payment(&server, "alice", "order-9")).await.status, 502);
    let find = [&["find"][..], &name("alice", "order-9")].concat();
    let said = admin(directory.path(), &find).unwrap();
    let id = id_in(&said).to_owned();
    let said = admin(directory.path(), &["settle", "not-done", &id]).unwrap();
    assert!(said.starts_with("settled as not done"), "{said}");
    for gone in [&["find", &id][..], &["settle", "not-done", &id], &["purge", "key", &id]] {
        let said = admin(directory.path(), gone).unwrap_err();
        assert!(said.contains("there is no such"), "{said}");
    }
    send(payment(&server, "alice", "order-9")).await.is_created();
    assert_eq!(server.effects("charges").await, charges + 2);
    assert_ne!(id_in(&admin(directory.path(), &find).unwrap()), id);
}

#[tokio::test]
async fn purging_ends_at_its_key_and_its_tenant() {
    let directory = TempDir::new().unwrap();
    let server = after_the_story(directory.path());
    for (tenant, key) in [("carol", "a"), ("carol", "b"), ("carol", "c"), ("dave", "a")] {
        send(payment(&server, tenant, key)).await.is_created();
    }
    let all = admin(directory.path(), &["list", "all", "--scope", "carol"]).unwrap();
    assert_eq!(all.lines().count(), 3, "{all}");
    assert!(all.lines().all(|line| line.contains("completed") && line.contains("attempt 1")));
    let some = admin(directory.path(), &["list", "all", "--scope", "carol", "--limit", "2"]);
    assert!(some.unwrap().ends_with("and more: see `--limit`\n"));
    assert_eq!(admin(directory.path(), &["list", "tombstones"]).unwrap(), "none\n");

    let purge = [&["purge", "key"][..], &name("carol", "a")].concat();
    admin(directory.path(), &purge).unwrap();
    send(payment(&server, "carol", "a")).await.is_created();
    assert!(send(payment(&server, "carol", "b")).await.is_replay());
    let said = admin(directory.path(), &["purge", "scope", "carol"]).unwrap();
    assert_eq!(said, "removed 3 records, left 0 that are running\n");
    send(payment(&server, "carol", "b")).await.is_created();
    assert!(send(payment(&server, "dave", "a")).await.is_replay());
}

#[tokio::test]
async fn keys_of_an_engine_with_a_secret_are_found_with_it() {
    const FLOW: Anchor = Anchor::body_field("flow").format(Format::Uuid).space("flows");
    let directory = TempDir::new().unwrap();
    let store = SqliteStore::open(directory.path().join("records.db")).await.unwrap();
    let engine = Idempotency::builder(store).scope(Scope::header("X-API-Key")).secret("s").build();
    let flow = "7B1A9C6E-58A4-4D2C-9D9B-0C6F5D1F0E2A";
    engine.issue(&FLOW, "alice", flow, ()).await.unwrap();
    let find = ["find", "--scope", "alice", "--space", "flows", "--format", "uuid", "--key", flow];
    assert!(admin(directory.path(), &find).is_err());
    assert!(admin(directory.path(), &[&["--secret", "another"][..], &find].concat()).is_err());
    let said = admin(directory.path(), &[&["--secret", "s"][..], &find].concat()).unwrap();
    assert!(said.contains("its key was issued, and nothing has used it yet"), "{said}");
    let never_used = admin(directory.path(), &["settle", "not-done", id_in(&said)]).unwrap_err();
    assert!(never_used.contains("issued and never used"), "{never_used}");
}

#[test]
fn mistakes_are_explained() {
    let directory = TempDir::new().unwrap();
    let says = |words: &[&str]| admin(directory.path(), words).unwrap_err();
    let list = &["list", "all"];
    assert!(says(list).contains("there is no such database"));
    assert!(!directory.path().join("records.db").exists(), "none was made");
    let memory = Command::new(ADMIN).args(["--store", "memory", "list", "all"]).output().unwrap();
    assert!(String::from_utf8_lossy(&memory.stderr).contains("by their own process only"));

    std::fs::write(directory.path().join("records.db"), "").unwrap();
    let id = "7b1a9c6e-58a4-4d2c-9d9b-0c6f5d1f0e2a";
    let done = ["settle", "done", id, "--status"];
    for (words, why) in [
        (&["find"][..], "<OPERATION_ID>"),
        (&["find", "order-1"], "an operation id is a UUID"),
        (&["find", id, "--key", "k"], "cannot be used with"),
        (&["find", "--key", "k"], "neither a space nor an operation"),
        (&["find", "--key", "k", "--route", "/payments"], "--method"),
        (
            &["find", "--key", "k", "--method", "POST", "--route", "/a/{id}"],
            "the route /a/{id} has 1 parameters, and 0 values were given",
        ),
        (&["find", "--key", "k", "--space", "s", "--format", "uuid"], "it is not a UUID"),
        (&["find", "--key", "k", "--space", "s", "--format", "hex:0"], "no bytes"),
        (&["find", "--key", "k", "--space", "s", "--format", "number"], "expected `uuid`"),
        (&["find", id], "there is no such record"),
        (&["--secret", "", "list", "all"], "an empty secret"),
        (&["list", "everything"], "possible values"),
        (&["purge", "scope"], "<SCOPE>"),
        (&[&done[..], &["99"]].concat(), "invalid value"),
        (&[&done[..], &["101"]].concat(), "an interim status is none"),
        (&[&done[..], &["201", "--ttl", "0s"]].concat(), "protects nothing"),
        (&[&done[..], &["201", "--ttl", "soon"]].concat(), "--ttl"),
        (&[&done[..], &["201", "--header", "x"]].concat(), "expected `name: value`"),
        (&[&done[..], &["201"]].concat(), "there is no such operation"),
    ] {
        let said = says(words);
        assert!(said.contains(why), "{words:?} was answered by: {said}");
    }
}
