use idem_runtime::{CallError, idempotent};

struct Bank;

// The first reference is the engine, whatever it is called.
#[idempotent(anchor = arg(event))]
async fn deliver(idem: &Bank, event: u64) -> Result<(), CallError> {
    Ok(())
}

fn main() {
    let _ = deliver(&Bank, 1);
}
