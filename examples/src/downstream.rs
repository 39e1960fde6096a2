//! A simulated downstream: whatever an example calls to make things happen, be it a payment
//! provider or a chain. It counts what really happened, and fails when it is told to.
//!
//! Like a good provider it knows idempotency keys itself: a call whose key it has seen succeeds and
//! changes nothing. Like any provider it does not notice when its caller hangs up.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use serde::{Deserialize, Serialize};

/// The simulated downstream; a clone is the same one.
#[derive(Clone, Debug, Default)]
pub struct Downstream(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    behaviour: Behaviour,
    calls: u64,
    done: HashSet<(String, String)>,
    /// Who was first where there is room for one.
    places: HashMap<(String, String), String>,
    effects: BTreeMap<String, u64>,
    /// Where it writes down what it did, to remember it in its next life.
    ledger: Option<File>,
}

/// What it did: a line of its ledger.
#[derive(Deserialize, Serialize)]
struct Done {
    effect: String,
    key: String,
    place: Option<String>,
}

/// How the downstream behaves; what `POST /_downstream` takes. What it does not say is as at the
/// start.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Behaviour {
    /// So many of the next calls fail.
    pub fail: u32,
    /// With this status: 4xx says that nothing happened, 5xx says nothing.
    pub status: u16,
    /// So long each call takes.
    pub latency_ms: u64,
    /// So long its answer takes after that.
    pub answer_ms: u64,
    /// The failing calls fail after their effect happened: only their answer is lost.
    pub after_effect: bool,
    /// Only calls for this effect fail, by its name in `/_effects`; any call if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only: Option<String>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { fail: 0, status: 503, latency_ms: 0, answer_ms: 0, after_effect: false, only: None }
    }
}

/// The downstream's refusal, or its failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the downstream answered {0}")]
pub struct Failure(StatusCode);

impl Failure {
    /// Whether it says that nothing happened. Otherwise nobody knows.
    pub fn is_refusal(&self) -> bool {
        self.0.is_client_error()
    }

    /// Whether it says that somebody else was first.
    pub fn is_conflict(&self) -> bool {
        self.0 == StatusCode::CONFLICT
    }
}

impl Downstream {
    /// One that remembers in a file what it did, as a party of its own does while this process
    /// crashes.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or written, or is no ledger.
    pub fn open(ledger: &Path) -> io::Result<Self> {
        let mut inner = Inner::default();
        // A crash in mid-line leaves an effect that nobody was told of: it did not happen.
        let written = match fs::read_to_string(ledger) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        let whole = written.rfind('\n').map_or(0, |end| end + 1);
        for line in written[..whole].lines() {
            inner.remember(serde_json::from_str(line)?);
        }
        let file = File::options().create(true).append(true).open(ledger)?;
        file.set_len(whole as u64)?;
        inner.ledger = Some(file);
        Ok(Self(Arc::new(Mutex::new(inner))))
    }

    /// Makes an effect happen, once for each key.
    ///
    /// # Errors
    ///
    /// When it was told to fail.
    pub async fn call(&self, effect: &'static str, key: impl fmt::Display) -> Result<(), Failure> {
        self.send(effect, key.to_string(), None).await
    }

    /// Makes an effect happen where it can happen only once: a second one, under another key, is a
    /// conflict.
    ///
    /// # Errors
    ///
    /// When it happened there before, or it was told to fail.
    pub async fn call_at(
        &self,
        place: impl fmt::Display,
        effect: &'static str,
        key: impl fmt::Display,
    ) -> Result<(), Failure> {
        self.send(effect, key.to_string(), Some(place.to_string())).await
    }

    /// Counts an effect of the server's own.
    pub fn happened(&self, effect: &'static str) {
        self.inner().happened(effect);
    }

