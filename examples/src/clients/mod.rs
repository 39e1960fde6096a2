//! Small clients that follow each document's rules for retries.
//!
//! What all of them have in common is here: one attempt, and what comes of it; attempts until the
//! server has decided, ever further apart, and never earlier than `Retry-After` says. Which answers
//! are worth another attempt is each document's own business, and so is its key; the key is part
//! of the operation, made before the first attempt.

mod leash;
mod nora;
mod pirate;
mod portfolio;
mod skadi;

use std::time::Duration;

use axum::{
    body::Bytes,
    http::{StatusCode, header::RETRY_AFTER},
};
use backon::{ExponentialBuilder, Retryable};
use reqwest::{RequestBuilder, Response};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use self::{
    leash::{Leash, LeashError, Post},
    nora::{Intent, Nora, NoraError, Ramp},
    pirate::{Pirate, PirateError, Write},
    portfolio::{PortfolioError, Portfolios, Signed, Wish},
    skadi::{Draft, Skadi, SkadiError},
};

/// A success, with all its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The whole body.
    pub body: Bytes,
}

impl Answer {
    /// What it says.
    ///
    /// # Errors
    ///
    /// When it says something else.
    pub fn json<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_slice(&self.body)
    }
}

/// An answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status} {code}: {message}")]
pub struct Problem {
    /// The status.
    pub status: StatusCode,
    /// The API's code for it; empty where it has none.
    pub code: String,
    /// What it says to people.
    pub message: String,
    /// How long to wait before the next attempt, in seconds, as servers tell it.
    pub retry_after: Option<Duration>,
}

/// How an attempt failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No whole answer came: whether anything happened, this side does not know.
    #[error("no answer")]
    Lost(#[from] reqwest::Error),
    /// An answer came, and no success.
    #[error(transparent)]
    Problem(#[from] Problem),
}

/// How an operation ended without its answer.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// The server decided against it.
    Refused(Problem),
    /// This client's patience was over first.
    Unsettled(Failure),
}

/// How patient a client is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// After the first attempt it waits about so long; then twice as long each time.
    pub first: Duration,
    /// But never longer than that. If the server asks for more, the client gives up.
    pub longest: Duration,
    /// It makes so many attempts.
    pub attempts: usize,
}

impl Default for Patience {
    fn default() -> Self {
        let (first, longest) = (Duration::from_millis(200), Duration::from_secs(20));
        Self { first, longest, attempts: 8 }
    }
}

impl Patience {
    /// Sends the same request until the server has decided. `again` says of which problems another
    /// attempt can make something else.
    pub(crate) async fn settle(
        self,
        request: impl Fn() -> RequestBuilder,
        again: impl Fn(&Problem) -> bool,
    ) -> Result<Answer, Unanswered> {
        let is_worth_it = |failure: &Failure| match failure {
            // What cannot be sent now never can.
            Failure::Lost(error) => !error.is_builder(),
            Failure::Problem(problem) => again(problem),
        };
        let backoff = ExponentialBuilder::default()
            .with_min_delay(self.first)
            .with_max_delay(self.longest)
            .with_max_times(self.attempts.saturating_sub(1))
            .with_jitter();
        let attempts = (|| attempt(request())).retry(backoff).when(is_worth_it);
        let answer = attempts.adjust(|failure, delay| self.wait(failure, delay?)).await;
        answer.map_err(|failure| match failure {
            Failure::Problem(problem) if !again(&problem) => Unanswered::Refused(problem),
            failure => Unanswered::Unsettled(failure),
        })
    }

    fn wait(self, failure: &Failure, delay: Duration) -> Option<Duration> {
        match failure {
            Failure::Problem(Problem { retry_after: Some(asked), .. }) => {
                (*asked <= self.longest).then(|| delay.max(*asked))
            }
            _ => Some(delay),
        }
    }
}

async fn attempt(request: RequestBuilder) -> Result<Answer, Failure> {
    let response = request.send().await?;
    let (status, retry_after) = (response.status(), retry_after(&response));
    // Half an answer is none.
    let body = response.bytes().await?;
    if status.is_success() {
        return Ok(Answer { status, body });
    }
    let told: Value = serde_json::from_slice(&body).unwrap_or_default();
    let field = |name: &str| {
        let value = [&told["error"][name], &told[name]].into_iter().find_map(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    Err(Problem { status, code: field("code"), message: field("message"), retry_after }.into())
}

fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse();
    seconds.ok().map(Duration::from_secs)
}

/// It says nothing about the operation, only about this attempt: the server failed, or it was too
/// busy or too slow to begin.
fn is_transient(problem: &Problem) -> bool {
    let waits = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
    problem.status.is_server_error() || waits.contains(&problem.status)
}
