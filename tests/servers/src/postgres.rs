//! PostgreSQL.

use std::{
    cmp::Reverse,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    thread,
};

use sqlx::{ConnectOptions as _, Connection as _, PgConnection, postgres::PgConnectOptions};

use crate::{Goodbye, Process, free_port, program, words};

/// Names a server to use instead of one that the tests start; its user must be allowed to create
/// databases.
const URL: &str = "IDEM_TEST_POSTGRES_URL";

/// Makes the cluster, unless it is there, and becomes the server.
///
/// Without `fsync`: that protects what was written when the machine crashes, and not when the
/// server does.
const RUN: &str = r#"
bin=$1 data=$2 port=$3
shift 3
[ -e "$data/PG_VERSION" ] ||
    "$bin/initdb" -D "$data" -U postgres --auth=trust --encoding=UTF8 --locale=C --no-sync || exit
exec "$bin/postgres" -D "$data" -p "$port" -c listen_addresses=127.0.0.1 \
    -c unix_socket_directories= -c max_connections=300 -c shared_buffers=64MB \
    -c dynamic_shared_memory_type=mmap -c fsync=off -c full_page_writes=off $*
"#;

/// A PostgreSQL server.
#[derive(Debug)]
pub struct Postgres {
    url: String,
    /// Unless the server is somebody else's.
    process: Option<Process>,
}

/// An empty database of its own. It is dropped with this value.
#[derive(Clone, Debug)]
pub struct Database(Arc<Dropped>);

#[derive(Debug)]
struct Dropped {
    url: String,
    options: PgConnectOptions,
    /// Where and under which name to drop it; `None` if the whole server goes away.
    drop: Option<(String, String)>,
}

impl Postgres {
    /// The server that all tests of this binary share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(|| match std::env::var(URL) {
            Ok(url) => Self { url, process: None },
            Err(_) => Self::start_own(),
        })
    }

    /// A server of the test's own, to stop, pause and kill.
    pub fn start_own() -> Self {
        Self::start_own_with("")
    }

    /// A server of the test's own with settings of its own, as in `-c fsync=on -c work_mem=1MB`.
    pub fn start_own_with(settings: &str) -> Self {
        let bin = bin();
        // A port that was free may be taken before the server has it.
        for _ in 0..3 {
            let port = free_port().to_string();
            let process = Process::start("postgres", "postgres", |directory| {
                let data = directory.join("data");
                words([&"sh", &"-c", &RUN, &"postgres", &bin, &data, &port, &settings])
            });
            let postgres = Self {
                url: format!("postgres://postgres@127.0.0.1:{port}/postgres"),
                process: Some(process),
            };
            if postgres.is_ready() {
                return postgres;
            }
            eprintln!("PostgreSQL ended as it started: {}", postgres.process().log());
        }
        panic!("PostgreSQL does not start");
    }

    /// An empty database on this server.
    pub async fn database(&self) -> Database {
        let name = format!("idem_test_{:016x}", rand::random::<u64>());
        let mut connection = PgConnection::connect(&self.url).await.expect("a connection");
        let create = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
        sqlx::raw_sql(create).execute(&mut connection).await.expect("a database");
        let options: PgConnectOptions = self.url.parse().expect("a URL");
        let options = options.database(&name);
        let url = options.to_url_lossy().to_string();
        let drop = self.process.is_none().then(|| (self.url.clone(), name));
        Database(Arc::new(Dropped { url, options, drop }))
    }

    /// The URL of the server itself, for whoever asks about it.
    pub fn maintenance_url(&self) -> &str {
        &self.url
    }

    /// Where the server keeps what it has. It goes away with the server.
    pub fn directory(&self) -> &Path {
        self.process().directory()
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// Kills the server with all its connections (`SIGKILL`).
    pub fn kill(&self) {
        self.process().kill();
    }

    /// Stops time for the server with all its connections (`SIGSTOP`).
    pub fn pause(&self) {
        self.process().pause();
    }

    /// Lets time go on.
    pub fn resume(&self) {
        self.process().resume();
    }

    /// Shuts the server down without waiting for its clients to go.
    pub fn stop(&self) {
        self.process().stop(Goodbye::Interrupt);
    }

    /// Starts the server again after [`stop`](Self::stop) or [`kill`](Self::kill), with the same
    /// data and at the same address.
    pub fn restart(&self) {
        self.process().start_again();
        assert!(self.is_ready(), "PostgreSQL does not start again: {}", self.process().log());
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        self.process().log()
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("a server of the tests' own")
    }

    /// Waits until it takes connections; `false` if it ended instead.
    fn is_ready(&self) -> bool {
        let process = self.process();
        let file = process.directory().join("data/postmaster.pid");
        let pid = process.pid().to_string();
        process.wait_until(|| {
            // The file of a server that was killed is still there: its first line is another one's.
            let lines = fs::read_to_string(&file).unwrap_or_default();
            lines.lines().next() == Some(&pid) && lines.trim_end().ends_with("\nready")
        })
    }
}

impl Database {
    /// The URL of the database.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// How to connect to it.
    pub fn options(&self) -> PgConnectOptions {
        self.0.options.clone()
    }
}

impl Drop for Dropped {
    fn drop(&mut self) {
        let Some((server, name)) = self.drop.take() else { return };
        // A thread of its own: a test's runtime cannot be waited for from within.
        let dropping = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut connection = PgConnection::connect(&server).await?;
                let drop = format!("DROP DATABASE {name} WITH (FORCE)");
                sqlx::raw_sql(sqlx::AssertSqlSafe(drop)).execute(&mut connection).await
            })
        });
        if let Ok(Err(error)) = dropping.join() {
            eprintln!("a database of the tests is left on {URL}: {error}");
        }
    }
}

/// Where the newest PostgreSQL's programs are; Debian has them outside of the `PATH`.
fn bin() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut versions: Vec<_> = versions.map(|version| version.path()).collect();
    versions.sort_by_key(|version| {
        let name = version.file_name().and_then(|name| name.to_str());
        Reverse(name.and_then(|name| name.parse::<u32>().ok()))
    });
    let debian: Vec<_> = versions.into_iter().map(|version| version.join("bin")).collect();
    let initdb = program("initdb", &debian);
    initdb.parent().expect("its directory").to_owned()
}
