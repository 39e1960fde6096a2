//! What a crash of the server leaves: nothing half done, and nothing done twice.

use std::path::Path;

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

    /// As if the process had died after its books were written, and before idem's record was.
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
async fn between_the_books_and_the_record_of_a_submission() {
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
async fn between_the_books_and_the_record_of_a_receipt_that_somebody_else_posts_again() {
    let disk = Disk::new();
    let server = disk.start(&[]);
    let published = send(post(&server, RECEIPTS, BUYER, &receipt(HASH))).await;
    published.is_created();
    server.crash();
    disk.lose_records();

    let server = disk.start(&[]);
    for _ in 0..2 {
        let second = send(post(&server, RECEIPTS, SELLER, &receipt(HASH))).await;
        assert_eq!(second.json(), json!({ "duplicate": true, "event_id": null }));
    }
    assert_eq!(feed(&server, SELLER, "").await, [Value::Null; 0]);
    assert_eq!(feed(&server, BUYER, "").await.len(), 1);
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
    // Two and a half seconds.
    let server = disk.start(&["--time-scale", "4"]);
    let mut ids = Vec::new();
    for n in 0..5 {
        let id = prepared(&server).await;
        is_accepted(&send(submit(&server, &id, &format!("5igned {n}"))).await);
        ids.push(id);
    }
    server.behave(json!({ "answer_ms": 5_000, "only": "confirmations" })).await;
    // The chain was asked about one of them, and its answer is under way.
    server.until(async || server.effects("confirmations").await == 1).await;
    server.crash();

    let server = disk.start(FAST);
    for id in &ids {
        comes_to(&server, id, "confirmed").await;
    }
    assert_eq!(server.effects("confirmations").await, 5);
    assert_eq!(server.effects("transactions").await, 5);
}
