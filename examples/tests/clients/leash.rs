//! Leash's client, and its webhooks, through a network that fails.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicUsize, Ordering},
};

use axum::{Router, routing::post};
use examples::clients::{Leash, LeashError, Post};
use reqwest::StatusCode;
use tokio::net::TcpListener;

use super::*;

const LEASH: &str = env!("CARGO_BIN_EXE_leash");
const SECRET: &str = "whsec_0123456789";

/// A transaction is final after a tenth of a second, and deliveries are repeated as fast.
const SWITCHES: [&str; 2] = ["--time-scale", "100"];

/// So many endpoints are told everything.
const WEBHOOKS: usize = 2;

fn client(http: Client, url: &str, api_key: &str) -> Leash {
    Leash::new(http, url, api_key, PATIENCE).polling(Duration::from_millis(50))
}

fn text(answer: &Answer, name: &str) -> String {
    answer.json::<Value>().expect("JSON")[name].as_str().expect("text").to_owned()
}

/// The submission of what was prepared.
fn sign(prepared: &Answer) -> Post {
    let transaction = format!("{}.5igned", text(prepared, "transaction"));
    Post::submission(&text(prepared, "event_id"), &transaction)
}

#[derive(Clone)]
enum Operation {
    Post(Post),
    /// Prepares a transaction, submits it without a key, and sees it confirmed.
    Pay(Post),
    /// Buyer and seller post one receipt; and the buyer again, without a key.
    Receipt([Post; 2]),
}

async fn run(url: String, operation: Operation) -> Result<Vec<Answer>, LeashError> {
    let [buyer, seller] = ["buyer-1", "seller-1"].map(|key| client(hasty(), &url, key));
    Ok(match operation {
        Operation::Post(post) => vec![buyer.post(&post).await?],
        Operation::Pay(transfer) => {
            let prepared = buyer.post(&transfer).await?;
            let submitted = buyer.post(&sign(&prepared)).await?;
            let ended = buyer.ended(&text(&prepared, "event_id")).await?;
            assert_eq!(ended["phase"], "confirmed");
            // Without a key, an answer says whether it is the first: in that they differ.
            let signature = text(&submitted, "signature");
            assert_eq!(ended["signature"], signature);
            vec![prepared, Answer { status: StatusCode::OK, body: signature.into() }]
        }
        Operation::Receipt([ours, theirs]) => {
            let first = buyer.post(&ours).await?;
            let second = seller.post(&theirs).await?;
            let third = buyer.post(&ours.without_key()).await?;
            vec![first, second, third]
        }
    })
}

#[tokio::test]
async fn survives() {
    for_each_seed(async |seed| {
        let world = World::new(LEASH, &SWITCHES, seed);
        let receiver = World::new(LEASH, &["--receive", SECRET], seed);
        let buyer = client(world.server.client.clone(), &world.server.url, "buyer-1");
        let mut lanes = Vec::new();
        for number in 0..WEBHOOKS {
            let lane = receiver.network.lane(number as u64).await;
            let webhook = Post::webhook(&format!("{}/hooks", lane.url), SECRET);
            buyer.post(&webhook).await.expect("a webhook");
            lanes.push(lane);
        }
        let transfer = || Post::transfer("scout", "solana", "seller", 2_500);
        let mut operations = Vec::new();
        for n in 0..OF_A_KIND {
            operations.push(Operation::Post(transfer()));
            let prepared = buyer.post(&transfer()).await.expect("an event");
            operations.push(Operation::Post(sign(&prepared).with_key()));
            operations.push(Operation::Pay(transfer()));
            let hash = format!("{n:064x}");
            let receipt = || Post::receipt("scout", "base", &hash);
            operations.push(Operation::Receipt([receipt(), receipt()]));
        }
        let effects = json!({
            "events": 3 * OF_A_KIND, "receipts": OF_A_KIND,
            "transactions": 2 * OF_A_KIND, "confirmations": 2 * OF_A_KIND,
        });
        world.survive(operations, run, effects).await;

        let told = WEBHOOKS * OF_A_KIND;
        let expected = json!({
            "prepared": 3 * told, "submitted": 2 * told, "confirmed": 2 * told,
            "receipt.published": told,
        });
        let booked = async || send(receiver.server.get("/_effects")).await.json();
        receiver.server.until(async || booked().await == expected).await;
        receiver.network.calm().await;
        assert_eq!(booked().await, expected, "IDEM_SEED={seed}");
        let (requests, tally) = (receiver.network.requests(), receiver.network.tally());
        println!("IDEM_SEED={seed}: {requests} deliveries, {tally:?}");
        let faults: u32 = tally.values().sum();
        assert!(faults as usize >= 4 * WEBHOOKS, "too easy: {tally:?}");
    })
    .await;
}

#[tokio::test]
async fn gives_up_at_once_on_what_stays_refused() {
    let world = World::new(LEASH, &[], 1);
    let lane = world.network.honest().await;
    let client = client(world.server.client.clone(), &lane.url, "buyer-1");
    let transfer = Post::transfer("scout", "solana", "seller", 2_500);
    let prepared = client.post(&transfer).await.unwrap();
    assert_eq!(client.post(&transfer).await.unwrap(), prepared);
    let other = client.post(&transfer.with_body(json!({ "amount": 9_900 }))).await;
    assert!(matches!(other, Err(LeashError::OtherBody(_))), "{other:?}");
    world.server.behave(failing(1, 422)).await;
    let refused = client.post(&sign(&prepared)).await;
    assert!(matches!(refused, Err(LeashError::Refused(_))), "{refused:?}");
    client.post(&sign(&prepared)).await.unwrap();
    let other = Post::submission(&text(&prepared, "event_id"), "0ther");
    let second = client.post(&other).await;
    assert!(matches!(second, Err(LeashError::AlreadySubmitted(_))), "{second:?}");
    let nobody = client.event("0b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d").await;
    assert!(matches!(nobody, Err(LeashError::Refused(_))), "{nobody:?}");
    // Not one of them was sent twice.
    assert_eq!(world.network.requests(), 7);
}

/// A server that gives one answer, and then a success; and how often it was asked.
async fn once(status: StatusCode) -> (String, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let answer = post(async move || match counter.fetch_add(1, Ordering::SeqCst) {
        0 => status,
        _ => StatusCode::CREATED,
    });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(
        async move { axum::serve(listener, Router::new().route("/v1/prepare", answer)).await },
    );
    (url, asked)
}

#[tokio::test]
async fn tries_again_after_a_429_and_any_5xx_and_after_no_other_4xx() {
    for status in (400..600).filter_map(|status| StatusCode::from_u16(status).ok()) {
        let (url, asked) = once(status).await;
        let client = client(Client::builder().no_proxy().build().unwrap(), &url, "buyer-1");
        let answer = client.post(&Post::transfer("scout", "solana", "seller", 1)).await;
        let again = status.as_u16() == 429 || status.is_server_error();
        assert_eq!(answer.is_ok(), again, "{status}");
        assert_eq!(asked.load(Ordering::SeqCst), 1 + usize::from(again), "{status}");
    }
}
