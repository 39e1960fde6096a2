//! The README's code, as it stands there, compiled and run.

#![expect(
    missing_docs,
    missing_debug_implementations,
    reason = "the README's code is an application's, which nobody depends on"
)]

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use tests::server::{Server, send};

include!(concat!(env!("OUT_DIR"), "/readme.rs"));

/// The payment provider that the README speaks of: it charges each key once.
#[derive(Clone, Default)]
pub struct Provider {
    charged: Arc<Mutex<Vec<String>>>,
    down: Arc<AtomicBool>,
}

impl Provider {
    async fn charge(&self, key: &str, to: &str, amount: u64) -> Result<String, StatusCode> {
        let mut charged = self.charged.lock().unwrap_or_else(PoisonError::into_inner);
        if !charged.iter().any(|known| known == key) {
            charged.push(key.to_owned());
        }
        // It charged, and the answer was lost.
        if self.down.swap(false, Ordering::SeqCst) {
            return Err(StatusCode::BAD_GATEWAY);
        }
        Ok(format!("ch_{to}_{amount}"))
    }
}

#[tokio::test]
async fn the_readme_does_what_it_says() {
    let directory = tempfile::tempdir().unwrap();
    std::env::set_current_dir(&directory).unwrap();
    let provider = Provider::default();
    let server = Server::start(app(provider.clone()).await.unwrap()).await;
    let pay = |key, body| send(server.post("/payments", key, body));

    let first = pay("k-1", r#"{"to":"ada","amount":100}"#).await;
    assert_eq!((first.status, first.is_replay()), (201, false), "{}", first.text());
    let retry = pay("k-1", r#"{"to":"ada","amount":100}"#).await;
    assert_eq!((retry.status, retry.is_replay()), (201, true));
    assert_eq!(retry.body, first.body);
    assert_eq!(pay("k-1", r#"{"to":"ada","amount":999}"#).await.code(), "mismatch");
    let no_key = send(server.post_without_key("/payments", r#"{"to":"a","amount":1}"#)).await;
    assert_eq!((no_key.status, no_key.code().as_str()), (400, "key_missing"));

    provider.down.store(true, Ordering::SeqCst);
    assert_eq!(pay("k-2", r#"{"to":"bob","amount":7}"#).await.status, 502);
    assert_eq!(pay("k-2", r#"{"to":"bob","amount":7}"#).await.status, 201);
    assert_eq!(provider.charged.lock().unwrap().len(), 2, "one charge for each key");
    server.stop().await;
}

#[tokio::test]
async fn a_server_stops_when_nothing_is_left() {
    let store = idem_runtime::store::MemoryStore::new();
    let idem = Idempotency::builder(store).scope(Scope::header("X-API-Key")).build();
    let app = routes(App { idem: idem.clone(), provider: Provider::default() });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    serve(listener, app, idem, async {}).await.unwrap();
}

#[tokio::test]
async fn a_handler_is_called_without_an_engine() {
    let store = idem_runtime::store::MemoryStore::new();
    let idem = Idempotency::builder(store).scope(Scope::header("X-API-Key")).build();
    let app = App { idem, provider: Provider::default() };
    let payment = Payment { to: "ada".to_owned(), amount: 3 };
    let returned = create_payment(State(app), Operation::default(), Json(payment).into()).await;
    let (status, Json(receipt)) = returned.into_inner().unwrap().unwrap();
    assert_eq!((status, receipt.id.as_str()), (StatusCode::CREATED, "ch_ada_3"));
}

#[tokio::test]
async fn a_quote_is_bought_once_for_the_amount_that_is_bound_to_it() {
    let provider = Provider::default();
    let store = idem_runtime::store::MemoryStore::new();
    let idem = Idempotency::builder(store)
        .scope(Scope::custom(|_| Ok(["tenant-1"].into_iter().collect())))
        .build();
    let app = App { idem, provider: provider.clone() };
    let router =
        Router::new().route("/quotes", post(quote)).route("/purchases", post(buy)).with_state(app);
    let server = Server::start(router).await;

    let number = send(server.post_without_key("/quotes", "")).await.text();
    let buy = |quote: String| send(server.post_without_key("/purchases", &quote));
    let order = format!(r#"{{"quote":"{number}"}}"#);
    provider.down.store(true, Ordering::SeqCst);
    assert_eq!(buy(order.clone()).await.status, 502, "it charged, and the answer was lost");
    let bought = buy(order.clone()).await;
    assert_eq!((bought.status, bought.text().as_str()), (200, "ch_shop_100"));
    assert!(buy(order).await.is_replay());
    assert_eq!(buy(r#"{"quote":"made up"}"#.to_owned()).await.code(), "unknown_key");
    assert_eq!(provider.charged.lock().unwrap().len(), 1);
    server.stop().await;
}
