use idem_runtime::{CallError, Idempotency, idempotent};

// It may finish after whoever lent the text is gone.
#[idempotent(anchor = arg(event))]
async fn deliver(idem: &Idempotency, event: u64, body: &str) -> Result<(), CallError> {
    Ok(())
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1, "");
}

fn main() {}
