use idem_runtime::{CallError, Idempotency, Scope, idempotent};

const TENANT: Scope = Scope::header("X-Tenant");

// All of these read a request, or answer one; all are told at once.
#[idempotent(
    anchor = arg(event),
    scope = TENANT,
    optional,
    fingerprint = json,
    record = final,
    on_unknown = recover = ask,
    admit = within_quota,
    replay(status = 200),
    issued,
    refusals = PROBLEMS,
    engine = state,
    state = App,
)]
async fn deliver(idem: &Idempotency, event: u64) -> Result<(), CallError> {
    Ok(())
}

fn deliver_later(idem: &Idempotency) {
    let _ = (deliver(idem, 1), TENANT);
}

fn main() {}
