//! Keys that the server hands out.

use serde::{Serialize, de::DeserializeOwned};

use bytes::Bytes;

use crate::{
    anchor::{Anchor, AnchorError, AnchorValue},
    engine::Idempotency,
    key::{OperationId, Space, Token, Values},
    operation::Operation,
    record::{FORMAT, Progress, Record, State, Ttl},
    store::{Issue, StoreError, StoreErrorKind, Written},
};

impl Idempotency {
    /// Hands a key out: from now on, and for the anchor's time to live, a handler with this anchor
    /// that takes only issued keys accepts it, once.
    ///
    /// The anchor must name a space: the handler that takes the key is another operation than the
    /// one that hands it out. `scope` is what that handler's scope will see, `()` where that is
    /// global; `value` is the key. `payload` is bound to the key, and the handler takes it by [`Issued`].
    ///
    /// To choose the validity at run time, say it here: `&ANCHOR.ttl(…)`.
    ///
    /// Issuing is safe to repeat: the same key again is the same issuance, and the payload that is
    /// bound to it is returned. Derive the value from the [`Operation`] of an idempotent handler,
    /// and a retry after a crash hands out the same one.
    ///
    /// ```
    /// use std::time::Duration;
    /// use idem_runtime::{Anchor, Format, Idempotency, Scope, store::MemoryStore};
    ///
    /// const FLOW: Anchor = Anchor::body_field("flowId")
    ///     .format(Format::Uuid)
    ///     .space("enrolment")
    ///     .ttl(Duration::from_secs(24 * 60 * 60));
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
    /// let flow_id = uuid::Uuid::new_v4();
    /// let slot = idem.issue(&FLOW, "the api key", &flow_id, 7_u32).await?;
    /// assert_eq!(slot, 7);
    /// // The second time, what was bound the first time.
    /// assert_eq!(idem.issue(&FLOW, "the api key", &flow_id, 8_u32).await?, 7);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the anchor names no space, the value does not have the anchor's format, the key was used
    /// or has expired, the payload cannot be written as JSON or read back as a `T`, or the store
    /// fails.
    pub async fn issue<T>(
        &self,
        anchor: &Anchor,
        scope: &(impl AnchorValue + ?Sized),
        value: &(impl AnchorValue + ?Sized),
        payload: T,
    ) -> Result<T, IssueError>
    where
        T: Serialize + DeserializeOwned,
    {
        let shared = &self.shared;
        let space = anchor.options.space.ok_or(IssueError::NoSpace)?;
        let (mut scopes, mut values) = (Values::new(), Values::new());
        scope.write(&mut scopes);
        value.write(&mut values);
        let values = anchor.checked(&values, shared.limits.key_length)?;
        let valid_for =
            anchor.options.ttl.or(shared.options.ttl).unwrap_or(crate::policy::DEFAULT_TTL);
        let bytes = serde_json::to_vec(&payload).map_err(IssueError::Payload)?;
        let progress = Progress { issued: Some(Bytes::from(bytes)), ..Progress::default() };
        let issue = Issue {
            key: shared.digester.key(Space::Named(space), &scopes, &values),
            scope: shared.digester.scope(&scopes),
            operation: format!("issued for {space}").into(),
            operation_id: OperationId::random(),
            token: Token::random(),
            valid_for,
            kept_for: match valid_for {
                Ttl::For(valid) => Ttl::For(valid.saturating_add(shared.limits.remember_expired)),
                Ttl::Forever => Ttl::Forever,
            },
            payload: progress.encode(),
            format: FORMAT,
        };
        match shared.issue(&issue).await? {
            Written::Done => Ok(payload),
            Written::Fenced(record) if record.valid_left.is_over() => Err(IssueError::Expired),
            Written::Fenced(record) => bound(&record),
            Written::Gone => Err(IssueError::AlreadyUsed),
        }
    }
}

/// What is bound to a key that was issued before.
fn bound<T: DeserializeOwned>(record: &Record) -> Result<T, IssueError> {
    // A completed record carries the answer and no longer the payload.
    if record.state == State::Completed {
        return Err(IssueError::AlreadyUsed);
    }
    let progress = Progress::decode(&record.payload)
        .map_err(|error| StoreError::caused_by("idem", StoreErrorKind::Corrupt, error))?;
    let issued = progress.issued.ok_or(IssueError::AlreadyUsed)?;
    serde_json::from_slice(&issued).map_err(IssueError::Payload)
}

/// Why a key was not handed out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The anchor names no space. Add `.space("…")` to it.
    #[error("the anchor of an issued key must name a space")]
    NoSpace,
    /// The value cannot be a key of this anchor.
    #[error("the value cannot be a key of this anchor")]
    Value(#[from] AnchorError),
    /// The payload cannot be written as JSON, or what is bound to the key is of another type.
    #[error("the payload cannot be written or read as JSON")]
    Payload(#[source] serde_json::Error),
    /// The key was issued before, and the time in which it could be used is over.
    #[error("the key was issued before and has expired")]
    Expired,
    /// The key was used already.
    #[error("the key was used already")]
    AlreadyUsed,
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
}

/// What was bound to the key when it was issued; take it as an argument of the handler that takes
/// only issued keys.
///
/// Like [`Operation`], it is filled when the claim is granted: ask it in the handler's body.
#[derive(Clone, Debug)]
pub struct Issued<T> {
    operation: Operation,
    payload: std::marker::PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Issued<T> {
    pub(crate) const fn new(operation: Operation) -> Self {
        Self { operation, payload: std::marker::PhantomData }
    }

    /// The payload.
    ///
    /// # Errors
    ///
    /// When the key was not issued with a payload, or with one of another type.
    pub fn payload(&self) -> Result<T, IssuedError> {
        let payload = self.operation.issued().ok_or(IssuedError::Missing)?;
        serde_json::from_slice(&payload).map_err(IssuedError::Type)
    }
}

/// Why an issued key has no payload of this type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssuedError {
    /// The key was not issued: does the handler say `issued`?
    #[error("the key was not issued with a payload")]
    Missing,
    /// It was issued with a payload of another type.
    #[error("the key was issued with a payload of another type")]
    Type(#[source] serde_json::Error),
}
