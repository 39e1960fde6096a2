//! What an application answers to a test, and how two answers differ.

use std::{fmt, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{body::Body, extract::Request, response::Response};
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{BoxFuture, poll_fn},
};
use http::{HeaderMap, HeaderName, StatusCode};
use http_body_util::BodyExt;
use tokio::time::timeout;
use tower_service::Service;

use super::broken::Promise;
use crate::{
    builder::LEFT_OUT, builder::REPLAYED, http::answer::Handled, observer::Outcome,
    refusal::RefusalKind,
};

/// Beyond this an application does not answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// How much of a body is shown.
const SHOWN: usize = 80;

/// An application of whatever type, as a test calls it.
#[derive(Clone)]
pub(super) struct App(Arc<dyn Fn(Request) -> Answering + Send + Sync>);

type Answering = BoxFuture<'static, Result<Response, axum::BoxError>>;

impl App {
    pub(super) fn new<S, B>(app: S) -> Self
    where
        S: Service<Request, Response = http::Response<B>> + Clone + Send + Sync + 'static,
        S::Future: Send,
        S::Error: Into<axum::BoxError>,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<axum::BoxError>,
    {
        Self(Arc::new(move |request| {
            let mut app = app.clone();
            async move {
                poll_fn(|cx| app.poll_ready(cx)).await.map_err(Into::into)?;
                let response = app.call(request).await.map_err(Into::into)?;
                Ok(response.map(Body::new))
            }
            .boxed()
        }))
    }

    /// The head of an answer; its body may still be on the way.
    pub(super) fn call(&self, request: Request) -> Answering {
        (self.0)(request)
    }

    /// The whole answer.
    pub(super) async fn ask(self, request: Request) -> Got {
        let answering = async {
            let (head, body) = self.call(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            let outcome = head.extensions.get().map(|handled: &Handled| handled.outcome);
            Ok::<_, axum::BoxError>(Answer {
                status: head.status,
                headers: head.headers,
                body,
                outcome,
            })
        };
        match timeout(PATIENCE, AssertUnwindSafe(answering).catch_unwind()).await {
            Ok(Ok(Ok(answer))) => Got::Answer(answer),
            Ok(Ok(Err(error))) => Got::Nothing(format!("no answer, but the error `{error}`")),
            Ok(Err(_)) => Got::Nothing("no answer, but a panic".to_owned()),
            Err(_) => Got::Nothing(format!("no answer within {PATIENCE:?}")),
        }
    }
}

/// What came of a request.
#[derive(Clone)]
pub(super) enum Got {
    Answer(Answer),
    /// In words.
    Nothing(String),
}

#[derive(Clone)]
pub(super) struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    /// What idem made of the request, where it is idem that did.
    outcome: Option<Outcome>,
}

impl Got {
    /// The answer, if it is what a handler answers that has done its work.
    pub(super) fn success(&self) -> Option<&Answer> {
        match self {
            Self::Answer(answer) => {
                let succeeded = answer.status.is_success() || answer.status.is_redirection();
                let refused = matches!(answer.outcome, Some(Outcome::Refused(_)));
                (succeeded && !refused).then_some(answer)
            }
            Self::Nothing(_) => None,
        }
    }

    /// Whether it says that the request did not run and never will as it is.
    pub(super) fn is_refused(&self) -> bool {
        match self {
            Self::Answer(answer) => match answer.outcome {
                Some(Outcome::Refused(_)) => true,
                Some(_) => false,
                None => answer.status.is_client_error(),
            },
            Self::Nothing(_) => false,
        }
    }

    /// Whether it says that the same request is running. Of an answer that is not idem's own, its
    /// status says so.
    pub(super) fn is_in_flight(&self) -> bool {
        match self {
            Self::Answer(answer) => match answer.outcome {
                Some(outcome) => {
                    matches!(outcome, Outcome::Refused(RefusalKind::InFlight | RefusalKind::Busy))
                }
                None => matches!(answer.status.as_u16(), 409 | 425 | 429 | 503),
            },
            Self::Nothing(_) => false,
        }
    }

    /// Which promises it breaks as an answer to the same request as `first`, and how. Headers are
    /// compared that the first answer has, except those that are never recorded.
    pub(super) fn differences(
        &self,
        first: &Answer,
        except: &[HeaderName],
    ) -> Vec<(Promise, String)> {
        let answer = match self {
            Self::Answer(answer) => answer,
            Self::Nothing(words) => return vec![(Promise::OneAnswer, words.clone())],
        };
        let mut differences = Vec::new();
        if (answer.status, &answer.body) != (first.status, &first.body) {
            differences.push((Promise::OneAnswer, format!("{answer} after {first}")));
        } else if let Some(name) = answer.differing_header(first, except) {
            let lines = |answer: &Answer| match answer.lines(name) {
                lines if lines.is_empty() => "nothing".to_owned(),
                lines => format!("{lines:?}"),
            };
            let seen = format!("header `{name}` is {} after {}", lines(answer), lines(first));
            differences.push((Promise::OneAnswer, seen));
        }
        if !answer.is_marked() {
            differences.push((Promise::MarkedReplays, format!("{answer} without the header")));
        }
        differences
    }
}

impl Answer {
    /// Whether it says that it is a replay.
    pub(super) fn is_marked(&self) -> bool {
        self.headers.get(REPLAYED).is_some_and(|value| value == "true")
    }

    /// Whether two answers are the same to a client, as far as they are recorded.
    pub(super) fn is_like(&self, other: &Self, except: &[HeaderName]) -> bool {
        (self.status, &self.body) == (other.status, &other.body)
            && self.differing_header(other, except).is_none()
    }

    fn differing_header<'a>(
        &self,
        first: &'a Self,
        except: &[HeaderName],
    ) -> Option<&'a HeaderName> {
        let recorded = |name: &&HeaderName| {
            !LEFT_OUT.contains(name) && !except.contains(name) && **name != REPLAYED
        };
        first.headers.keys().filter(recorded).find(|name| self.lines(name) != first.lines(name))
    }

    fn lines(&self, name: &HeaderName) -> Vec<&http::HeaderValue> {
        self.headers.get_all(name).iter().collect()
    }
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(answer) => answer.fmt(f),
            Self::Nothing(words) => f.write_str(words),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = String::from_utf8_lossy(&self.body);
        let (shown, rest) = match body.char_indices().nth(SHOWN) {
            Some((end, _)) => (&body[..end], "…"),
            None => (&body[..], ""),
        };
        write!(f, "{} {shown:?}{rest}", self.status.as_u16())
    }
}
