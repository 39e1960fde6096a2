//! Servers on loopback, and the requests that tests send to them.

use std::{
    fmt,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::Router;
use idem_runtime::{Builder, Event, Idempotency, Outcome, Scope, Scoped, store::Store};
use reqwest::{RequestBuilder, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore, oneshot},
    task::JoinHandle,
};

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

    /// Sends bytes as they are on a connection of their own and reads until the server closes it,
    /// so they had better ask for that; `None` if nothing came back.
    pub async fn send_raw(&self, bytes: &[u8]) -> Option<RawAnswer> {
        self.exchange(bytes, false).await
    }

    /// Sends bytes as they are and then the end of the stream, as a client that breaks off.
    pub async fn send_cut(&self, bytes: &[u8]) -> Option<RawAnswer> {
        self.exchange(bytes, true).await
    }

    async fn exchange(&self, bytes: &[u8], cut: bool) -> Option<RawAnswer> {
        let mut connection = TcpStream::connect(self.address).await.expect("a connection");
        // A server may answer and close before it was told everything.
        let _ = connection.write_all(bytes).await;
        if cut {
            let _ = connection.shutdown().await;
        }
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer).await;
        RawAnswer::parse(&answer)
    }

    /// A request by the client that all of them share.
    pub fn request(&self, method: reqwest::Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("http://{}{path}", self.address))
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

/// A response as it was on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawAnswer {
    /// The status code.
    pub status: u16,
    /// The header lines, in order.
    pub lines: Vec<String>,
    /// Everything after the head.
    pub body: Vec<u8>,
}

impl RawAnswer {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let mut lines = head.split("\r\n").map(str::to_owned);
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        Some(Self { status, lines: lines.collect(), body: bytes[end + 4..].to_vec() })
    }

    /// The header lines but the named ones, in order.
    pub fn lines_but(&self, names: &[&str]) -> Vec<&str> {
        let named = |line: &&str| names.iter().any(|name| line.starts_with(&format!("{name}:")));
        self.lines.iter().map(String::as_str).filter(|line| !named(line)).collect()
    }
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

    /// A header that stands there once.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.headers.get_all(name).iter();
        let line = lines.next()?.to_str().ok();
        assert!(lines.next().is_none(), "{name} stands there twice");
        line
    }

    /// Asserts that it is a refusal of this status and code.
    #[track_caller]
    pub fn assert_refused(&self, status: u16, code: &str) {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        assert_eq!((self.status, self.code().as_str()), (status, code), "{}", self.text());
        assert!(!self.is_replay());
    }

    /// Asserts that it is this answer, and whether it is a replay of it.
    #[track_caller]
    pub fn assert_is(&self, status: u16, body: &str, replay: bool) {
        assert_eq!((self.status, self.text().as_str(), self.is_replay()), (status, body, replay));
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

/// Holds handlers that have begun until they may end, the first one first.
#[derive(Clone, Debug)]
pub struct Gate {
    begun: Arc<Semaphore>,
    may_end: Arc<Semaphore>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { begun: Arc::new(Semaphore::new(0)), may_end: Arc::new(Semaphore::new(0)) }
    }
}

impl Gate {
    /// Waits until one more handler has begun.
    pub async fn begun(&self) {
        self.begun.acquire().await.expect("an open gate").forget();
    }

    /// Lets the handler that has waited longest end.
    pub fn end(&self) {
        self.may_end.add_permits(1);
    }

    /// What a handler does between its effect and its answer.
    pub async fn pass(&self) {
        self.begun.add_permits(1);
        // Permits are handed out in the order in which they were asked for.
        self.may_end.acquire().await.expect("an open gate").forget();
    }

    /// A handler with an effect that passes this gate.
    pub fn handler(
        &self,
        effects: &Effects,
    ) -> impl Fn() -> Pin<Box<dyn Future<Output = String> + Send>> + Clone + Send + Sync + use<>
    {
        let (gate, effects) = (self.clone(), effects.clone());
        move || {
            let (gate, effects) = (gate.clone(), effects.clone());
            Box::pin(async move {
                let number = effects.happen();
                gate.pass().await;
                format!("effect {number}")
            })
        }
    }
}

/// An observer that remembers the outcomes.
#[derive(Clone, Default)]
pub struct Remember {
    outcomes: Arc<Mutex<Vec<(Outcome, bool)>>>,
    more: Arc<Notify>,
}

impl Remember {
    /// The observer to give to an engine.
    pub fn observer(&self) -> impl Fn(&Event<'_>) + Send + Sync + 'static {
        let Self { outcomes, more } = self.clone();
        move |event| {
            outcomes.lock().expect("a lock").push((event.outcome, event.enforced));
            more.notify_waiters();
        }
    }

    /// What was observed, in order.
    pub fn outcomes(&self) -> Vec<Outcome> {
        self.outcomes.lock().expect("a lock").iter().map(|(outcome, _)| *outcome).collect()
    }

    /// Waits until something was observed.
    pub async fn hear(&self, outcome: Outcome) {
        loop {
            let more = self.more.notified();
            if self.outcomes().contains(&outcome) {
                return;
            }
            more.await;
        }
    }

    /// What was observed and not enforced.
    pub fn unenforced(&self) -> Vec<Outcome> {
        let outcomes = self.outcomes.lock().expect("a lock");
        outcomes.iter().filter(|(_, enforced)| !enforced).map(|(outcome, _)| *outcome).collect()
    }
}

impl fmt::Debug for Remember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.outcomes()).finish()
    }
}
