//! Looking records up: what became of a request.

use std::fmt;

use bytes::Bytes;

use crate::{
    admin::SEARCH_TIMEOUT,
    anchor::AnchorValue,
    decision::Seen,
    engine::{Idempotency, Shared},
    key::{KeyName, KeyNameError, OperationId, ScopeDigest, Values},
    record::{Answer, Record},
    store::{Manage, StoreError, StoreErrorKind},
};

impl Idempotency {
    /// Looks up what became of a caller's requests. `scope` is what the handlers' scope saw, `()`
    /// where that is global; nothing of other scopes is ever found.
    ///
    /// Take the scope from the same place as the handlers do: from whoever was authenticated, and
    /// not from what the caller says.
    ///
    /// This is an endpoint that a client asks after a time-out, instead of sending its request
    /// again:
    ///
    /// ```
    /// use axum::{
    ///     extract::{Path, State},
    ///     http::{HeaderMap, StatusCode},
    ///     response::{IntoResponse, Response},
    /// };
    /// use idem_runtime::{Became, Idempotency, OperationId};
    ///
    /// async fn payment(
    ///     State(idem): State<Idempotency>,
    ///     headers: HeaderMap,
    ///     Path(id): Path<OperationId>,
    /// ) -> Result<Response, StatusCode> {
    ///     let tenant = headers["x-api-key"].to_str().map_err(|_| StatusCode::UNAUTHORIZED)?;
    ///     let found = idem.look_up(tenant).operation(id).await;
    ///     let found = found.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    ///     Ok(match found.ok_or(StatusCode::NOT_FOUND)?.became {
    ///         Became::Completed(answer) => answer.into_response(),
    ///         Became::Running => StatusCode::ACCEPTED.into_response(),
    ///         _ => StatusCode::CONFLICT.into_response(),
    ///     })
    /// }
    /// #
    /// # use axum::{Router, body::{Body, to_bytes}, http::Request, routing::{get, post}};
    /// # use idem_runtime::{Anchor, Handled, IdempotentExt, Scope, store::MemoryStore};
    /// # use tower::ServiceExt;
    /// #
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// # let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
    /// # let pay = (|| async { (StatusCode::CREATED, "paid") })
    /// #     .idempotent(Anchor::header("Idempotency-Key"));
    /// # let app = Router::new()
    /// #     .route("/payments", post(pay))
    /// #     .route("/payments/{operation_id}", get(payment))
    /// #     .with_state(idem);
    /// # let request = Request::post("/payments").header("x-api-key", "alice");
    /// # let request = request.header("idempotency-key", "order-1").body(Body::empty()).unwrap();
    /// # let first = app.clone().oneshot(request).await.unwrap();
    /// # let id = first.extensions().get::<Handled>().unwrap().operation_id.unwrap();
    /// # for (tenant, expected) in [("alice", StatusCode::CREATED), ("bob", StatusCode::NOT_FOUND)] {
    /// #     let request = Request::get(format!("/payments/{id}")).header("x-api-key", tenant);
    /// #     let answer = app.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    /// #     assert_eq!(answer.status(), expected);
    /// #     let body = to_bytes(answer.into_body(), 100).await.unwrap();
    /// #     assert_eq!(body, if tenant == "alice" { "paid" } else { "" });
    /// # }
    /// # }
    /// ```
    pub fn look_up(&self, scope: &(impl AnchorValue + ?Sized)) -> LookUp<'_> {
        LookUp { shared: &self.shared, scope: values_of(scope) }
    }
}

/// The values of a scope, as it is given by an application.
pub(crate) fn values_of(scope: &(impl AnchorValue + ?Sized)) -> Values {
    let mut values = Values::new();
    scope.write(&mut values);
    values
}

/// What became of the requests of one scope; made by [`Idempotency::look_up`].
#[must_use = "nothing is looked up until it is said what"]
pub struct LookUp<'e> {
    shared: &'e Shared,
    scope: Values,
}

/// A scope may be a credential: it is not shown.
impl fmt::Debug for LookUp<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LookUp").field("store", &self.shared.store).finish_non_exhaustive()
    }
}

