use idem_runtime::{CallError, Idempotency, idempotent};

struct Consumer {
    idem: Idempotency,
}

impl Consumer {
    // It may finish after the consumer is gone.
    #[idempotent(anchor = arg(event), engine = arg(self.idem), space = "events")]
    async fn deliver(&self, event: u64) -> Result<(), CallError> {
        Ok(())
    }
}

fn main() {
    let _ = |consumer: &Consumer| drop(consumer.deliver(1));
}