    async fn send(
        &self,
        effect: &'static str,
        key: String,
        place: Option<String>,
    ) -> Result<(), Failure> {
        let downstream = self.clone();
        let call = tokio::spawn(async move {
            let ([work, answer], failure, after_effect) = downstream.inner().begin(effect);
            tokio::time::sleep(work).await;
            let done = downstream.inner().end(effect, key, place, failure, after_effect);
            tokio::time::sleep(answer).await;
            done
        });
        call.await.unwrap_or(Err(Failure(StatusCode::BAD_GATEWAY)))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `/_downstream`, to see and to change how it behaves, and `/_effects`, to see what happened.
    pub fn routes<S: Clone + Send + Sync + 'static>(&self) -> Router<S> {
        Router::new()
            .route("/_downstream", get(show).post(behave))
            .route("/_effects", get(effects))
            .with_state(self.clone())
    }
}

impl Inner {
    /// What becomes of a call that begins now.
    fn begin(&mut self, effect: &str) -> ([Duration; 2], Option<Failure>, bool) {
        self.calls += 1;
        let Behaviour { fail, status, latency_ms, answer_ms, after_effect, ref only } =
            self.behaviour;
        let fails = fail > 0 && only.as_ref().is_none_or(|only| only == effect);
        let failure = fails.then(|| StatusCode::from_u16(status).ok().map(Failure)).flatten();
        if fails {
            self.behaviour.fail = fail - 1;
        }
        ([latency_ms, answer_ms].map(Duration::from_millis), failure, after_effect)
    }

    /// What it answers.
    fn end(
        &mut self,
        effect: &'static str,
        key: String,
        place: Option<String>,
        failure: Option<Failure>,
        after_effect: bool,
    ) -> Result<(), Failure> {
        let done = Done { effect: effect.to_owned(), key, place };
        let first = done.place.as_ref().and_then(|place| {
            // A pair of owned strings is looked up by one.
            self.places.get(&(done.effect.clone(), place.clone()))
        });
        if first.is_some_and(|first| *first != done.key) {
            return Err(Failure(StatusCode::CONFLICT));
        }
        let known = self.done.contains(&(done.effect.clone(), done.key.clone()));
        // It happened: only an answer can be lost now.
        let failure = failure.filter(|failure| !(known && failure.is_refusal()));
        if !known && (failure.is_none() || after_effect) {
            if self.write_down(&done).is_err() {
                return Err(Failure(StatusCode::INSUFFICIENT_STORAGE));
            }
            self.remember(done);
        }
        failure.map_or(Ok(()), Err)
    }

    fn write_down(&mut self, done: &Done) -> io::Result<()> {
        let Some(ledger) = &mut self.ledger else { return Ok(()) };
        let mut line = serde_json::to_vec(done)?;
        line.push(b'\n');
        ledger.write_all(&line)
    }

    fn remember(&mut self, Done { effect, key, place }: Done) {
        self.happened(&effect);
        if let Some(place) = place {
            self.places.insert((effect.clone(), place), key.clone());
        }
        self.done.insert((effect, key));
    }

    fn happened(&mut self, effect: &str) {
        *self.effects.entry(effect.to_owned()).or_default() += 1;
    }
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    behaviour: Behaviour,
    /// How many calls have begun.
    calls: u64,
}

async fn show(State(downstream): State<Downstream>) -> impl IntoResponse {
    let inner = downstream.inner();
    Json(Shown { behaviour: inner.behaviour.clone(), calls: inner.calls })
}

async fn behave(
    State(downstream): State<Downstream>,
    Json(behaviour): Json<Behaviour>,
) -> Response {
    let refusal = (400..500).contains(&behaviour.status);
    let problem = match &behaviour {
        Behaviour { status: ..400 | 600.., .. } => "`status` must be a 4xx or a 5xx",
        Behaviour { after_effect: true, .. } if refusal => {
            "a 4xx says that nothing happened: `after_effect` goes with a 5xx"
        }
        _ => {
            downstream.inner().behaviour = behaviour;
            return show(State(downstream)).await.into_response();
        }
    };
    (StatusCode::UNPROCESSABLE_ENTITY, problem).into_response()
}

