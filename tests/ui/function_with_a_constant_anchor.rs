use idem_runtime::{Anchor, CallError, Idempotency, idempotent};

const KEY: Anchor = Anchor::header("Idempotency-Key");

// A constant cannot read the arguments of a function.
#[idempotent(anchor = KEY)]
async fn deliver(idem: &Idempotency, event: u64) -> Result<(), CallError> {
    Ok(())
}

fn deliver_later(idem: &Idempotency) {
    let _ = (deliver(idem, 1), KEY);
}

fn main() {}
