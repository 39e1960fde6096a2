//! Servers on loopback, and the requests that tests send to them.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::Router;
use idem_runtime::{Builder, Event, Idempotency, Outcome, Scope, Scoped, store::Store};
use reqwest::{RequestBuilder, Response};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

/// A router behind a real HTTP server, HTTP/1.1 and HTTP/2, on a free loopback port. It stops when
/// it is dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Server {
    /// Starts serving.
    pub async fn start(app: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, app)
                .with_graceful_shutdown(async {
                    let _ = stopped.await;
                })
                .await;
        });
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { address, client, stop: Some(stop), task }
    }

    /// A POST by tenant `a` with this key and JSON body.
    pub fn post(&self, path: &str, key: &str, body: &str) -> RequestBuilder {
        self.post_without_key(path, body).header("idempotency-key", key)
    }

    /// A POST by tenant `a` with this JSON body and no key.
    pub fn post_without_key(&self, path: &str, body: &str) -> RequestBuilder {
        self.client
            .post(format!("http://{}{path}", self.address))
            .header("x-api-key", "a")
            .header("content-type", "application/json")
            .body(body.to_owned())
    }

    /// Stops taking connections and waits for those that there are.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        let _ = (&mut self.task).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.stop.take().is_some() {
            self.task.abort();
        }
    }
}

/// Sends a request; its server is here, so that it must answer.
pub async fn send(request: RequestBuilder) -> Answer {
    Answer::read(request.send().await.expect("an answer")).await
}

/// A whole response.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// All headers, in order.
    pub headers: reqwest::header::HeaderMap,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Answer {
    async fn read(response: Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, body: response.bytes().await.expect("a whole body").to_vec() }
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    /// The code of a problem document.
    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    /// Whether idem replayed it.
    pub fn is_replay(&self) -> bool {
        self.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
    }
}

/// An engine as most tests want it: the scope is the API key.
pub fn engine(store: impl Store) -> Builder<Scoped> {
    Idempotency::builder(store).scope(Scope::header("X-API-Key"))
}

/// Counts effects.
#[derive(Clone, Debug, Default)]
pub struct Effects(Arc<AtomicUsize>);

impl Effects {
    /// It happened once more; says how often it has.
    pub fn happen(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// How often it happened.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// An observer that remembers the outcomes.
#[derive(Clone, Default)]
pub struct Remember(Arc<Mutex<Vec<(Outcome, bool)>>>);

impl Remember {
    /// The observer to give to an engine.
    pub fn observer(&self) -> impl Fn(&Event<'_>) + Send + Sync + 'static {
        let outcomes = Arc::clone(&self.0);
        move |event| outcomes.lock().expect("a lock").push((event.outcome, event.enforced))
    }

    /// What was observed, in order.
    pub fn outcomes(&self) -> Vec<Outcome> {
        self.0.lock().expect("a lock").iter().map(|(outcome, _)| *outcome).collect()
    }

    /// What was observed and not enforced.
    pub fn unenforced(&self) -> Vec<Outcome> {
        let outcomes = self.0.lock().expect("a lock");
        outcomes.iter().filter(|(_, enforced)| !enforced).map(|(outcome, _)| *outcome).collect()
    }
}

impl fmt::Debug for Remember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.outcomes()).finish()
    }
}
