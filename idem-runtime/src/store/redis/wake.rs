//! Messages between processes, over one channel of the servers' own publishing.

use futures_util::{StreamExt as _, future::BoxFuture, stream::BoxStream};

use super::{
    NAME, RedisStore, Shared,
    connection::{command, within},
};
use crate::store::{Signal, StoreError, StoreErrorKind, Wake};

impl Shared {
    fn channel(&self) -> String {
        format!("{}wake", self.prefix)
    }
}

impl Wake for RedisStore {
    fn tell(&self, signal: Signal) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            // Whichever node of a cluster it is sent to passes it on to all others.
            let mut publish = command("PUBLISH");
            publish.arg(self.0.channel()).arg(signal.encode());
            within(self.0.patience, self.0.connection.send(&publish)).await.map(drop)
        })
    }

    fn listen(&self) -> BoxFuture<'_, Result<BoxStream<'static, Signal>, StoreError>> {
        Box::pin(async move {
            let mut unheard = StoreError::new(NAME, StoreErrorKind::Unreachable);
            for server in &self.0.listeners {
                let subscribed = async {
                    let mut messages = server.get_async_pubsub().await?;
                    messages.subscribe(self.0.channel()).await?;
                    Ok(messages.into_on_message())
                };
                match within(self.0.patience, subscribed).await {
                    Ok(messages) => {
                        return Ok(messages
                            .filter_map(async |message| {
                                Signal::decode(
                                    std::str::from_utf8(message.get_payload_bytes()).ok()?,
                                )
                            })
                            .boxed());
                    }
                    Err(error) => unheard = error,
                }
            }
            Err(unheard)
        })
    }
}
