use std::sync::Arc;

use idem_runtime::{CallError, Idempotency, idempotent};

struct Consumer {
    idem: Idempotency,
}

impl Consumer {
    // Another type in this module may have a method of this name.
    #[idempotent(anchor = arg(event), engine = arg(self.idem))]
    async fn deliver(self: Arc<Self>, event: u64) -> Result<(), CallError> {
        Ok(())
    }
}

fn main() {
    let _ = |consumer: Arc<Consumer>| drop(consumer.deliver(1));
}
