//! Webhooks: signed, delivered at least once, and taken once.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post as posted,
};
use hmac::{Hmac, KeyInit, Mac};
use reqwest::Method;
use sha2::Sha256;
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
};

use super::{
    common::{answer_lost, send_at_once, sqlite},
    *,
};

/// A delivery, as it came.
struct Delivered {
    signature: String,
    body: String,
}

impl Delivered {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }

    /// What was delivered: the event and its phase.
    fn what(&self) -> (String, String) {
        let json = self.json();
        assert_eq!(json["phase"], json["event"]["phase"]);
        assert_eq!(json["event_id"], json["event"]["id"]);
        let text = |name: &str| json[name].as_str().expect("text").to_owned();
        (text("event_id"), text("phase"))
    }
}

/// An endpoint that fails so many times, and notes all that it is sent.
struct Endpoint {
    url: String,
    deliveries: UnboundedReceiver<Delivered>,
}

type Noting = (UnboundedSender<Delivered>, Arc<AtomicUsize>);

impl Endpoint {
    async fn new(failures: usize) -> Self {
        Self::on(0, failures).await
    }

    async fn on(port: u16, failures: usize) -> Self {
        let (noted, deliveries) = unbounded_channel();
        let app = Router::new()
            .route("/", posted(note))
            .with_state((noted, Arc::new(AtomicUsize::new(failures))));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.expect("a port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, deliveries }
    }

    async fn next(&mut self) -> Delivered {
        let next = tokio::time::timeout(Duration::from_secs(10), self.deliveries.recv());
        next.await.expect("a delivery").expect("a delivery")
    }

    /// The next three, which are all of one event, in whatever order.
    async fn phases_of(&mut self, event: &str) -> Vec<String> {
        let mut phases = Vec::new();
        for _ in 0..3 {
            let (of, phase) = self.next().await.what();
            assert_eq!(of, event);
            phases.push(phase);
        }
        phases.sort();
        phases
    }

    /// Waits, and is sent nothing.
    async fn is_left_alone(&mut self) {
        let more = tokio::time::timeout(Duration::from_millis(700), self.deliveries.recv()).await;
        assert!(more.is_err(), "one more: {:?}", more.map(|it| it.map(|it| it.body)));
    }
}

async fn note(
    State((noted, failures)): State<Noting>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let signature = headers["x-leash-signature"].to_str().expect("text").to_owned();
    let body = String::from_utf8(body.to_vec()).expect("text");
    noted.send(Delivered { signature, body }).expect("somebody listens");
    let fails = failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    if fails.is_ok() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

/// The document's HMAC, computed here.
fn signature(secret: &str, seconds: u64, body: &str) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    let mac = mac.chain_update(format!("{seconds}.{body}")).finalize();
    format!("t={seconds},v1={}", hex::encode(mac.into_bytes()))
}

/// A port on which nobody listens.
async fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    listener.local_addr().expect("an address").port()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

async fn subscribe(server: &Server, api_key: &str, url: &str) -> String {
    let body = json!({ "url": url, "secret": SECRET });
    let answer = send(post(server, WEBHOOKS, api_key, &body)).await;
    answer.is_created();
    assert!(!answer.text().contains(SECRET));
    answer.json()["webhook_id"].as_str().expect("an id").to_owned()
}

mod sender {
    use super::*;

    #[tokio::test]
    async fn pushes_every_phase_of_an_event_signed() {
        for server in over_each_store_with(LEASH, FAST) {
            let mut endpoint = Endpoint::new(0).await;
            let webhook = subscribe(&server, BUYER, &endpoint.url).await;
            let id = prepared(&server).await;
            let expected = |phase: &str| (id.clone(), phase.to_owned());
            assert_eq!(endpoint.next().await.what(), expected("prepared"));
            send(submit(&server, &id, "5igned")).await;
            assert_eq!(endpoint.next().await.what(), expected("submitted"));
            let confirmed = endpoint.next().await;
            assert_eq!(confirmed.what(), expected("confirmed"));

            assert_eq!(confirmed.json()["webhook_id"], *webhook);
            assert_eq!(confirmed.json()["event"], event(&server, &id).await);
            let sent = confirmed.signature.strip_prefix("t=").unwrap();
            let seconds = sent.split_once(',').unwrap().0.parse().unwrap();
            assert!(now().abs_diff(seconds) < 60);
            assert_eq!(confirmed.signature, signature(SECRET, seconds, &confirmed.body));

            server.behave(json!({ "fail": 1, "status": 404, "only": "confirmations" })).await;
            let id = prepared(&server).await;
            send(submit(&server, &id, "dr0pped")).await;
            assert_eq!(endpoint.phases_of(&id).await, ["failed", "prepared", "submitted"]);
            endpoint.is_left_alone().await;
        }
    }