impl LookUp<'_> {
    /// What became of an operation: `None` if there is none of this id in the scope, it is
    /// transactional and not committed yet, or its record is over. One of another scope is asked for by the same call of the store and then kept back:
    /// who guesses at ids, which are random, learns nothing.
    ///
    /// The id is that of the operation that the record is about *now*: a key that was forgotten and
    /// used again is another operation.
    ///
    /// What it costs is the store's affair: SQL stores have an index; the memory store looks through
    /// all its records, and so does Redis for an id that it has no note of. Where strangers can ask,
    /// have them ask by [key](Self::key) there.
    ///
    /// # Errors
    ///
    /// When the store cannot be searched, cannot be asked, or the record cannot be read by this
    /// release.
    pub async fn operation(&self, id: OperationId) -> Result<Option<Found>, LookUpError> {
        let scope = self.shared.digester.scope(&self.scope);
        self.shared.find(id, Some(scope)).await
    }

    /// What became of the request with a key: `None` if there was none in this scope, it is
    /// transactional and not committed yet, it was forgotten, or its record is over. So `None` does
    /// not say that nothing will happen: to be sure, send the request again under its key. See [`KeyName`] for how to say which key.
    ///
    /// ```
    /// use idem_runtime::{Anchor, Became, Format, Idempotency, KeyName, Scope, store::MemoryStore};
    ///
    /// const FLOW: Anchor = Anchor::body_field("flowId").format(Format::Uuid).space("enrolment");
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
    /// let flow_id = uuid::Uuid::new_v4();
    /// idem.issue(&FLOW, "alice", &flow_id, ()).await?;
    ///
    /// let name = KeyName::of(&FLOW, &flow_id);
    /// let found = idem.look_up("alice").key(&name).await?;
    /// assert!(matches!(found.map(|found| found.became), Some(Became::Issued)));
    /// assert!(idem.look_up("bob").key(&name).await?.is_none());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the name is not that of a key, the store cannot be asked, or the record cannot be read
    /// by this release.
    pub async fn key(&self, name: &KeyName) -> Result<Option<Found>, LookUpError> {
        let key = self.shared.named(name, &self.scope)?;
        let record = self.shared.ask(self.shared.store.read(&key)).await?;
        Ok(record.map(found).transpose()?)
    }
}

impl Shared {
    /// The store's records, if it can be searched.
    pub(crate) fn manage(&self) -> Result<&dyn Manage, LookUpError> {
        self.store.manage().ok_or(LookUpError::NotSearchable)
    }

    /// An operation by its id, of one scope or of any.
    pub(crate) async fn find(
        &self,
        id: OperationId,
        scope: Option<ScopeDigest>,
    ) -> Result<Option<Found>, LookUpError> {
        // Operators may wait for a store that looks through all its records.
        let at_most = match scope {
            Some(_) => self.limits.store_timeout,
            None => SEARCH_TIMEOUT,
        };
        let record = self.ask_for(at_most, self.manage()?.find(&id)).await?;
        let record = record.filter(|record| scope.is_none_or(|scope| record.scope == scope));
        Ok(record.map(found).transpose()?)
    }
}

/// What was found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Found {
    /// What became of it.
    pub became: Became,
    /// Its record, without the payload.
    pub record: Record,
}

/// What became of a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Became {
    /// The server handed its key out, and nothing has used it yet.
    Issued,
    /// The time in which its key could be used is over: that of a key that the server handed out,
    /// whether or not it was used. Other records are gone when their time is over.
    Expired,
    /// It is running. Of a transactional handler there is nothing before the commit: while it runs,
    /// it is as one that was never seen.
    Running,
    /// An attempt ended without saying whether its effect happened, and no other one has begun.
    UnknownOutcome,
    /// It is done, and this was the answer.
    Completed(Answer),
    /// It is done, and its answer could not be kept.
    Tombstone {
        /// The answer's HTTP status; `None` where it was a plain function's.
        status: Option<u16>,
    },
}

/// What became of a record's request: the one place in which payloads are read for people.
pub(crate) fn found(record: Record) -> Result<Found, StoreError> {
    let answer = || {
        Answer::decode(&record.payload)
            .map_err(|corrupt| StoreError::caused_by("idem", StoreErrorKind::Corrupt, corrupt))
    };
    let became = match record.seen() {
        Seen::Issued { valid: false }
        | Seen::Released { valid: false }
        | Seen::Running { leased: false, valid: false }
        | Seen::Completed { valid: false, .. } => Became::Expired,
        Seen::Issued { .. } => Became::Issued,
        Seen::Running { leased: true, .. } => Became::Running,
        Seen::Released { .. } | Seen::Running { .. } => Became::UnknownOutcome,
        Seen::Completed { tombstone: false, .. } => Became::Completed(answer()?),
        Seen::Completed { tombstone: true, .. } => Became::Tombstone {
            status: match answer()? {
                Answer::Response(response) => Some(response.status),
                Answer::Value(_) => None,
            },
        },
        // No record was seen.
        Seen::Nothing => Became::Expired,
    };
    let record = Record { payload: Bytes::new(), ..record };
    Ok(Found { became, record })
}

/// Why a record could not be looked up, listed or purged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LookUpError {
    /// The name is not that of a key.
    #[error("there can be no such key")]
    Name(#[from] KeyNameError),
    /// The store cannot search its records; it only finds them by their keys.
    #[error("the store cannot search its records")]
    NotSearchable,
    /// There is a record, which a newer release wrote ([`StoreErrorKind::Newer`]) or which is
    /// damaged ([`StoreErrorKind::Corrupt`]).
    #[error("the record cannot be read")]
    Unreadable(#[source] StoreError),
    /// The store failed.
    #[error("the store failed")]
    Store(#[source] StoreError),
}

impl From<StoreError> for LookUpError {
    fn from(error: StoreError) -> Self {
        match error.kind() {
            StoreErrorKind::Newer | StoreErrorKind::Corrupt => Self::Unreadable(error),
            _ => Self::Store(error),
        }
    }
}
