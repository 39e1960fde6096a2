//! A client of Skadi's API.
//!
//! A key is made of a business identifier, the draft of a submission, so that a process that starts
//! again asks with the same one and has nothing to remember. The key and the bytes go with every
//! attempt; the timestamp and the signature are each attempt's own, for a signature grows old.
//!
//! A client whose budget is spent is told when to come again (429 with `Retry-After`), and does.

use std::time::{SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use reqwest::{Client, RequestBuilder, header::CONTENT_TYPE};
use serde_json::Value;
use sha2::Sha256;
use uuid::Uuid;

use super::{Answer, Failure, Patience, Problem, Unanswered, is_transient};

/// Something to be written once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    key: Option<Uuid>,
    path: String,
    body: String,
}

impl Draft {
    /// A submission, or a transaction to be processed. The same `id` is the same one, whenever and
    /// wherever it is sent.
    pub fn new(path: &str, id: &str, body: &Value) -> Self {
        // However long the identifier is, the key is not longer than it may be.
        let key = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{path} {id}").as_bytes());
        Self { key: Some(key), path: path.to_owned(), body: body.to_string() }
    }

    /// The binding of a quote, which is one thing however often it is asked for.
    pub fn bind(kind: &str, quote: &str, body: &Value) -> Self {
        Self::new(&format!("/{kind}/{quote}/bind"), quote, body)
    }

    /// A quote, which commits nobody and has no key: asked for twice, there are two.
    pub fn quote(kind: &str, body: &Value) -> Self {
        Self { key: None, path: format!("/{kind}"), body: body.to_string() }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SkadiError {
    /// The draft was sent before, with another body. A different request is another draft.
    #[error(transparent)]
    KeyReused(Problem),
    /// The request is wrong, or it was declined.
    #[error(transparent)]
    Refused(Problem),
    /// Nobody knows yet. The same draft may be sent again, now or after a restart.
    #[error("not known yet: {0}")]
    Unsettled(#[source] Failure),
}

/// A client of Skadi's API.
#[derive(Clone, Debug)]
pub struct Skadi {
    http: Client,
    url: String,
    api_key: String,
    secret: String,
    patience: Patience,
}

impl Skadi {
    /// A client of the server at a URL.
    pub fn new(http: Client, url: &str, api_key: &str, secret: &str, patience: Patience) -> Self {
        let (url, api_key, secret) = (url.to_owned(), api_key.to_owned(), secret.to_owned());
        Self { http, url, api_key, secret, patience }
    }

    /// Sends a draft.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn send(&self, draft: &Draft) -> Result<Answer, SkadiError> {
        let answer = self.patience.settle(|| self.sign(draft), again).await;
        answer.map_err(|unanswered| match unanswered {
            Unanswered::Unsettled(failure) => SkadiError::Unsettled(failure),
            Unanswered::Refused(problem) if problem.code == "idempotency-conflict" => {
                SkadiError::KeyReused(problem)
            }
            Unanswered::Refused(problem) => SkadiError::Refused(problem),
        })
    }

    /// An attempt.
    fn sign(&self, draft: &Draft) -> RequestBuilder {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = now.as_secs().to_string();
        let mut request = self.http.post(format!("{}{}", self.url, draft.path));
        // A key of any length will do, so there is always a signature.
        if let Ok(mac) = Hmac::<Sha256>::new_from_slice(self.secret.as_bytes()) {
            let mac = mac.chain_update(&timestamp).chain_update(&draft.body).finalize();
            let signature = hex::encode(mac.into_bytes());
            request = request.header("X-Signature", format!("sha256={signature}"));
        }
        if let Some(key) = draft.key {
            request = request.header("Idempotency-Key", key.to_string());
        }
        request
            .header("X-API-Key", &self.api_key)
            .header("X-Timestamp", timestamp)
            .header(CONTENT_TYPE, "application/json")
            .body(draft.body.clone())
    }
}

fn again(problem: &Problem) -> bool {
    is_transient(problem) || problem.code == "in_flight"
}