    #[tokio::test]
    async fn pushes_what_becomes_of_receipts_once() {
        for server in over_each_store_with(LEASH, FAST) {
            let mut endpoint = Endpoint::new(0).await;
            subscribe(&server, BUYER, &endpoint.url).await;
            let published = send(post(&server, RECEIPTS, BUYER, &receipt(HASH))).await;
            let expected = |phase: &str| (event_of(&published), phase.to_owned());
            assert_eq!(endpoint.next().await.what(), expected("receipt.published"));
            for api_key in [BUYER, SELLER] {
                send(post(&server, RECEIPTS, api_key, &receipt(HASH))).await;
            }
            get(&server, RECEIPTS, BUYER).await;
            assert_eq!(endpoint.next().await.what(), expected("receipt.pulled"));
            get(&server, RECEIPTS, BUYER).await;
            endpoint.is_left_alone().await;
        }
    }

    #[tokio::test]
    async fn tells_each_api_key_of_its_own_events() {
        for server in over_each_store_with(LEASH, FAST) {
            let mut buyers = [Endpoint::new(0).await, Endpoint::new(0).await];
            let mut seller = Endpoint::new(0).await;
            for endpoint in &buyers {
                subscribe(&server, BUYER, &endpoint.url).await;
            }
            subscribe(&server, SELLER, &seller.url).await;
            let id = prepared(&server).await;
            for endpoint in &mut buyers {
                assert_eq!(endpoint.next().await.what().0, id);
            }
            seller.is_left_alone().await;
        }
    }

    #[tokio::test]
    async fn repeats_the_same_bytes_until_they_are_taken_ever_further_apart() {
        // A second is a fifth of one.
        for server in over_each_store_with(LEASH, &["--time-scale", "5"]) {
            let mut endpoint = Endpoint::new(3).await;
            subscribe(&server, BUYER, &endpoint.url).await;
            prepared(&server).await;
            let (first, start) = (endpoint.next().await, Instant::now());
            for _ in 0..3 {
                assert_eq!(endpoint.next().await.body, first.body);
            }
            // After 200, 400 and 800 ms.
            assert!(start.elapsed() >= Duration::from_millis(1_100), "{:?}", start.elapsed());
            endpoint.is_left_alone().await;
        }
    }

    #[tokio::test]
    async fn goes_on_where_a_crash_ended_it() {
        let directory = TempDir::new().unwrap();
        let store = sqlite(directory.path());
        let switches = ["--store", &store, "--time-scale", "20"];
        let server = Server::start(LEASH, &switches);
        // Nobody listens there yet.
        let port = free_port().await;
        subscribe(&server, BUYER, &format!("http://127.0.0.1:{port}/")).await;
        let id = prepared(&server).await;
        send(submit(&server, &id, "5igned")).await;
        comes_to(&server, &id, "confirmed").await;
        server.crash();

        let mut endpoint = Endpoint::on(port, 0).await;
        let _server = Server::start(LEASH, &switches);
        assert_eq!(endpoint.phases_of(&id).await, ["confirmed", "prepared", "submitted"]);
    }

    #[tokio::test]
    async fn takes_only_subscriptions_that_it_can_serve() {
        for server in over_each_store(LEASH) {
            for (url, secret) in [
                ("http://127.0.0.1:9/", "short"),
                ("http://192.0.2.1/", SECRET),
                ("http://127.0.0.1@192.0.2.1/", SECRET),
                ("https://127.0.0.1/", SECRET),
                ("no url", SECRET),
            ] {
                let body = json!({ "url": url, "secret": secret });
                let refused = send(post(&server, WEBHOOKS, BUYER, &body)).await;
                refused.is_error(400, "invalid");
            }
        }
    }
}

mod receiver {
    use super::*;

    const RECEIVE: &[&str] = &["--receive", SECRET];

    fn delivery(webhook: &str, event: &str, phase: &str) -> String {
        json!({ "webhook_id": webhook, "event_id": event, "phase": phase }).to_string()
    }

    fn presented(server: &Server, signature: &str, body: &str) -> RequestBuilder {
        let request = server.request(Method::POST, "/hooks").body(body.to_owned());
        let request = request.header("Content-Type", "application/json");
        request.header("X-Leash-Signature", signature)
    }

    fn delivered(server: &Server, body: &str) -> RequestBuilder {
        presented(server, &signature(SECRET, now(), body), body)
    }

