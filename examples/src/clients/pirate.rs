//! A client of Pirate's API.
//!
//! A key is made with each write, outside the loop that sends it, and goes with every attempt,
//! together with the same bytes. `external_uid` is something else: the caller's own name for what
//! is written.
//!
//! This API has one code for every 409, `conflict`. Only of a duplicate that is still running does
//! the server say when to come again (`Retry-After`), so that tells it from the conflicts that stay.

use reqwest::{Client, RequestBuilder, header::CONTENT_TYPE};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::{Answer, Failure, Patience, Problem, Unanswered, is_transient};

/// One write. To be kept until its answer is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    key: Uuid,
    path: String,
    body: String,
}

impl Write {
    /// A write to a path, with a key of its own.
    pub fn new(path: impl Into<String>, body: &Value) -> Self {
        Self { key: Uuid::new_v4(), path: path.into(), body: body.to_string() }
    }

    /// The same key for something else: a mistake, which the server refuses.
    #[must_use]
    pub fn with_body(mut self, body: &Value) -> Self {
        self.body = body.to_string();
        self
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PirateError {
    /// It exists already, or the key was used for another request.
    #[error(transparent)]
    Conflict(Problem),
    /// The request is wrong.
    #[error(transparent)]
    Refused(Problem),
    /// Nobody knows yet. The same write may be sent again, now or after a restart.
    #[error("not known yet: {0}")]
    Unsettled(#[source] Failure),
}

/// A client of Pirate's API.
#[derive(Clone, Debug)]
pub struct Pirate {
    http: Client,
    url: String,
    token: String,
    patience: Patience,
}

impl Pirate {
    /// A client of the server at a URL.
    pub fn new(http: Client, url: &str, token: &str, patience: Patience) -> Self {
        Self { http, url: url.to_owned(), token: token.to_owned(), patience }
    }

    /// Sends a write.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn send(&self, write: &Write) -> Result<Answer, PirateError> {
        let answer = self.patience.settle(|| self.request(write), again).await;
        answer.map_err(|unanswered| match unanswered {
            Unanswered::Unsettled(failure) => PirateError::Unsettled(failure),
            Unanswered::Refused(problem) if problem.code == "conflict" => {
                PirateError::Conflict(problem)
            }
            Unanswered::Refused(problem) => PirateError::Refused(problem),
        })
    }

    fn request(&self, write: &Write) -> RequestBuilder {
        self.http
            .post(format!("{}{}", self.url, write.path))
            .bearer_auth(&self.token)
            .header("Idempotency-Key", write.key.to_string())
            .header(CONTENT_TYPE, "application/json")
            .body(write.body.clone())
    }
}

fn again(problem: &Problem) -> bool {
    is_transient(problem) || problem.code == "conflict" && problem.retry_after.is_some()
}
