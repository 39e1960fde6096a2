//! A network that fails: a proxy that drops, delays, cuts, refuses and duplicates what goes through
//! it.
//!
//! Each operation of a test has a lane of its own, a port with its own sequence of faults, so that
//! a seed says what befalls whom, however the operations interleave. A lane injects only so many
//! faults, and is an honest proxy from then on; it ends when its network is dropped.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{CONNECTION, RETRY_AFTER, TRANSFER_ENCODING},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
    time::sleep,
};

/// So many faults befall one lane.
const MOST: u32 = 8;

/// The error that ends a connection.
type Lost = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, Lost>;

/// What can befall a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// The connection ends before the request is forwarded.
    Dropped,
    /// The proxy answers 503 itself.
    Unavailable,
    /// The request is forwarded late, perhaps later than the client waits.
    Delayed,
    /// Both connections end while the server is at work.
    HungUp,
    /// The server has answered; the client's connection ends without a word of it.
    AnswerLost,
    /// The client's connection ends in the middle of the answer.
    AnswerCut,
    /// The request is sent twice, and the client gets one of the answers.
    Doubled,
    /// The request is sent again after its answer, which the client has by then.
    Echoed,
}

use Fault::{AnswerCut, AnswerLost, Delayed, Doubled, Dropped, Echoed, HungUp, Unavailable};

const FAULTS: [Fault; 8] =
    [Dropped, Unavailable, Delayed, HungUp, AnswerLost, AnswerCut, Doubled, Echoed];

/// The lanes of one run, and what befell them.
pub(crate) struct Network {
    seed: u64,
    upstream: String,
    http: reqwest::Client,
    tally: Mutex<BTreeMap<Fault, u32>>,
    requests: AtomicU64,
    /// Requests that nobody waits for.
    echoes: Mutex<JoinSet<()>>,
}

/// A way to the server for one operation.
pub(crate) struct Lane {
    pub(crate) url: String,
    accepting: JoinHandle<()>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// What a lane will do next.
struct Fate {
    rng: SmallRng,
    left: u32,
}

impl Network {
    /// A network before a server.
    pub(crate) fn new(upstream: &str, seed: u64) -> Arc<Self> {
        let limit = Duration::from_secs(10);
        let http = reqwest::Client::builder().no_proxy().timeout(limit).build().expect("a client");
        Arc::new(Self {
            seed,
            upstream: upstream.to_owned(),
            http,
            tally: Mutex::default(),
            requests: AtomicU64::new(0),
            echoes: Mutex::default(),
        })
    }

    /// The lane of an operation.
    pub(crate) async fn lane(self: &Arc<Self>, operation: u64) -> Lane {
        self.open(operation, MOST).await
    }

    /// A lane on which nothing happens but that it counts.
    pub(crate) async fn honest(self: &Arc<Self>) -> Lane {
        self.open(0, 0).await
    }

    async fn open(self: &Arc<Self>, operation: u64, left: u32) -> Lane {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let rng = SmallRng::seed_from_u64(self.seed.wrapping_mul(1_000_003) ^ operation);
        let (network, fate) = (self.clone(), Arc::new(Mutex::new(Fate { rng, left })));
        let accepting = tokio::spawn(async move {
            // Its connections end with it.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(network.clone().serve(stream, fate.clone()));
            }
        });
        Lane { url, accepting }
    }

    /// How many requests clients sent.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// What befell them.
    pub(crate) fn tally(&self) -> BTreeMap<Fault, u32> {
        self.tally.lock().expect("no panic").clone()
    }

    /// Returns once nothing is under way any more that nobody waits for.
    pub(crate) async fn calm(&self) {
        let echoes = std::mem::take(&mut *self.echoes.lock().expect("no panic"));
        echoes.join_all().await;
    }

    async fn serve(self: Arc<Self>, stream: TcpStream, fate: Arc<Mutex<Fate>>) {
        let service = service_fn(|request| self.clone().pass(request, fate.clone()));
        // An error is how a fault ends a connection.
        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }

