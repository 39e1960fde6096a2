//! A client of Portfolio's API.
//!
//! The keys are the server's: a `flowId` for an enrolment, a nonce for a withdrawal. What was handed
//! out is signed once, and the message and its signature are sent verbatim in every attempt. A
//! fresh key is no way to try again: it would be a second enrolment or a second withdrawal, if the
//! first one happened after all. So it takes the caller to begin anew, and an error that says so.
//!
//! This server's first stage can be tried again too, under a key of the client's own.

use reqwest::{Client, RequestBuilder, header::CONTENT_TYPE};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Answer, Failure, Patience, Problem, Unanswered};
use crate::wallet::{Enrolment, Withdrawal};

/// A request for a key. To be kept until it is signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    key: Uuid,
    path: String,
    body: Value,
}

impl Wish {
    /// To enrol a user in a strategy.
    pub fn enrolment(user: &str, strategy: &str) -> Self {
        let body = json!({ "user": user, "strategyId": strategy });
        Self { key: Uuid::new_v4(), path: "/v2/enroll/signature".to_owned(), body }
    }

    /// To withdraw from a portfolio.
    pub fn withdrawal(portfolio: &str, to: &str, amount: u64) -> Self {
        let path = format!("/v2/portfolios/{portfolio}/withdraw/signature");
        Self { key: Uuid::new_v4(), path, body: json!({ "to": to, "amount": amount }) }
    }
}

/// A signed message. To be kept, as it is, until its answer is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    path: String,
    body: String,
}

impl Signed {
    /// By the user.
    pub fn enrolment(message: &Enrolment, signature: &str) -> Self {
        let body = json!({ "flowId": message.flowId, "signature": signature }).to_string();
        Self { path: "/v2/enroll".to_owned(), body }
    }

    /// By the portfolio's owner.
    pub fn withdrawal(message: &Withdrawal, signature: &str) -> Self {
        let path = format!("/v2/portfolios/{}/withdraw", message.portfolioId);
        Self { path, body: json!({ "message": message, "signature": signature }).to_string() }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PortfolioError {
    /// The user is in this strategy already (`API_202`).
    #[error(transparent)]
    AlreadyEnrolled(Problem),
    /// The key was used with another body (`API_008`): send that one, or begin anew.
    #[error(transparent)]
    OtherBody(Problem),
    /// The nonce has expired (`API_216`), whatever it was used for. Whoever was left without an
    /// answer looks whether the money was sent, before asking for a new one.
    #[error(transparent)]
    NonceExpired(Problem),
    /// It is not there for this caller (401, 403, 404): that is for a person to look into.
    #[error(transparent)]
    NotAllowed(Problem),
    /// The request is wrong.
    #[error(transparent)]
    Refused(Problem),
    /// Nobody knows yet. The same message may be sent again, while its key is valid.
    #[error("not known yet: {0}")]
    Unsettled(#[source] Failure),
    /// The answer is not the documented one.
    #[error("not understood: {0}")]
    NotUnderstood(#[from] serde_json::Error),
}

/// A client of Portfolio's API.
#[derive(Clone, Debug)]
pub struct Portfolios {
    http: Client,
    url: String,
    api_key: String,
    patience: Patience,
}

impl Portfolios {
    /// A client of the server at a URL.
    pub fn new(http: Client, url: &str, api_key: &str, patience: Patience) -> Self {
        Self { http, url: url.to_owned(), api_key: api_key.to_owned(), patience }
    }

    /// Stage 1: the message to be signed, an [`Enrolment`] or a [`Withdrawal`].
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn begin<M: DeserializeOwned>(&self, wish: &Wish) -> Result<M, PortfolioError> {
        let request = || {
            let request = self.post(&wish.path, wish.body.to_string());
            request.header("Idempotency-Key", wish.key.to_string())
        };
        let mut answer: Value = settle(self.patience, request).await?.json()?;
        Ok(serde_json::from_value(answer["message"].take())?)
    }

    /// Stage 2.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn submit(&self, signed: &Signed) -> Result<Answer, PortfolioError> {
        settle(self.patience, || self.post(&signed.path, signed.body.clone())).await
    }

    /// Starts a portfolio; one that runs goes on.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer for too long.
    pub async fn start(&self, portfolio: &str) -> Result<Answer, PortfolioError> {
        let path = format!("/v2/portfolios/{portfolio}/start");
        settle(self.patience, || self.post(&path, String::new())).await
    }

    /// Creates a strategy, in one attempt: another one could make a second strategy. If there is no
    /// answer, only the list of strategies tells.
    ///
    /// # Errors
    ///
    /// When the server refuses it, or does not answer.
    pub async fn create_strategy(&self, name: &str) -> Result<Answer, PortfolioError> {
        let once = Patience { attempts: 1, ..self.patience };
        settle(once, || self.post("/v2/strategies", json!({ "name": name }).to_string())).await
    }

    fn post(&self, path: &str, body: String) -> RequestBuilder {
        let request = self.http.post(format!("{}{path}", self.url));
        let request = request.header("X-API-Key", &self.api_key);
        request.header(CONTENT_TYPE, "application/json").body(body)
    }
}

/// Of the 4xx, only one is worth another attempt.
fn again(problem: &Problem) -> bool {
    problem.status.is_server_error() || problem.code == "API_007"
}

async fn settle(
    patience: Patience,
    request: impl Fn() -> RequestBuilder,
) -> Result<Answer, PortfolioError> {
    patience.settle(request, again).await.map_err(|unanswered| match unanswered {
        Unanswered::Unsettled(failure) => PortfolioError::Unsettled(failure),
        Unanswered::Refused(problem) => match (problem.status.as_u16(), &*problem.code) {
            (_, "API_202") => PortfolioError::AlreadyEnrolled(problem),
            (_, "API_008") => PortfolioError::OtherBody(problem),
            (_, "API_216") => PortfolioError::NonceExpired(problem),
            (401 | 403 | 404, _) => PortfolioError::NotAllowed(problem),
            _ => PortfolioError::Refused(problem),
        },
    })
}
