//! MariaDB.

use std::{
    fs,
    path::Path,
    sync::{Arc, OnceLock},
    thread,
};

use sqlx::{ConnectOptions as _, Connection as _, MySqlConnection, mysql::MySqlConnectOptions};

use crate::{Goodbye, Process, free_port, program, words};

/// Names a MariaDB or MySQL server to use instead of one that the tests start; its user must be
/// allowed to create databases.
const URL: &str = "IDEM_TEST_MYSQL_URL";

/// Makes the system tables, unless they are there, and becomes the server.
///
/// Without a flush at each commit: that protects what was written when the machine crashes, and not
/// when the server does.
const RUN: &str = r#"
install=$1 server=$2 directory=$3 port=$4
shift 4
[ -e "$directory/data/installed" ] || {
    "$install" --no-defaults --datadir="$directory/data" --tmpdir="$directory" --skip-test-db \
        --auth-root-authentication-method=normal &&
        touch "$directory/data/installed"
} || exit
exec "$server" --no-defaults --datadir="$directory/data" --tmpdir="$directory" \
    --socket="$directory/socket" --pid-file="$directory/pid" --bind-address=127.0.0.1 \
    --port="$port" --skip-name-resolve --max-connections=600 --innodb-buffer-pool-size=64M \
    --innodb-flush-log-at-trx-commit=2 $*
"#;

/// A MariaDB server.
#[derive(Debug)]
pub struct MariaDb {
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
    options: MySqlConnectOptions,
    /// Where and under which name to drop it; `None` if the whole server goes away.
    drop: Option<(String, String)>,
}

impl MariaDb {
    /// The server that all tests of this binary share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<MariaDb> = OnceLock::new();
        SHARED.get_or_init(|| match std::env::var(URL) {
            Ok(url) => Self { url, process: None },
            Err(_) => Self::start_own(),
        })
    }

    /// A server of the test's own, to stop, pause and kill.
    pub fn start_own() -> Self {
        Self::start_own_with("")
    }

    /// A server of the test's own with settings of its own, as in `--log-bin --server-id=1`.
    pub fn start_own_with(settings: &str) -> Self {
        let install = program("mariadb-install-db", &[]);
        let server = program("mariadbd", &["/usr/sbin".into()]);
        // A port that was free may be taken before the server has it.
        for _ in 0..3 {
            let port = free_port().to_string();
            let process = Process::start("mariadb", "mysql", |directory| {
                words([
                    &"sh", &"-c", &RUN, &"mariadb", &install, &server, &directory, &port, &settings,
                ])
            });
            let mariadb =
                Self { url: format!("mysql://root@127.0.0.1:{port}"), process: Some(process) };
            if mariadb.is_ready() {
                return mariadb;
            }
            eprintln!("MariaDB ended as it started: {}", mariadb.process().log());
        }
        panic!("MariaDB does not start");
    }

    /// An empty database on this server.
    pub async fn database(&self) -> Database {
        let name = format!("idem_test_{:016x}", rand::random::<u64>());
        let mut connection = MySqlConnection::connect(&self.url).await.expect("a connection");
        let create = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
        sqlx::raw_sql(create).execute(&mut connection).await.expect("a database");
        let options: MySqlConnectOptions = self.url.parse().expect("a URL");
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

    /// Kills the server (`SIGKILL`).
    pub fn kill(&self) {
        self.process().kill();
    }

    /// Stops time for the server (`SIGSTOP`): connections stay open, and nobody answers.
    pub fn pause(&self) {
        self.process().pause();
    }

    /// Lets time go on.
    pub fn resume(&self) {
        self.process().resume();
    }

    /// Shuts the server down without waiting for its clients to go.
    pub fn stop(&self) {
        self.process().stop(Goodbye::Terminate);
    }

    /// Starts the server again after [`stop`](Self::stop) or [`kill`](Self::kill), with the same
    /// data and at the same address.
    pub fn restart(&self) {
        self.process().start_again();
        assert!(self.is_ready(), "MariaDB does not start again: {}", self.process().log());
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
        let file = process.directory().join("pid");
        let pid = process.pid().to_string();
        process.wait_until(|| {
            // The file of a server that was killed is still there.
            fs::read_to_string(&file).unwrap_or_default().trim() == pid
        })
    }
}

impl Database {
    /// The URL of the database.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// How to connect to it.
    pub fn options(&self) -> MySqlConnectOptions {
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
                let mut connection = MySqlConnection::connect(&server).await?;
                let drop = format!("DROP DATABASE {name}");
                sqlx::raw_sql(sqlx::AssertSqlSafe(drop)).execute(&mut connection).await
            })
        });
        if let Ok(Err(error)) = dropping.join() {
            eprintln!("a database of the tests is left on {URL}: {error}");
        }
    }
}