    #[tokio::test]
    async fn takes_each_webhook_event_and_phase_once() {
        for server in over_each_store_with(LEASH, RECEIVE) {
            let each = [("w-1", "e-1"), ("w-1", "e-2"), ("w-2", "e-1")]
                .into_iter()
                .flat_map(|(webhook, event)| {
                    ["prepared", "submitted"].map(|phase| delivery(webhook, event, phase))
                })
                .collect::<Vec<_>>();
            for round in 0..3 {
                for body in &each {
                    let taken = send(delivered(&server, body)).await;
                    assert_eq!((taken.status, taken.is_replay()), (204, round > 0));
                }
            }
            let booked = send(server.get("/_effects")).await.json();
            assert_eq!(booked, json!({ "prepared": 3, "submitted": 3 }));
        }
    }

    #[tokio::test]
    async fn of_fifty_at_once_takes_one() {
        for server in over_each_store_with(LEASH, RECEIVE) {
            server.behave(json!({ "latency_ms": 300 })).await;
            let request = delivered(&server, &delivery("w-1", "e-1", "prepared"));
            let answers = send_at_once(&request, 50).await;
            let ran = |answer: &&Answer| answer.status == 204 && !answer.is_replay();
            assert_eq!(answers.iter().filter(ran).count(), 1);
            assert_eq!(server.effects("prepared").await, 1);
        }
    }

    #[tokio::test]
    async fn tells_nothing_to_whoever_did_not_sign_this_body_of_late() {
        for server in over_each_store_with(LEASH, RECEIVE) {
            let (body, other) =
                (delivery("w-1", "e-1", "prepared"), delivery("w-1", "e-1", "failed"));
            for taken in [false, true] {
                if taken {
                    assert_eq!(send(delivered(&server, &body)).await.status, 204);
                }
                for forged in [
                    presented(&server, &signature("whsec_9876543210", now(), &body), &body),
                    presented(&server, &signature(SECRET, now() - 310, &body), &body),
                    presented(&server, &signature(SECRET, now() + 310, &body), &body),
                    presented(&server, &signature(SECRET, now(), &other), &body),
                    presented(&server, "t=,v1=", &body),
                    presented(&server, "", &body),
                    server.request(Method::POST, "/hooks").body(body.clone()),
                ] {
                    let refused = send(forged).await;
                    assert_eq!((refused.status, refused.is_replay()), (401, false));
                    assert!(refused.body.is_empty());
                }
            }
            assert_eq!(send(server.get("/_effects")).await.json(), json!({ "prepared": 1 }));
        }
    }

    #[tokio::test]
    async fn books_once_when_its_own_downstream_fails() {
        for server in over_each_store_with(LEASH, RECEIVE) {
            let request = delivered(&server, &delivery("w-1", "e-1", "prepared"));
            server.behave(answer_lost()).await;
            assert_eq!(send(again(&request)).await.status, 503);
            assert_eq!(send(request).await.status, 204);
            assert_eq!(server.effects("prepared").await, 1);
        }
    }
}

/// The sender and the receiver, each killed in the middle of it: whatever happens, each phase is
/// booked once.
#[tokio::test]
async fn each_phase_is_booked_once_whoever_crashes() {
    let (ours, theirs) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (our_store, their_store) = (sqlite(ours.path()), sqlite(theirs.path()));
    let (our_ledger, their_ledger) = (ours.path().join("ledger"), theirs.path().join("ledger"));
    let send_it = || {
        let ledger = our_ledger.to_str().unwrap();
        Server::start(LEASH, &["--store", &our_store, "--ledger", ledger, "--time-scale", "20"])
    };
    let port = free_port().await;
    let take_it = || {
        let ledger = their_ledger.to_str().unwrap();
        let switches = ["--store", &their_store, "--ledger", ledger, "--receive", SECRET];
        Server::start_on(port, LEASH, &switches)
    };

    let (mut sender, mut receiver) = (send_it(), take_it());
    subscribe(&sender, BUYER, &format!("{}/hooks", receiver.url)).await;
    let mut ids = Vec::new();
    for round in 0..4 {
        // The receiver has booked something, and the sender is not told for a while.
        receiver.behave(json!({ "answer_ms": 400 })).await;
        let calls = receiver.calls().await;
        let id = prepared(&sender).await;
        is_accepted(&send(submit(&sender, &id, &format!("5igned {round}"))).await);
        ids.push(id);
        receiver.until(async || receiver.calls().await > calls).await;
        match round % 2 {
            0 => {
                sender.crash();
                sender = send_it();
            }
            _ => {
                receiver.crash();
                receiver = take_it();
            }
        }
    }
    for id in &ids {
        comes_to(&sender, id, "confirmed").await;
    }
    // The leases of what the crash interrupted are over first.
    let expected = json!({ "prepared": 4, "submitted": 4, "confirmed": 4 });
    let booked = async || send(receiver.get("/_effects")).await.json();
    receiver.until(async || booked().await == expected).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(booked().await, expected);
    assert_eq!(sender.effects("transactions").await, 4);
}
