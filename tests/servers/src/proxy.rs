//! A connection that is cut: a TCP proxy between an application and its server.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the application to the server.
    There,
    /// From the server to the application.
    Back,
}

/// A proxy on a free port of loopback. All its connections end with it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    line: Arc<Line>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Line {
    /// Counts the cuts of everything.
    cuts: watch::Sender<u64>,
    passed: [AtomicUsize; 2],
    fuse: Mutex<Option<(Way, usize)>>,
}

impl Proxy {
    /// A proxy before the server at this port of loopback.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (cuts, passed, fuse) = (watch::Sender::new(0), Default::default(), Mutex::default());
        let line = Arc::new(Line { cuts, passed, fuse });
        let at = Arc::clone(&line);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(Arc::clone(&at).carry(client, port));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, line, accepting }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The URL of a server, by way of this proxy.
    pub fn in_url(&self, url: &str, port: u16) -> String {
        url.replace(&format!(":{port}"), &format!(":{}", self.port()))
    }

    /// Cuts all connections now.
    pub fn cut(&self) {
        self.line.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts the connection over which so many more bytes have gone this way, counted from now over
    /// all connections. No byte after them arrives.
    pub fn cut_after(&self, bytes: usize, way: Way) {
        *self.line.fuse() = Some((way, bytes));
    }

    /// Whether [`cut_after`](Self::cut_after) still waits for its bytes; it does so no longer.
    pub fn mend(&self) -> bool {
        self.line.fuse().take().is_some()
    }

    /// How many bytes have gone this way.
    pub fn passed(&self, way: Way) -> usize {
        self.line.passed[way as usize].load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Line {
    /// Carries bytes both ways until the connection ends or is cut.
    async fn carry(self: Arc<Self>, client: TcpStream, port: u16) {
        let mut cuts = self.cuts.subscribe();
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return };
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::select! {
            () = self.pump(from_client, to_server, Way::There) => {}
            () = self.pump(from_server, to_client, Way::Back) => {}
            _ = cuts.changed() => {}
        }
    }

    async fn pump(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        way: Way,
    ) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let passes = self.burn(read, way);
            self.passed[way as usize].fetch_add(passes, Ordering::SeqCst);
            if to.write_all(&buffer[..passes]).await.is_err() || passes < read {
                return;
            }
        }
    }

    /// How many of these bytes pass.
    fn burn(&self, bytes: usize, way: Way) -> usize {
        let mut fuse = self.fuse();
        match &mut *fuse {
            Some((this, left)) if *this == way => match left.checked_sub(bytes) {
                Some(rest) => {
                    *left = rest;
                    bytes
                }
                None => fuse.take().map_or(bytes, |(_, left)| left),
            },
            _ => bytes,
        }
    }

    fn fuse(&self) -> std::sync::MutexGuard<'_, Option<(Way, usize)>> {
        self.fuse.lock().expect("no panic under this lock")
    }
}
