//! A simulated downstream: whatever an example calls to make things happen, be it a payment
//! provider or a chain. It counts what really happened, and fails when it is told to.
//!
//! Like a good provider it knows idempotency keys itself: a call whose key it has seen succeeds and
//! changes nothing. Like any provider it does not notice when its caller hangs up.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
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
    done: HashSet<(&'static str, String)>,
    /// Who was first where there is room for one.
    places: HashMap<(&'static str, String), String>,
    effects: BTreeMap<&'static str, u64>,
}

/// How the downstream behaves; what `POST /_downstream` takes. What it does not say is as at the
/// start.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Behaviour {
    /// So many of the next calls fail.
    pub fail: u32,
    /// With this status: 4xx says that nothing happened, 5xx says nothing.
    pub status: u16,
    /// So long each call takes.
    pub latency_ms: u64,
    /// The failing calls fail after their effect happened: only their answer is lost.
    pub after_effect: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { fail: 0, status: 503, latency_ms: 0, after_effect: false }
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
            let (latency, failure, after_effect) = downstream.inner().begin();
            tokio::time::sleep(latency).await;
            downstream.inner().end(effect, key, place, failure, after_effect)
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
    fn begin(&mut self) -> (Duration, Option<Failure>, bool) {
        self.calls += 1;
        let Behaviour { fail, status, latency_ms, after_effect } = self.behaviour;
        let failure = (fail > 0).then(|| StatusCode::from_u16(status).ok().map(Failure)).flatten();
        self.behaviour.fail = fail.saturating_sub(1);
        (Duration::from_millis(latency_ms), failure, after_effect)
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
        let place = place.map(|place| (effect, place));
        let first = place.as_ref().and_then(|place| self.places.get(place));
        if first.is_some_and(|first| *first != key) {
            return Err(Failure(StatusCode::CONFLICT));
        }
        let call = (effect, key);
        let done = self.done.contains(&call);
        // It happened: only an answer can be lost now.
        let failure = failure.filter(|failure| !(done && failure.is_refusal()));
        if !done && (failure.is_none() || after_effect) {
            self.happened(effect);
            if let Some(place) = place {
                self.places.insert(place, call.1.clone());
            }
            self.done.insert(call);
        }
        failure.map_or(Ok(()), Err)
    }

    fn happened(&mut self, effect: &'static str) {
        *self.effects.entry(effect).or_default() += 1;
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
    Json(Shown { behaviour: inner.behaviour, calls: inner.calls })
}

async fn behave(
    State(downstream): State<Downstream>,
    Json(behaviour): Json<Behaviour>,
) -> Response {
    let refusal = (400..500).contains(&behaviour.status);
    let problem = match behaviour {
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
        downstream.inner().behaviour = Behaviour { fail, status, latency_ms: 0, after_effect };
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
    async fn it_does_not_notice_that_its_caller_hung_up() {
        let downstream = Downstream::default();
        downstream.inner().behaviour.latency_ms = 20;
        let call = downstream.call("charge", "a");
        assert!(tokio::time::timeout(Duration::from_millis(5), call).await.is_err());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(charges(&downstream), 1);
    }
}