    async fn pass(
        self: Arc<Self>,
        request: Request<Incoming>,
        fate: Arc<Mutex<Fate>>,
    ) -> Result<Response<Body>, Lost> {
        let (parts, body) = request.into_parts();
        let request = Request::from_parts(parts, body.collect().await?.to_bytes());
        self.requests.fetch_add(1, Ordering::Relaxed);
        let (fault, mut rng) = fate.lock().expect("no panic").next();
        if let Some(fault) = fault {
            *self.tally.lock().expect("no panic").entry(fault).or_default() += 1;
        }
        let mut up_to = |ms| Duration::from_millis(rng.random_range(0..=ms));
        match fault {
            None => {}
            Some(Dropped) => return Err("dropped".into()),
            Some(Unavailable) => return Ok(unavailable(up_to(1) > Duration::ZERO)),
            Some(Delayed) => sleep(up_to(800)).await,
            Some(HungUp) => {
                let _ = tokio::time::timeout(up_to(30), self.forward(&request)).await;
                return Err("hung up".into());
            }
            Some(AnswerLost) => {
                self.forward(&request).await?;
                return Err("answer lost".into());
            }
            Some(AnswerCut) => return self.forward(&request).await.map(cut),
            Some(Doubled) => {
                let second = async {
                    sleep(up_to(20)).await;
                    self.forward(&request).await
                };
                let (one, two) = tokio::join!(self.forward(&request), second);
                return if rng.random() { one } else { two }.map(whole);
            }
            Some(Echoed) => {
                let (network, wait) = (self.clone(), up_to(300));
                let request = request.clone();
                self.echoes.lock().expect("no panic").spawn(async move {
                    sleep(wait).await;
                    let _ = network.forward(&request).await;
                });
            }
        }
        self.forward(&request).await.map(whole)
    }

    async fn forward(&self, request: &Request<Bytes>) -> Result<Response<Bytes>, Lost> {
        let mut headers = request.headers().clone();
        headers.remove(CONNECTION);
        let sent = self.http.request(request.method().clone(), self.url(request)).headers(headers);
        let received = sent.body(request.body().clone()).send().await?;
        let (status, mut headers) = (received.status(), received.headers().clone());
        headers.remove(CONNECTION);
        headers.remove(TRANSFER_ENCODING);
        let mut response = Response::new(received.bytes().await?);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }

    fn url(&self, request: &Request<Bytes>) -> String {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        format!("{}{path}", self.upstream)
    }
}

impl Fate {
    /// The fault of the next request, if it has one, and the chances within it.
    fn next(&mut self) -> (Option<Fault>, SmallRng) {
        let rng = SmallRng::seed_from_u64(self.rng.random());
        let strikes = self.rng.random_ratio(4, 5);
        let fault = FAULTS[self.rng.random_range(0..FAULTS.len())];
        let fault = (self.left > 0 && strikes).then_some(fault);
        self.left -= u32::from(fault.is_some());
        (fault, rng)
    }
}

fn whole(response: Response<Bytes>) -> Response<Body> {
    response.map(|body| Full::new(body).map_err(|never: Infallible| match never {}).boxed_unsync())
}

/// Half of an answer, and then nothing.
fn cut(response: Response<Bytes>) -> Response<Body> {
    response.map(|body| {
        let half = body.slice(..body.len() / 2);
        let frames = [Ok(Frame::data(half)), Err::<_, Lost>("cut".into())];
        // The half is sent before the end is known.
        let frames = stream::iter(frames).enumerate().then(async |(i, frame)| {
            sleep(Duration::from_millis(5 * i as u64)).await;
            frame
        });
        StreamBody::new(frames.boxed()).boxed_unsync()
    })
}

fn unavailable(says_when: bool) -> Response<Body> {
    let mut response = Response::new(Bytes::from_static(b"out of service"));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    if says_when {
        response.headers_mut().insert(RETRY_AFTER, 1.into());
    }
    whole(response)
}
