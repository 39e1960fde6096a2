//! A proxy that loses a COMMIT, or the answer to one.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// What becomes of the next COMMIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fate {
    /// It arrives, and so does its answer.
    Answered,
    /// It is lost, with its connection.
    Lost,
    /// It is carried out, and its answer is lost, with its connection.
    Unanswered,
}

/// Stands between a client and its server.
#[derive(Clone, Debug)]
pub struct Proxy {
    port: u16,
    next: Arc<AtomicU8>,
}

impl Proxy {
    /// Starts before a server on a port of loopback.
    pub async fn start(server: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let proxy = Self { port, next: Arc::new(AtomicU8::new(Fate::Answered as u8)) };
        let shared = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let proxy = shared.clone();
                tokio::spawn(async move { proxy.pass(client, server).await });
            }
        });
        proxy
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Says what becomes of the next COMMIT.
    pub fn next_commit(&self, fate: Fate) {
        self.next.store(fate as u8, Ordering::SeqCst);
    }

    /// Whether a COMMIT has met its fate.
    pub fn has_struck(&self) -> bool {
        self.next.load(Ordering::SeqCst) == Fate::Answered as u8
    }

    fn strike(&self) -> Fate {
        match self.next.swap(Fate::Answered as u8, Ordering::SeqCst) {
            1 => Fate::Lost,
            2 => Fate::Unanswered,
            _ => Fate::Answered,
        }
    }

    /// Passes on what comes, until the connection is lost: then both halves are.
    async fn pass(&self, mut client: TcpStream, server: u16) -> io::Result<()> {
        let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
        let (mut asked, mut answered) = (vec![0; 65536], vec![0; 65536]);
        loop {
            tokio::select! {
                read = client.read(&mut asked) => {
                    let asked = &asked[..read?];
                    let commits = asked.windows(6).any(|word| word == b"COMMIT");
                    let fate = if commits { self.strike() } else { Fate::Answered };
                    if asked.is_empty() || fate == Fate::Lost {
                        return Ok(());
                    }
                    server.write_all(asked).await?;
                    if fate == Fate::Unanswered {
                        let _unseen = server.read(&mut answered).await?;
                        return Ok(());
                    }
                }
                read = server.read(&mut answered) => {
                    let answered = &answered[..read?];
                    if answered.is_empty() {
                        return Ok(());
                    }
                    client.write_all(answered).await?;
                }
            }
        }
    }
}
