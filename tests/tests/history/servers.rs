//! Real servers, stopped, killed, restarted and paused under load, behind connections that are cut.

mod cuts;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use idem_runtime::store::{MySqlStore, PostgresStore, RedisStore, Store, StoreError};
use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::SliceRandom};
use tests::servers::{
    mariadb::MariaDb,
    postgres::Postgres,
    proxy::Proxy,
    redis::{Cluster, Redis},
};
use tokio::{task::spawn_blocking, time::sleep};

use crate::load::{Open, Plan, Site, pause, requests, seed};

/// A server of the test's own.
trait Server: Send + Sync + 'static {
    fn stop(&self);
    fn kill(&self);
    fn restart(&self);
    fn pause(&self);
    fn resume(&self);
}

macro_rules! servers {
    ($($server:ty),*) => {
        $(impl Server for $server {
            fn stop(&self) {
                <$server>::stop(self);
            }

            fn kill(&self) {
                <$server>::kill(self);
            }

            fn restart(&self) {
                <$server>::restart(self);
            }

            fn pause(&self) {
                <$server>::pause(self);
            }

            fn resume(&self) {
                <$server>::resume(self);
            }
        })*
    };
}

servers!(Postgres, MariaDb, Redis);

/// The port that a URL names.
fn port_of(url: &str) -> u16 {
    let after = url.rsplit(':').next().unwrap_or_default();
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a URL with a port")
}

