//! A client of Nora's API.
//!
//! One UUID for each thing that a user intends: it is minted when the user clicks, goes with every
//! attempt, and is worth being written down first, so that a client that crashed asks again with
//! the same one. An edited form is another intent. A burn has no key: the same signed bytes are sent
//! again, and when the chain refuses them, a fresh transaction is signed, which only the caller can
//! do.

use reqwest::{Client, Method, RequestBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Answer, Failure, Patience, Problem, Unanswered, is_transient};

/// What a user intends. To be kept until its answer is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    key: Uuid,
    ramp: Ramp,
    amount: String,
}

impl Intent {
    /// For one click, with a key of its own.
    pub fn new(ramp: Ramp, amount: impl Into<String>) -> Self {
        Self { key: Uuid::new_v4(), ramp, amount: amount.into() }
    }
}

/// Which way the money goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ramp {
    /// From money to tokens.
    On,
    /// From tokens to money.
    Off,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoraError {
    /// The chain refuses this transaction: sign a fresh one, and submit that.
    #[error("sign a fresh transaction: {0}")]
    BurnRefused(Problem),
    /// The burn was submitted with another signature, which counts.
    #[error(transparent)]
    OtherSignature(Problem),
    /// There is a party with this `cpf`; perhaps since an attempt whose answer was lost.
    #[error(transparent)]
    PartyExists(Problem),
    /// The request is wrong.
    #[error(transparent)]
    Refused(Problem),
    /// Nobody knows yet. The same intent may be submitted again, now or after a restart.
    #[error("not known yet: {0}")]
    Unsettled(#[source] Failure),
}

/// A client of Nora's API.
#[derive(Clone, Debug)]
pub struct Nora {
    http: Client,
    url: String,
    api_key: String,
    patience: Patience,
}

impl Nora {
    /// A client of the server at a URL.
    pub fn new(http: Client, url: &str, api_key: &str, patience: Patience) -> Self {
        Self { http, url: url.to_owned(), api_key: api_key.to_owned(), patience }
    }

    /// Submits an intent.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn submit(&self, intent: &Intent) -> Result<Answer, NoraError> {
        let path = match intent.ramp {
            Ramp::On => "/v2/intents/onramp",
            Ramp::Off => "/v2/intents/offramp",
        };
        let body = json!({ "amount": intent.amount });
        self.settle(|| {
            self.request(Method::POST, path, &body)
                .header("idempotency-key", intent.key.to_string())
        })
        .await
    }

    /// Approves the burn of an intent with a signed transaction.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn approve_burn(&self, id: &str, signature: &str) -> Result<Answer, NoraError> {
        let path = format!("/v2/intents/{id}/approve-burn");
        let body = json!({ "txSignature": signature });
        self.settle(|| self.request(Method::POST, &path, &body)).await
    }

    /// Creates a party. It has no key: after a lost answer its own `cpf` may stand in the way.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn create_party(&self, cpf: &str) -> Result<Answer, NoraError> {
        let body = json!({ "cpf": cpf });
        self.settle(|| self.request(Method::POST, "/v2/parties", &body)).await
    }

    /// Replaces a party's wallet; a second time changes nothing.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn bind_wallet(&self, party: &str, wallet: &str) -> Result<Answer, NoraError> {
        let path = format!("/v2/parties/{party}/wallet");
        let body = json!({ "wallet": wallet });
        self.settle(|| self.request(Method::PATCH, &path, &body)).await
    }

    fn request(&self, method: Method, path: &str, body: &Value) -> RequestBuilder {
        let url = format!("{}{path}", self.url);
        self.http.request(method, url).header("X-API-Key", &self.api_key).json(body)
    }

    async fn settle(&self, request: impl Fn() -> RequestBuilder) -> Result<Answer, NoraError> {
        let again = |problem: &Problem| is_transient(problem) || problem.code == "in_progress";
        self.patience.settle(request, again).await.map_err(|unanswered| match unanswered {
            Unanswered::Unsettled(failure) => NoraError::Unsettled(failure),
            Unanswered::Refused(problem) => match &*problem.code {
                "burn_refused" => NoraError::BurnRefused(problem),
                "other_tx_signature" => NoraError::OtherSignature(problem),
                "duplicate_cpf" => NoraError::PartyExists(problem),
                _ => NoraError::Refused(problem),
            },
        })
    }
}
