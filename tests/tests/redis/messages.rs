//! Messages between processes.

use std::time::Duration;

use futures_util::StreamExt as _;
use idem_runtime::{
    Key,
    store::{RedisStore, Signal, Store},
};
use redis::Client;
use tests::servers::redis::{Cluster, Redis};

use super::{PATIENCE, own, until_answered};

#[tokio::test]
async fn messages_reach_every_process() {
    let single = Redis::shared().url();
    let cluster = Cluster::shared().urls();
    for is_cluster in [false, true] {
        let (_, prefix) = own();
        let connect = async || {
            let builder = RedisStore::builder().prefix(&prefix);
            let store = match is_cluster {
                false => builder.connect(single).await,
                // Each handle listens at another node.
                true => {
                    let mut urls = cluster.clone();
                    urls.rotate_left(rand::random_range(0..cluster.len()));
                    builder.cluster(urls).await
                }
            };
            store.expect("a connection")
        };
        let (here, there, stranger) = (connect().await, connect().await, own().0);
        let stranger = stranger.listen_at(Client::open(single).expect("a URL"));
        let stranger = match is_cluster {
            false => stranger.connect(single).await,
            true => stranger.cluster(cluster.clone()).await,
        };
        let stranger = stranger.expect("a connection");
        let wake = |store: &RedisStore| store.wake().is_some();
        assert!(wake(&here) && wake(&stranger));
        let mut heard = Vec::new();
        for store in [&here, &there] {
            heard.push(store.wake().expect("messages").listen().await.expect("a channel"));
        }
        let mut elsewhere = stranger.wake().expect("messages").listen().await.expect("a channel");
        let key = Key::from_bytes(rand::random());
        for signal in [Signal::Awaited(key), Signal::Ended(key)] {
            there.wake().expect("messages").tell(signal).await.expect("an answer");
            for heard in &mut heard {
                let message = tokio::time::timeout(PATIENCE, heard.next()).await;
                assert_eq!(message.expect("a message in time"), Some(signal));
            }
        }
        let other = tokio::time::timeout(Duration::from_millis(100), elsewhere.next()).await;
        assert!(other.is_err(), "another prefix is another channel");
    }
}

#[tokio::test]
async fn a_listener_hears_of_a_lost_connection() {
    let server = Redis::start_own();
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let mut heard = store.wake().expect("messages").listen().await.expect("a channel");
    server.kill();
    let end = tokio::time::timeout(PATIENCE, heard.next()).await;
    assert_eq!(end.expect("an end in time"), None);
    assert!(store.wake().expect("messages").listen().await.is_err());
    server.restart();
    until_answered(async || store.wake().expect("messages").listen().await.map(drop)).await;
}