/// Connects as often as it takes: a process may start while its server is down.
fn connecting<S, F>(connect: impl Fn() -> F + Send + Sync + 'static) -> Open
where
    S: Store,
    F: Future<Output = Result<S, StoreError>> + Send + 'static,
{
    let connect = Arc::new(connect);
    Arc::new(move || {
        let connect = Arc::clone(&connect);
        Box::pin(async move {
            loop {
                match connect().await {
                    Ok(store) => return Arc::new(store) as Arc<dyn Store>,
                    Err(error) if error.kind().is_transient() => {
                        sleep(Duration::from_millis(20)).await;
                    }
                    Err(error) => panic!("no store: {error:?}"),
                }
            }
        })
    })
}

#[derive(Clone, Copy, Debug)]
enum Trouble {
    Stop,
    Kill,
    Pause,
    /// Longer than a lease.
    LongPause,
    Cuts,
    /// A process of the application dies.
    Crash,
}

use Trouble::{Crash, Cuts, Kill, LongPause, Pause, Stop};

const LEASE: Duration = Duration::from_secs(1);

/// All troubles, in an order that the seed decides, and time to recover between them.
async fn troubles(server: &Arc<impl Server>, proxy: &Proxy, site: &Site, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut troubles = [Stop, Kill, Kill, Pause, LongPause, Cuts, Crash, Crash];
    troubles.shuffle(&mut rng);
    println!("IDEM_SEED={seed}: {troubles:?}");
    for trouble in troubles {
        pause(&mut rng, 100..600).await;
        match trouble {
            Stop | Kill => {
                let (server, down) = (Arc::clone(server), rng.random_range(0..1_500));
                let going = spawn_blocking(move || {
                    match trouble {
                        Stop => server.stop(),
                        _ => server.kill(),
                    }
                    std::thread::sleep(Duration::from_millis(down));
                    server.restart();
                });
                going.await.expect("a server that comes back");
            }
            Pause | LongPause => {
                server.pause();
                match trouble {
                    LongPause => sleep(LEASE * 3).await,
                    _ => pause(&mut rng, 100..900).await,
                }
                server.resume();
            }
            Cuts => {
                for _ in 0..30 {
                    proxy.cut();
                    pause(&mut rng, 1..80).await;
                }
            }
            Crash => site.crash(rng.random_range(0..2)).await,
        }
    }
    pause(&mut rng, 100..600).await;
}

async fn survives(server: Arc<impl Server>, proxy: Proxy, open: Open, seed: u64) {
    let wanted = requests(1_500);
    let plan = Plan { lease: LEASE, keys_at_once: 24, ..Plan::new(seed, wanted) };
    let site = Site::start(plan, open).await;
    site.serve(troubles(&server, &proxy, &site, seed)).await;
    let summary = site.assert_allowed(true).await;
    assert!(summary.requests >= wanted, "{summary:?}");
    assert!(summary.failed > 10, "nothing failed: {summary:?}");
    assert!(summary.unanswered > 10, "no call was given up: {summary:?}");
    assert!(summary.takeovers > 0, "no lease ended: {summary:?}");
}

/// A run says nothing of statements that carry many calls unless there were some.
fn travelled_together(calls: u64) {
    println!("{calls} calls travelled together");
    assert!(calls > 500, "{calls} calls travelled together");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_is_stopped_killed_paused_and_cut_off_under_load() {
    let server = Arc::new(Postgres::start_own());
    let database = server.database().await;
    let port = port_of(database.url());
    let proxy = Proxy::before(port).await;
    let store = PostgresStore::connect(database.url()).await.expect("a connection");
    store.create_schema().await.expect("tables");
    let url = proxy.in_url(database.url(), port);
    let opened = Arc::new(Mutex::new(Vec::new()));
    let open = connecting({
        let opened = Arc::clone(&opened);
        move || {
            let (url, opened) = (url.clone(), Arc::clone(&opened));
            async move {
                // With one lane, calls travel together as soon as there are two.
                let store = PostgresStore::connect(&url).await?.with_lanes(1);
                opened.lock().expect("a lock").push(store.clone());
                Ok(store)
            }
        }
    });
    survives(server, proxy, open, seed()).await;
    let bundled = opened.lock().expect("a lock").iter().map(|store| store.bundled().calls).sum();
    travelled_together(bundled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mariadb_is_stopped_killed_paused_and_cut_off_under_load() {
    let server = Arc::new(MariaDb::start_own());
    let database = server.database().await;
    let port = port_of(database.url());
    let proxy = Proxy::before(port).await;
    let store = MySqlStore::connect(database.url()).await.expect("a connection");
    store.create_schema().await.expect("tables");
    let url = proxy.in_url(database.url(), port);
    let opened = Arc::new(Mutex::new(Vec::new()));
    let open = connecting({
        let opened = Arc::clone(&opened);
        move || {
            let (url, opened) = (url.clone(), Arc::clone(&opened));
            async move {
                let store = MySqlStore::connect(&url).await?.with_lanes(1);
                opened.lock().expect("a lock").push(store.clone());
                Ok(store)
            }
        }
    });
    survives(server, proxy, open, seed()).await;
    let bundled = opened.lock().expect("a lock").iter().map(|store| store.bundled().calls).sum();
    travelled_together(bundled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_stopped_killed_paused_and_cut_off_under_load() {
    let server = Arc::new(Redis::start_own());
    let port = port_of(server.url());
    let proxy = Proxy::before(port).await;
    let url = proxy.in_url(server.url(), port);
    let open = connecting(move || {
        let url = url.clone();
        async move { RedisStore::connect(url.as_str()).await }
    });
    survives(server, proxy, open, seed()).await;
}

/// Each claim and each answer waits for a replica, so that nothing is lost with a master. Renewals
/// do not wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn masters_of_a_redis_cluster_are_killed_under_load() {
    let cluster = Arc::new(spawn_blocking(Cluster::start_own).await.expect("a cluster"));
    let urls = cluster.urls();
    let open = connecting(move || {
        let urls = urls.clone();
        async move {
            let builder = RedisStore::builder().timeout(Duration::from_millis(800));
            builder.replicas(1, Duration::from_millis(700)).cluster(urls).await
        }
    });
    let (seed, wanted) = (seed(), requests(1_500));
    let plan = Plan { lease: LEASE, keys_at_once: 24, ..Plan::new(seed, wanted) };
    let site = Site::start(plan, open).await;
    let kills = async {
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..2 {
            pause(&mut rng, 300..900).await;
            let (cluster, name) = (Arc::clone(&cluster), rng.random::<u32>().to_string());
            let going = spawn_blocking(move || {
                let master = cluster.master_of(&name);
                master.kill();
                cluster.wait_until_promoted(&name, master);
                // Back as the replica of who took over.
                master.restart();
            });
            going.await.expect("a promotion");
            sleep(LEASE * 2).await;
        }
    };
    site.serve(kills).await;
    let summary = site.assert_allowed(false).await;
    assert!(summary.requests >= wanted, "{summary:?}");
    assert!(summary.failed + summary.unanswered > 10, "nothing failed: {summary:?}");
}
