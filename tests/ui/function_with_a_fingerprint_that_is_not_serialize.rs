use idem_runtime::{CallError, Idempotency, idempotent};

struct Body;

// What is compared is compared as JSON.
#[idempotent(anchor = arg(event), fingerprint = arg(body))]
async fn deliver(idem: &Idempotency, event: u64, body: Body) -> Result<u64, CallError> {
    Ok(event)
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1, Body);
}

fn main() {}
