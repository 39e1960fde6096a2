//! A client of Leash's API.
//!
//! A 429, a 5xx and a lost connection are tried again; any other 4xx says that the request is
//! wrong, and stays wrong. The key goes with every attempt. Once there is an event, its id is what
//! is kept, beside whatever it pays for: a transaction can be submitted for it again and again, by
//! any worker, and the chain sees one.

use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Answer, Failure, Patience, Problem, Unanswered};

/// Something to be posted. To be kept until its answer is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Post {
    key: Option<Uuid>,
    path: String,
    body: Value,
}

impl Post {
    /// A transaction to be prepared, with a key of its own.
    pub fn transfer(agent: &str, network: &str, to: &str, amount: u64) -> Self {
        let body = json!({ "agent": agent, "network": network, "to": to, "amount": amount });
        Self::keyed("/v1/prepare", body)
    }

    /// A receipt of an agent's, with a key of its own.
    pub fn receipt(agent: &str, network: &str, receipt_hash: &str) -> Self {
        let body = json!({ "network": network, "receipt_hash": receipt_hash });
        Self::keyed(format!("/v1/receipts/{agent}"), body)
    }

    /// A subscription, with a key of its own.
    pub fn webhook(url: &str, secret: &str) -> Self {
        Self::keyed("/v1/webhooks", json!({ "url": url, "secret": secret }))
    }

    /// A transaction that was signed for an event. It needs no key but the event.
    pub fn submission(event_id: &str, signed_transaction: &str) -> Self {
        let body = json!({ "event_id": event_id, "signed_transaction": signed_transaction });
        Self { key: None, path: "/v1/submit".to_owned(), body }
    }

    /// The same key for something else: a mistake, which the server refuses.
    #[must_use]
    pub fn with_body(self, body: Value) -> Self {
        Self { body, ..self }
    }

    /// The same with a key, so that a retry gets the first answer as it was.
    #[must_use]
    pub fn with_key(self) -> Self {
        Self { key: Some(Uuid::new_v4()), ..self }
    }

    /// The same without a key.
    #[must_use]
    pub fn without_key(self) -> Self {
        Self { key: None, ..self }
    }

    fn keyed(path: impl Into<String>, body: Value) -> Self {
        Self { key: Some(Uuid::new_v4()), path: path.into(), body }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeashError {
    /// The key was used with another body: this request has not happened.
    #[error(transparent)]
    OtherBody(Problem),
    /// Another transaction was submitted for this event, and that one counts.
    #[error(transparent)]
    AlreadySubmitted(Problem),
    /// The request is wrong, or the chain refuses it.
    #[error(transparent)]
    Refused(Problem),
    /// Nobody knows yet. The same may be posted again, now or after a restart.
    #[error("not known yet: {0}")]
    Unsettled(#[source] Failure),
    /// The answer is not the documented one.
    #[error("not understood: {0}")]
    NotUnderstood(#[from] serde_json::Error),
}

/// A client of Leash's API.
#[derive(Clone, Debug)]
pub struct Leash {
    http: Client,
    url: String,
    api_key: String,
    patience: Patience,
    polls_every: Duration,
}

impl Leash {
    /// A client of the server at a URL.
    pub fn new(http: Client, url: &str, api_key: &str, patience: Patience) -> Self {
        let (url, api_key) = (url.to_owned(), api_key.to_owned());
        Self { http, url, api_key, patience, polls_every: Duration::from_secs(5) }
    }

    /// The same client, more or less eager to hear how a transaction ends; else every five seconds.
    #[must_use]
    pub fn polling(self, polls_every: Duration) -> Self {
        Self { polls_every, ..self }
    }

    /// Posts something.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn post(&self, post: &Post) -> Result<Answer, LeashError> {
        self.settle(|| {
            let request = self.request(Method::POST, &post.path).json(&post.body);
            match post.key {
                Some(key) => request.header("Idempotency-Key", key.to_string()),
                None => request,
            }
        })
        .await
    }

    /// An event, as it is now.
    ///
    /// # Errors
    ///
    /// When there is none of this API key's, or the server does not answer for too long.
    pub async fn event(&self, id: &str) -> Result<Value, LeashError> {
        let path = format!("/v1/events/{id}");
        Ok(self.settle(|| self.request(Method::GET, &path)).await?.json()?)
    }

    /// A transaction that was submitted, once it is confirmed or failed. For as long as that takes:
    /// who will not wait for ever, drops it.
    ///
    /// # Errors
    ///
    /// When there is none of this API key's, or the server does not answer for too long.
    pub async fn ended(&self, id: &str) -> Result<Value, LeashError> {
        loop {
            let event = self.event(id).await?;
            if matches!(event["phase"].as_str(), Some("confirmed" | "failed")) {
                return Ok(event);
            }
            tokio::time::sleep(self.polls_every).await;
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).header("X-API-Key", &self.api_key)
    }

    async fn settle(&self, request: impl Fn() -> RequestBuilder) -> Result<Answer, LeashError> {
        self.patience.settle(request, is_retryable).await.map_err(|unanswered| match unanswered {
            Unanswered::Unsettled(failure) => LeashError::Unsettled(failure),
            Unanswered::Refused(problem) => match &*problem.code {
                "idempotency_body_mismatch" => LeashError::OtherBody(problem),
                "event_already_submitted" => LeashError::AlreadySubmitted(problem),
                _ => LeashError::Refused(problem),
            },
        })
    }
}

/// A 408 is none of them: this document names the 429 and no other 4xx.
fn is_retryable(problem: &Problem) -> bool {
    problem.status.is_server_error() || problem.status == StatusCode::TOO_MANY_REQUESTS
}
