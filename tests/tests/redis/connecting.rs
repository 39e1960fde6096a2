//! Servers that will do and servers that will not, by which connection.

use std::time::Instant;

use futures_util::{StreamExt as _, future::join_all};
use idem_runtime::{
    OperationId,
    store::{Claimed, RedisStore, Signal, Store, StoreErrorKind, Written},
};
use redis::{Client, cluster::ClusterClient};
use tests::servers::redis::{Cluster, Redis};

use super::{PATIENCE, answer_of, any_claim, claim_on, own, until_answered};

#[tokio::test]
async fn servers_that_drop_records_are_refused_unless_that_is_known() {
    let server = Redis::start_own_with("--maxmemory-policy allkeys-lru");
    let refused = RedisStore::connect(server.url()).await.expect_err("it drops records");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
    let reason = std::error::Error::source(&refused).expect("a reason").to_string();
    assert!(reason.contains("`allkeys-lru`") && reason.contains("`allow_eviction`"), "{reason}");
    let known = RedisStore::builder().allow_eviction().connect(server.url()).await;
    known.expect("it is known");

    // Who may not ask cannot tell.
    let rules =
        ["ACL", "SETUSER", "idem", "on", ">secret", "~*", "&*", "+@all", "-info", "-config"];
    server.ask::<()>(&rules).expect("a user");
    let url = server.url().replace("redis://", "redis://idem:secret@");
    let refused = RedisStore::connect(url.as_str()).await.expect_err("it does not say");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
    let reason = std::error::Error::source(&refused).expect("a reason").to_string();
    assert!(reason.contains("`INFO`") && reason.contains("`allow_eviction`"), "{reason}");
    let known = RedisStore::builder().allow_eviction().connect(url.as_str()).await;
    let store = known.expect("it is known");
    assert!(matches!(store.claim(&any_claim()).await, Ok(Claimed::Granted(_))));

    let url = server.url().replace("redis://", "redis://idem:wrong@");
    let refused = RedisStore::connect(url.as_str()).await.expect_err("a wrong password");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);

    let node = Cluster::shared().urls().remove(0);
    let refused = RedisStore::connect(node.as_str()).await.expect_err("it is one of several");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
    let reason = std::error::Error::source(&refused).expect("a reason").to_string();
    assert!(reason.contains("RedisStore::cluster"), "{reason}");
}

#[tokio::test]
async fn a_user_of_its_own_needs_few_permissions() {
    let permitted = "~idem:* &idem:* +eval +evalsha +time +pexpiretime +pttl +get +getrange +set +del \
                     +scan +publish +subscribe +ping +info";
    let (single, cluster) = (Redis::start_own(), Cluster::shared());
    for nodes in [std::slice::from_ref(&single), cluster.nodes()] {
        let is_cluster = nodes.len() > 1;
        let more = if is_cluster { " +cluster +exists +wait" } else { "" };
        let rules: Vec<_> = permitted.split_whitespace().chain(more.split_whitespace()).collect();
        for node in nodes {
            let user = ["ACL", "SETUSER", "idem", "reset", "on", ">secret"];
            node.ask::<()>(&[&user[..], &rules].concat()).expect("a user");
        }
        let urls = nodes.iter().map(|node| node.url().replace("//", "//idem:secret@"));
        let urls: Vec<_> = urls.collect();
        let store = if is_cluster {
            RedisStore::builder().replicas(1, PATIENCE).cluster(urls).await
        } else {
            RedisStore::connect(urls[0].as_str()).await
        };
        let store = store.expect("a connection");
        let claim = any_claim();
        assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))));
        assert_eq!(store.complete(&answer_of(&claim, b"")).await.expect("it"), Written::Done);
        let manage = store.manage().expect("a search");
        let found = until_answered(async || manage.find(&claim.operation_id).await).await;
        assert_eq!(found.expect("a record").key, claim.key);
        assert!(manage.find(&OperationId::random()).await.expect("a search").is_none());
        store.sweep(10).await.expect("a sweep");
        let wake = store.wake().expect("messages");
        let mut heard = wake.listen().await.expect("a channel");
        wake.tell(Signal::Ended(claim.key)).await.expect("an answer");
        let message = tokio::time::timeout(PATIENCE, heard.next()).await;
        assert_eq!(message.expect("a message in time"), Some(Signal::Ended(claim.key)));
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_to_be() {
    let start = Instant::now();
    let url = format!("redis://127.0.0.1:{}/", servers::free_port());
    let unreached = RedisStore::connect(url.as_str()).await.expect_err("nobody listens");
    assert_eq!(unreached.kind(), StoreErrorKind::Unreachable);
    let unreached = RedisStore::cluster([url.as_str()]).await.expect_err("nobody listens");
    assert_eq!(unreached.kind(), StoreErrorKind::Unreachable);
    assert!(start.elapsed() < PATIENCE);
    let refused = RedisStore::connect("http://127.0.0.1/").await.expect_err("no URL of Redis");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
}

#[tokio::test]
async fn connections_of_the_application_will_do() {
    let server = Redis::shared();
    let client = Client::open(server.url()).expect("a URL");
    let manager = client.get_connection_manager().await.expect("a connection");
    let (builder, prefix) = own();
    let store = builder.over(manager.clone()).await.expect("a server that will do");
    assert!(store.wake().is_none(), "nobody said where to listen");
    let claim = any_claim();
    assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))));
    let builder = RedisStore::builder().prefix(&prefix).listen_at(client);
    let store = builder.over(manager).await.expect("a server that will do");
    assert!(store.wake().is_some());
    assert!(matches!(store.claim(&claim_on(claim.key)).await, Ok(Claimed::Found(_))));

    let client = ClusterClient::new(Cluster::shared().urls()).expect("URLs");
    let connection = client.get_async_connection().await.expect("a connection");
    let store = own().0.over_cluster(connection).await.expect("a cluster that will do");
    let claims: Vec<_> = (0..50).map(|_| any_claim()).collect();
    let granted = join_all(claims.iter().map(|claim| store.claim(claim))).await;
    assert!(granted.iter().all(|granted| matches!(granted, Ok(Claimed::Granted(_)))));
}

#[tokio::test]
async fn databases_are_separate() {
    let server = Redis::shared();
    let claim = any_claim();
    for database in [0, 3] {
        let url = format!("{}{database}", server.url());
        let store = RedisStore::connect(url.as_str()).await.expect("a connection");
        assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))), "{database}");
    }
}
