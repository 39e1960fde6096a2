//! What a response says of its request: to the client, to the layers around idem, and to whoever
//! claimed further out.

use axum::{body::Body, response::Response};
use http::HeaderValue;
use uuid::Uuid;

use crate::{
    builder::IGNORED,
    engine::Shared,
    hooks::Settle,
    key::OperationId,
    observer::Outcome,
    policy::{Mode, Resolved},
    refusal::{Refusal, RefusalKind},
};

/// What became of a request, in its response's extensions: for layers that log, meter or limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handled {
    /// What became of it.
    pub outcome: Outcome,
    /// Which operation it was, where that is known.
    pub operation_id: Option<OperationId>,
}

/// That a response is a refusal, in its extensions, for whoever claimed further out: what is told
/// of the claim itself may be something else.
#[derive(Clone, Copy)]
pub(super) struct Refused(pub(super) RefusalKind);

/// Says of an answer that its handler was not protected though it could be, unless it protected
/// itself.
pub(super) fn unprotected(mut response: Response) -> Response {
    let handled = Handled { outcome: Outcome::Unprotected, operation_id: None };
    response.extensions_mut().get_or_insert(handled);
    response
}

/// A refusal in its shape.
pub(super) fn refuse(shared: &Shared, policy: &Resolved, refusal: Refusal) -> Response {
    let kind = refusal.kind();
    let mut response = shared.render(policy, refusal).map(Body::from);
    response.extensions_mut().insert(Refused(kind));
    response
}

/// Says on a response what became of its request. Where idem only observes, the client sees none of
/// it.
pub(super) fn say(
    shared: &Shared,
    policy: &Resolved,
    response: &mut Response,
    outcome: Outcome,
    operation_id: Option<OperationId>,
) {
    response.extensions_mut().insert(Handled { outcome, operation_id });
    if policy.mode != Mode::Enforce {
        return;
    }
    let headers = response.headers_mut();
    // Further in the key may have had no use: here it has.
    if headers.keys().any(|name| name == IGNORED) {
        headers.remove(IGNORED);
    }
    if let (Some(name), Some(id)) = (&shared.operation_header, operation_id) {
        let mut text = Uuid::encode_buffer();
        let text = id.as_uuid().hyphenated().encode_lower(&mut text);
        if let Ok(value) = HeaderValue::from_str(text) {
            headers.insert(name.clone(), value);
        }
    }
}

/// What becomes of a claim when what is behind it was refused by a claim of its own. Such an answer
/// is never recorded, whatever the policy or the handler says: it speaks of this moment, and a
/// retry may get another.
pub(super) const fn after_a_refusal(kind: RefusalKind) -> Settle {
    match kind {
        // The handler runs or may have run, now or in an earlier attempt. The operation, its steps
        // and its fingerprint stay for the retry, which gets the answer further in once it is there.
        RefusalKind::InFlight
        | RefusalKind::UnknownOutcome
        | RefusalKind::LeaseLost
        | RefusalKind::RecordUnreadable
        | RefusalKind::ShuttingDown
        | RefusalKind::HandlerPanicked
        | RefusalKind::CommitUnknown => Settle::uncertain(),
        // The handler did not run, and what is behind refuses the same request again, or else may
        // run it for the first time. To keep the operation would hold the key to a request that was
        // wrong: after a mismatch further in, the right one would be refused here. From the second
        // attempt on, forgetting is releasing: what an earlier one did still counts.
        RefusalKind::KeyMissing
        | RefusalKind::KeyMalformed
        | RefusalKind::BodyMalformed
        | RefusalKind::ScopeMissing
        | RefusalKind::Mismatch
        | RefusalKind::NotReplayable
        | RefusalKind::UnknownKey
        | RefusalKind::ExpiredKey
        | RefusalKind::BodyTooLarge
        | RefusalKind::StoreUnavailable
        | RefusalKind::StoreFull
        | RefusalKind::Busy
        | RefusalKind::TransactionFailed => Settle::forgotten(),
    }
}
