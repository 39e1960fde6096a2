//! Receipt ingest is idempotent on network and hash.

use super::{common::all, *};

fn publish(server: &Server, api_key: &str, body: &Value) -> RequestBuilder {
    post(server, RECEIPTS, api_key, body)
}

#[track_caller]
fn is_duplicate(answer: &Answer) {
    assert_eq!((answer.status, answer.is_replay()), (200, true), "{}", answer.text());
    assert_eq!(answer.json(), json!({ "duplicate": true, "event_id": null }));
}

#[track_caller]
fn is_new(answer: &Answer) {
    answer.is_created();
    assert_eq!(answer.json()["duplicate"], false);
    event_of(answer);
}

#[tokio::test]
async fn the_second_hit_is_a_duplicate_and_writes_no_event() {
    for server in over_each_store(LEASH) {
        is_new(&send(publish(&server, BUYER, &receipt(HASH))).await);
        let before = feed(&server, BUYER, "").await;
        for api_key in [BUYER, SELLER, BUYER_TOO, SELLER] {
            is_duplicate(&send(publish(&server, api_key, &receipt(HASH))).await);
        }
        assert_eq!(feed(&server, BUYER, "").await, before);
        assert_eq!(server.effects("receipts").await, 1);
    }
}

#[tokio::test]
async fn the_second_learns_nothing_of_the_first() {
    for server in over_each_store(LEASH) {
        let first = send(publish(&server, BUYER, &receipt(HASH))).await;
        let id = event_of(&first);
        let second = send(publish(&server, SELLER, &receipt(HASH))).await;
        is_duplicate(&second);
        // That it is known, and no word more: not even which operation it was.
        let mut headers: Vec<_> = second.headers.keys().map(|name| name.as_str()).collect();
        headers.sort_unstable();
        assert_eq!(headers, ["content-length", "content-type", "date", "idempotent-replayed"]);
        get(&server, &format!("/v1/events/{id}"), SELLER).await.is_error(404, "not_found");
        assert_eq!(feed(&server, SELLER, "").await, [Value::Null; 0]);
        let pulled = get(&server, RECEIPTS, SELLER).await.json();
        assert_eq!(pulled, json!({ "data": [] }));
    }
}

#[tokio::test]
async fn it_is_one_receipt_however_and_wherever_it_is_posted() {
    for server in over_each_store(LEASH) {
        is_new(&send(publish(&server, BUYER, &receipt(HASH))).await);
        for hash in [HASH.to_uppercase(), format!("0x{HASH}")] {
            is_duplicate(&send(publish(&server, SELLER, &receipt(&hash))).await);
        }
        let elsewhere = post(&server, "/v1/receipts/rover", SELLER, &receipt(HASH));
        is_duplicate(&send(elsewhere).await);
        let mut more = receipt(HASH);
        more["memo"] = "paid".into();
        is_duplicate(&send(publish(&server, SELLER, &more)).await);
    }
}

#[tokio::test]
async fn another_hash_or_network_is_another_receipt() {
    for server in over_each_store(LEASH) {
        is_new(&send(publish(&server, BUYER, &receipt(HASH))).await);
        let mut on_base = receipt(HASH);
        on_base["network"] = "base".into();
        is_new(&send(publish(&server, SELLER, &on_base)).await);
        is_new(&send(publish(&server, SELLER, &receipt(&HASH.replace('2', "3")))).await);
        for wrong in [receipt("7"), receipt(&format!("{HASH}00")), json!({ "network": "solana" })] {
            send(publish(&server, BUYER, &wrong)).await.is_error(400, "invalid");
        }
        let nowhere = json!({ "network": "Solana", "receipt_hash": HASH });
        send(publish(&server, BUYER, &nowhere)).await.is_error(400, "invalid");
        assert_eq!(server.effects("receipts").await, 3);
    }
}

#[tokio::test]
async fn under_its_key_the_first_answer_is_replayed() {
    for server in over_each_store(LEASH) {
        let request = publish(&server, BUYER, &receipt(HASH)).header("Idempotency-Key", KEY);
        let first = send(again(&request)).await;
        is_new(&first);
        send(request).await.replays(&first);
        // The seller's key is the seller's.
        let request = publish(&server, SELLER, &receipt(HASH)).header("Idempotency-Key", KEY);
        is_duplicate(&send(again(&request)).await);
        is_duplicate(&send(request).await);
    }
}

#[tokio::test]
async fn buyer_and_seller_at_once_make_one() {
    for server in over_each_store(LEASH) {
        let requests = (0..40).map(|n| publish(&server, [BUYER, SELLER][n % 2], &receipt(HASH)));
        let answers = all(requests).await;
        let count = |status| answers.iter().filter(|answer| answer.status == status).count();
        assert_eq!(count(201), 1);
        assert_eq!(count(200) + count(429), 39);
        answers.iter().filter(|answer| answer.status == 200).for_each(is_duplicate);
        assert_eq!(server.effects("receipts").await, 1);
    }
}

#[tokio::test]
async fn who_pulls_receipts_pulls_them_once() {
    for server in over_each_store(LEASH) {
        let published = send(publish(&server, BUYER, &receipt(HASH))).await;
        assert_eq!(event(&server, &event_of(&published)).await["phase"], "receipt.published");
        let pulled = get(&server, RECEIPTS, BUYER).await.json();
        assert_eq!(pulled["data"][0]["id"], published.json()["event_id"]);
        assert_eq!(pulled["data"][0]["receipt_hash"], format!("0x{HASH}"));
        assert_eq!(get(&server, RECEIPTS, BUYER).await.json(), pulled);
        assert_eq!(event(&server, &event_of(&published)).await["phase"], "receipt.pulled");
        let elsewhere = get(&server, "/v1/receipts/rover", BUYER).await.json();
        assert_eq!(elsewhere, json!({ "data": [] }));
    }
}
