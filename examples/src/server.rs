//! A server that stops without losing anything.

use std::{
    future::{Future, IntoFuture},
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use axum::Router;
use idem_runtime::Idempotency;
use tokio::net::TcpListener;

/// How long a stopping server waits for its connections, and then for handlers whose clients hung
/// up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server on 127.0.0.1, not yet serving.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Takes a port of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// When the port is taken.
    pub async fn bind(port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.map_err(|error| {
            let hint = "`--port 0` takes any port that is free";
            io::Error::new(error.kind(), format!("127.0.0.1:{port}: {error}; {hint}"))
        })?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Serves until `stop`; then takes no more connections, lets those finish that there are, and
    /// waits for the handlers whose clients hung up.
    ///
    /// What is not finished in time ends as in a crash: its key is free again after the lease.
    ///
    /// # Errors
    ///
    /// When the listener fails.
    pub async fn run(
        self,
        app: Router,
        engine: &Idempotency,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = axum::serve(self.listener, app).with_graceful_shutdown(async move {
            stop.await;
            drop(stopping);
        });
        tokio::select! {
            served = serving.into_future() => served?,
            () = async {
                let _ = stopped.await;
                tokio::time::sleep(PATIENCE).await;
            } => eprintln!("some connections would not end"),
        }
        if !engine.drain(PATIENCE).await {
            eprintln!("{} handlers or records were not finished", engine.detached());
        }
        Ok(())
    }
}

/// Ends when the process is asked to: by Ctrl-C, or by SIGTERM.
pub async fn asked_to_stop() {
    #[cfg(unix)]
    let terminate = async {
        use tokio::signal::unix::{SignalKind, signal};
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        Ok(()) = tokio::signal::ctrl_c() => {}
        () = terminate => {}
    }
}
