//! What a crash of the server leaves: nothing half done, and nothing done twice.

use std::path::Path;

use sqlx::{ConnectOptions, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

use super::{common::sqlite, *};

/// What outlives a server.
struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        Self(TempDir::new().expect("a directory"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn start(&self, more: &[&str]) -> Server {
        let (store, ledger) = (sqlite(self.path()), self.path().join("ledger"));
        let ledger = ledger.to_str().expect("a path");
        Server::start(LEASH, &[&["--store", &store, "--ledger", ledger], more].concat())
    }

    /// Takes idem's records back to what they were before their answers were recorded: as if the
    /// process had died after it wrote its books.
    async fn lose_answers(&self) {
        let options = SqliteConnectOptions::new().filename(self.path().join("records.db"));
        let mut records = options.connect().await.expect("the records");
        let update = "UPDATE idem_records SET state = 1, lease_end = 0, payload = x''";
        let lost = sqlx::query(update).execute(&mut records).await.expect("an update");
        assert!(lost.rows_affected() > 0);
    }

    /// Takes them away altogether.
    fn lose_records(&self) {
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(self.path().join(format!("records.db{end}")));
        }
    }
}

#[tokio::test]
async fn between_prepare_and_submit() {
    let disk = Disk::new();
    let server = disk.start(&[]);
    let original = send(keyed(&server, PREPARE, KEY, &transfer(2_500))).await;
    let event_id = event_of(&original);
    server.crash();

    let server = disk.start(&[]);
    // Whoever has the id goes on from there; who has only the key gets the id.
    send(keyed(&server, PREPARE, KEY, &transfer(2_500))).await.replays(&original);
    assert_eq!(event(&server, &event_id).await["phase"], "prepared");
    is_accepted(&send(submit(&server, &event_id, "5igned")).await);
    assert_eq!(feed(&server, BUYER, "").await.len(), 1);
}

/// Before the chain has it, and when it has it and nobody has been told.
#[tokio::test]
async fn in_the_middle_of_a_submission() {
    for key in [None, Some(KEY)] {
        for (behaviour, on_the_chain) in
            [(json!({ "latency_ms": 5_000 }), 0), (json!({ "answer_ms": 5_000 }), 1)]
        {
            let disk = Disk::new();
            let server = disk.start(&[]);
            let event_id = prepared(&server).await;
            let request = |server: &Server| {
                let request = submit(server, &event_id, "5igned");
                match key {
                    Some(key) => request.header("Idempotency-Key", key),
                    None => request,
                }
            };
            server.behave(behaviour).await;
            let running = server.begin(request(&server)).await;
            server.until(async || server.effects("transactions").await == on_the_chain).await;
            server.crash();
            assert!(running.await.is_err(), "there was an answer");

            let server = disk.start(&[]);
            assert_eq!(server.effects("transactions").await, on_the_chain);
            assert_eq!(event(&server, &event_id).await["phase"], "prepared");
            // Another transaction is refused from the start, for the first one may count.
            let other = send(submit(&server, &event_id, "0ther")).await;
            other.is_error(409, "event_already_submitted");
            let request = request(&server);
            send(again(&request)).await.is_error(429, "in_progress");
            let retry = server.patiently(&request).await;
            is_accepted(&retry);
            assert_eq!(server.effects("transactions").await, 1);
            match key {
                Some(_) => send(request).await.replays(&retry),
                None => repeats(&send(request).await, &retry),
            }
            assert_eq!(event(&server, &event_id).await["phase"], "submitted");
        }
    }
}

#[tokio::test]
async fn between_the_books_and_the_record() {
    let disk = Disk::new();
    let server = disk.start(&[]);
    let original = send(keyed(&server, PREPARE, KEY, &transfer(2_500))).await;
    let event_id = event_of(&original);
    let accepted = send(submit(&server, &event_id, "5igned")).await;
    let published = send(post(&server, RECEIPTS, BUYER, &receipt(HASH))).await;
    let before = feed(&server, BUYER, "").await;
    server.crash();
    disk.lose_answers().await;

    let server = disk.start(&[]);
    for (request, answer) in [
        (keyed(&server, PREPARE, KEY, &transfer(2_500)), original),
        (submit(&server, &event_id, "5igned"), accepted),
        (post(&server, RECEIPTS, BUYER, &receipt(HASH)), published),
    ] {
        // It ran once more, and what it did was done.
        let retry = send(request).await;
        assert_eq!((retry.status, retry.is_replay()), (answer.status, false));
        assert_eq!(retry.body, answer.body);
    }
    assert_eq!(feed(&server, BUYER, "").await, before);
    assert_eq!(server.calls().await, 0);
    assert_eq!((server.effects("events").await, server.effects("receipts").await), (0, 0));
}

#[tokio::test]
async fn between_the_books_and_the_record_of_a_receipt_that_the_other_party_posts_next() {
    let disk = Disk::new();
    let server = disk.start(&[]);
    send(post(&server, RECEIPTS, BUYER, &receipt(HASH))).await.is_created();
    server.crash();
    disk.lose_answers().await;

    let server = disk.start(&[]);
    for api_key in [SELLER, BUYER, SELLER] {
        let second = send(post(&server, RECEIPTS, api_key, &receipt(HASH))).await;
        assert_eq!(second.json(), json!({ "duplicate": true, "event_id": null }));
    }
    assert_eq!(feed(&server, SELLER, "").await, [Value::Null; 0]);
    assert_eq!(feed(&server, BUYER, "").await.len(), 1);
}

/// The books alone know enough for that.
#[tokio::test]
async fn without_any_record_an_event_still_has_one_transaction() {
    let disk = Disk::new();
    let server = disk.start(&[]);
    let event_id = prepared(&server).await;
    let accepted = send(submit(&server, &event_id, "5igned")).await;
    server.crash();
    disk.lose_records();

    let server = disk.start(&[]);
    let other = send(submit(&server, &event_id, "0ther")).await;
    other.is_error(409, "event_already_submitted");
    let retry = send(submit(&server, &event_id, "5igned")).await;
    is_accepted(&retry);
    assert_eq!(retry.body, accepted.body);
    assert_eq!(server.calls().await, 0);
}

#[tokio::test]
async fn after_an_answer_nothing_is_forgotten() {
    let disk = Disk::new();
    let server = disk.start(&[]);
    let event_id = prepared(&server).await;
    let accepted = send(submit(&server, &event_id, "5igned")).await;
    send(post(&server, RECEIPTS, BUYER, &receipt(HASH))).await.is_created();
    let before = feed(&server, BUYER, "").await;
    server.crash();

    let server = disk.start(&[]);
    assert_eq!(feed(&server, BUYER, "").await, before);
    repeats(&send(submit(&server, &event_id, "5igned")).await, &accepted);
    let second = send(post(&server, RECEIPTS, SELLER, &receipt(HASH))).await;
    assert_eq!(second.json()["duplicate"], true);
    assert_eq!(server.calls().await, 0);
}

#[tokio::test]
async fn before_the_confirmation() {
    let disk = Disk::new();
    // Five seconds.
    let server = disk.start(&["--time-scale", "2"]);
    let mut ids = Vec::new();
    for n in 0..5 {
        let id = prepared(&server).await;
        is_accepted(&send(submit(&server, &id, &format!("5igned {n}"))).await);
        ids.push(id);
    }
    server.behave(json!({ "answer_ms": 5_000, "only": "confirmations" })).await;
    // The chain was asked, and its answers are under way.
    server.until(async || server.effects("confirmations").await > 0).await;
    for id in &ids {
        assert_eq!(event(&server, id).await["phase"], "submitted");
    }
    server.crash();

    let server = disk.start(FAST);
    for id in &ids {
        comes_to(&server, id, "confirmed").await;
    }
    assert_eq!(server.effects("confirmations").await, 5);
    assert_eq!(server.effects("transactions").await, 5);
}
