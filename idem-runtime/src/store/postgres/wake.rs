//! Messages between processes, by LISTEN and NOTIFY.

use std::time::Duration;

use futures_util::{StreamExt as _, future::BoxFuture, stream, stream::BoxStream};
use sqlx::{
    Executor as _,
    postgres::{PgListener, PgPoolOptions},
};
use tokio::time::timeout;

use super::{
    PostgresStore, TIMEOUT,
    calls::{Call, Fault, Session},
    failure,
};
use crate::store::{Signal, StoreError, Wake};

/// The channel; a database has its own.
const CHANNEL: &str = "idem";
/// After so long a silence the connection is tried: a network that has gone away says nothing.
const SILENCE: Duration = Duration::from_secs(30);

impl Call for Signal {
    type Answer = ();

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<()>, Fault> {
        let query =
            sqlx::query("SELECT 1 FROM pg_notify($1, $2)").bind(CHANNEL).bind(self.encode());
        session.row(query).await?;
        Ok(Some(()))
    }
}

impl Wake for PostgresStore {
    fn tell(&self, signal: Signal) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.ask(&signal).await })
    }

    /// On a connection of its own, beside those of the pool.
    fn listen(&self) -> BoxFuture<'_, Result<BoxStream<'static, Signal>, StoreError>> {
        Box::pin(async move {
            let options = self.0.pool.connect_options().as_ref().clone();
            let pool = PgPoolOptions::new()
                .max_connections(1)
                .acquire_timeout(TIMEOUT)
                .max_lifetime(None)
                .idle_timeout(None)
                .connect_lazy_with(options);
            let mut listener = PgListener::connect_with(&pool).await.map_err(failure)?;
            // Whoever listens does so again when the stream has ended.
            listener.eager_reconnect(false);
            listener.listen(CHANNEL).await.map_err(failure)?;
            let heard = stream::unfold(listener, |mut listener| async {
                let message = next(&mut listener).await?;
                Some((message, listener))
            });
            Ok(heard.filter_map(|message| async move { Signal::decode(&message) }).boxed())
        })
    }
}

/// The next message; `None` when the connection is lost.
async fn next(listener: &mut PgListener) -> Option<String> {
    loop {
        match timeout(SILENCE, listener.try_recv()).await {
            Ok(Ok(Some(notification))) => return Some(notification.payload().to_owned()),
            Ok(Ok(None) | Err(_)) => return None,
            Err(_) => {
                timeout(TIMEOUT, listener.execute("SELECT 1")).await.ok()?.ok()?;
            }
        }
    }
}