async fn effects(State(downstream): State<Downstream>) -> impl IntoResponse {
    Json(downstream.inner().effects.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(fail: u32, status: u16, after_effect: bool) -> Downstream {
        let downstream = Downstream::default();
        downstream.inner().behaviour =
            Behaviour { fail, status, after_effect, ..Behaviour::default() };
        downstream
    }

    fn charges(downstream: &Downstream) -> u64 {
        downstream.inner().effects.get("charge").copied().unwrap_or_default()
    }

    #[tokio::test]
    async fn a_key_that_was_seen_succeeds_and_changes_nothing() {
        let downstream = Downstream::default();
        assert_eq!(downstream.call("charge", "a").await, Ok(()));
        assert_eq!(downstream.call("charge", "a").await, Ok(()));
        assert_eq!(charges(&downstream), 1);
        assert_eq!(downstream.call("charge", "b").await, Ok(()));
        assert_eq!(charges(&downstream), 2);
    }

    #[tokio::test]
    async fn a_place_is_taken_once() {
        let downstream = Downstream::default();
        assert_eq!(downstream.call_at("here", "charge", "a").await, Ok(()));
        assert_eq!(downstream.call_at("here", "charge", "a").await, Ok(()));
        let second = downstream.call_at("here", "charge", "b").await;
        assert!(second.is_err_and(|failure| failure.is_conflict() && failure.is_refusal()));
        assert_eq!(downstream.call_at("there", "charge", "b").await, Ok(()));
        assert_eq!(charges(&downstream), 2);
    }

    #[tokio::test]
    async fn it_fails_as_often_as_it_was_told() {
        let downstream = told(2, 503, false);
        assert!(downstream.call("charge", "a").await.is_err());
        assert!(downstream.call("charge", "a").await.is_err());
        assert_eq!(charges(&downstream), 0);
        assert_eq!(downstream.call("charge", "a").await, Ok(()));
    }

    #[tokio::test]
    async fn what_happened_before_the_answer_was_lost_is_not_refused_later() {
        let downstream = told(1, 504, true);
        assert!(downstream.call("charge", "a").await.is_err());
        assert_eq!(charges(&downstream), 1);
        downstream.inner().behaviour = Behaviour { fail: 1, status: 400, ..Behaviour::default() };
        assert_eq!(downstream.call("charge", "a").await, Ok(()));
        assert_eq!(charges(&downstream), 1);
    }

    #[tokio::test]
    async fn only_the_calls_that_were_named_fail() {
        let downstream = told(1, 503, false);
        downstream.inner().behaviour.only = Some("refund".to_owned());
        assert_eq!(downstream.call("charge", "a").await, Ok(()));
        assert!(downstream.call("refund", "a").await.is_err());
        assert_eq!(downstream.call("refund", "a").await, Ok(()));
    }

    #[tokio::test]
    async fn an_answer_can_take_longer_than_its_effect() {
        let downstream = Downstream::default();
        downstream.inner().behaviour.answer_ms = 60_000;
        let call = downstream.call("charge", "a");
        assert!(tokio::time::timeout(Duration::from_millis(100), call).await.is_err());
        assert_eq!(charges(&downstream), 1);
    }

    #[tokio::test]
    async fn it_remembers_what_its_ledger_says() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("ledger");
        let before = Downstream::open(&ledger).unwrap();
        before.call_at("here", "charge", "a").await.unwrap();
        drop(before);
        let mut file = File::options().append(true).open(&ledger).unwrap();
        file.write_all(b"{\"effect\":\"charge\",\"ke").unwrap();

        let after = Downstream::open(&ledger).unwrap();
        assert_eq!(charges(&after), 1);
        assert_eq!(after.call_at("here", "charge", "a").await, Ok(()));
        assert!(after.call_at("here", "charge", "b").await.is_err());
        after.call_at("there", "charge", "b").await.unwrap();
        assert_eq!(charges(&Downstream::open(&ledger).unwrap()), 2);
    }

    #[tokio::test]
    async fn it_does_not_notice_that_its_caller_hung_up() {
        let downstream = Downstream::default();
        downstream.inner().behaviour.latency_ms = 20;
        let call = downstream.call("charge", "a");
        assert!(tokio::time::timeout(Duration::from_millis(5), call).await.is_err());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(charges(&downstream), 1);
    }
}
