//! A connection that is cut in the middle of a claim and of a completion, at one byte after the
//! other, in both directions.

use std::time::Duration;

use idem_runtime::store::{MySqlStore, PostgresStore, RedisStore};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tests::servers::{
    mariadb::MariaDb,
    postgres::Postgres,
    proxy::{Proxy, Way},
    redis::Redis,
};

use super::{connecting, port_of};
use crate::load::{Open, Plan, Site, seed};

/// How many cuts there are in each direction.
const CUTS: usize = 60;
/// How many requests there are before anything is cut.
const WARM: usize = 40;

/// Cuts the only connection in use within a request, at so many places each way.
async fn cut_everywhere(proxy: Proxy, open: Open) {
    let seed = seed();
    let plan = Plan { lease: Duration::from_secs(30), over_http: false, ..Plan::new(seed, 0) };
    let site = Site::start(plan, open).await;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut passed = [usize::MAX; 2];
    // The first ones connect, and prepare what is prepared.
    for number in 0..WARM {
        let before = [Way::There, Way::Back].map(|way| proxy.passed(way));
        site.succeed(&format!("well-{number}")).await;
        let now = [Way::There, Way::Back].map(|way| proxy.passed(way) - before[way as usize]);
        passed = [0, 1].map(|way| passed[way].min(now[way]));
    }
    println!("IDEM_SEED={seed}: a request is {} bytes there and {} back", passed[0], passed[1]);
    for way in [Way::There, Way::Back] {
        let mut cut = 0;
        for number in 0..CUTS {
            let all = passed[way as usize];
            let place = (number * all / CUTS + rng.random_range(0..all / CUTS + 1)).min(all - 1);
            // A connection that is whole and has prepared what it needs.
            for again in 0..2 {
                site.succeed(&format!("well-{way:?}-{number}-{again}")).await;
            }
            proxy.cut_after(place, way);
            let key = format!("well-cut-{way:?}-{number}");
            site.succeed(&key).await;
            cut += usize::from(!proxy.mend());
            assert_eq!(site.effects(&key), 1, "IDEM_SEED={seed}: cut {way:?} after {place} bytes");
        }
        assert!(cut > CUTS * 9 / 10, "only {cut} cuts {way:?}");
    }
    let summary = site.assert_allowed(true).await;
    assert_eq!(summary.takeovers, 0, "nobody was its own duplicate: {summary:?}");
    assert_eq!(summary.effects, WARM + 6 * CUTS, "{summary:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_and_a_completion_survive_cuts_on_postgres() {
    let database = Postgres::shared().database().await;
    let port = port_of(database.url());
    let proxy = Proxy::before(port).await;
    let store = PostgresStore::connect(database.url()).await.expect("a connection");
    store.create_schema().await.expect("tables");
    let url = proxy.in_url(database.url(), port);
    let open = connecting(move || {
        let url = url.clone();
        async move { PostgresStore::connect(&url).await }
    });
    cut_everywhere(proxy, open).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_and_a_completion_survive_cuts_on_mariadb() {
    let database = MariaDb::shared().database().await;
    let port = port_of(database.url());
    let proxy = Proxy::before(port).await;
    let store = MySqlStore::connect(database.url()).await.expect("a connection");
    store.create_schema().await.expect("tables");
    let url = proxy.in_url(database.url(), port);
    let open = connecting(move || {
        let url = url.clone();
        async move { MySqlStore::connect(&url).await }
    });
    cut_everywhere(proxy, open).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_and_a_completion_survive_cuts_on_redis() {
    let url = Redis::shared().url();
    let port = port_of(url);
    let proxy = Proxy::before(port).await;
    let url = proxy.in_url(url, port);
    let prefix = format!("cuts-{:016x}:", rand::random::<u64>());
    let open = connecting(move || {
        let (url, prefix) = (url.clone(), prefix.clone());
        async move { RedisStore::builder().prefix(prefix).connect(url.as_str()).await }
    });
    cut_everywhere(proxy, open).await;
}
