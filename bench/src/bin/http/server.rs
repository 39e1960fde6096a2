//! A contender's server: a process of its own, pinned to a core, with one worker.

use std::{
    io::{BufRead as _, BufReader, Error, Read as _, Result},
    process::{Child, ChildStdin, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use axum::{Router, routing::get};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::{net::TcpListener, sync::Notify};

use crate::contenders::CONTENDERS;

/// The core that servers run on.
pub(crate) const SERVER_CORE: usize = 0;
/// The core that the load comes from.
pub(crate) const LOAD_CORE: usize = 1;

/// How often a handler was executed, and how many are held at the moment.
static EXECUTED: AtomicU64 = AtomicU64::new(0);
static HELD: AtomicU64 = AtomicU64::new(0);
static RELEASED: Notify = Notify::const_new();

/// Counts an execution, and numbers it.
pub(crate) fn execute() -> u64 {
    EXECUTED.fetch_add(1, Ordering::Relaxed)
}

/// Waits until somebody asks for `/release`.
pub(crate) async fn hold() {
    HELD.fetch_add(1, Ordering::Relaxed);
    RELEASED.notified().await;
    HELD.fetch_sub(1, Ordering::Relaxed);
}

/// Keeps this thread, and those that it will start, on one core, where there are several.
pub(crate) fn pin(core: usize) -> Result<()> {
    if thread::available_parallelism()?.get() <= core {
        return Ok(());
    }
    let mut cores = CpuSet::new();
    cores.set(core);
    Ok(sched_setaffinity(None, &cores)?)
}

/// Serves until its parent is gone; prints its port.
pub(crate) fn serve(name: &str, place: String) -> Result<()> {
    let contender = CONTENDERS.iter().find(|contender| contender.name == name);
    let contender = contender.ok_or_else(|| Error::other(format!("no contender {name}")))?;
    pin(SERVER_CORE)?;
    thread::spawn(|| {
        let _ended = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let serving = tokio::spawn(async move {
            let control = Router::new()
                .route("/executed", get(|| async { EXECUTED.load(Ordering::SeqCst).to_string() }))
                .route("/held", get(|| async { HELD.load(Ordering::SeqCst).to_string() }))
                .route("/release", get(|| async { RELEASED.notify_one() }));
            let app = (contender.app)(place).await.merge(control);
            let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
            println!("{}", listener.local_addr()?.port());
            axum::serve(listener, app).await
        });
        serving.await?
    })
}

/// The process of a contender's server. It ends with this value.
pub(crate) struct Process {
    child: Child,
    /// While it is open, the server runs.
    lifeline: Option<ChildStdin>,
    pub(crate) port: u16,
}

impl Process {
    pub(crate) fn start(name: &str, place: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", name, place])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lifeline = child.stdin.take();
        let mut port = String::new();
        if let Some(said) = child.stdout.take() {
            BufReader::new(said).read_line(&mut port)?;
        }
        let port = port.trim().parse();
        let port = port.map_err(|_| Error::other(format!("{name}: its server does not start")))?;
        Ok(Self { child, lifeline, port })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _ = self.child.wait();
    }
}
