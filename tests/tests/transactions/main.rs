//! Transactional handlers: effects and record are committed together, or neither is.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod bank;
mod kills;
mod promises;

use std::{sync::Arc, time::Duration};

use idem_runtime::store::{SqliteStore, Store};
use sqlx::{
    Sqlite, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions},
};
use tempfile::TempDir;

use crate::bank::Base;

#[derive(Clone, Debug)]
struct File {
    pool: SqlitePool,
    directory: Arc<TempDir>,
}

impl File {
    async fn connect(directory: Arc<TempDir>, connections: u32) -> Self {
        let options = SqliteConnectOptions::new()
            .filename(directory.path().join("bank.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(5));
        let pool = SqlitePoolOptions::new().max_connections(connections).connect_with(options);
        Self { pool: pool.await.expect("a database"), directory }
    }
}

impl Base for File {
    const SEVERAL_WRITERS: bool = false;

    async fn open(connections: u32) -> Self {
        let directory = Arc::new(tempfile::tempdir().expect("a directory"));
        let file = Self::connect(directory, connections).await;
        SqliteStore::create_tables(&file.pool).await.expect("tables");
        file
    }

    fn url(&self) -> String {
        format!("sqlite://{}", self.directory.path().join("bank.db").display())
    }

    async fn beside(&self) -> Self {
        Self::connect(Arc::clone(&self.directory), 5).await
    }

    async fn store(&self) -> impl Store {
        SqliteStore::from_pool(self.pool.clone()).await.expect("a store")
    }

    statements!(Sqlite, SqliteConnection);
}

on!(File);
