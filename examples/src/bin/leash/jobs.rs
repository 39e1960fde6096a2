//! What goes on after an answer: asking the chain what became of a transaction, and telling
//! webhooks. All that is to be done is in the books, so a restart goes on where a crash ended it.

use std::time::Duration;

use reqwest::{
    Client,
    header::{CONTENT_TYPE, HeaderName},
    redirect,
};
use tokio::task::JoinSet;

use crate::{
    App,
    books::{Awaited, Delivery},
};

/// The header with a delivery's signature.
pub(crate) const SIGNATURE: HeaderName = HeaderName::from_static("x-leash-signature");

/// How soon after its submission a transaction is final, and how soon the chain is asked again
/// when it does not answer.
pub(crate) const FINAL_AFTER: Duration = Duration::from_secs(10);

/// How soon a delivery is repeated the first time, and at the latest.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// So many deliveries are under way at once, and a receiver may take so long for one.
const AT_ONCE: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(5);

/// How often the books are asked what is to be done.
const TICK: Duration = Duration::from_millis(50);

/// Confirms what was submitted, for ever.
pub(crate) async fn confirm(app: App) {
    loop {
        match app.books.awaited(app.switches.scaled(FINAL_AFTER)).await {
            Ok(awaited) => {
                let mut asked: JoinSet<_> =
                    awaited.into_iter().map(|it| settle(app.clone(), it)).collect();
                while asked.join_next().await.is_some() {}
            }
            Err(error) => eprintln!("the books: {error}"),
        }
        tokio::time::sleep(TICK).await;
    }
}

/// Asks once. Until the books say how it ended, the chain will be asked again.
async fn settle(app: App, Awaited { id, signature }: Awaited) {
    let ended = match app.chain.call("confirmations", &signature).await {
        Ok(()) => app.books.settle(id, None).await,
        Err(failure) if failure.is_refusal() => {
            app.books.settle(id, Some("the chain dropped this transaction")).await
        }
        // Nobody knows.
        Err(_) => Ok(()),
    };
    if let Err(error) = ended {
        eprintln!("the books: {error}");
    }
}

/// What deliveries are sent with. They go where they were subscribed for, and nowhere else.
pub(crate) fn client() -> Result<Client, reqwest::Error> {
    Client::builder().no_proxy().redirect(redirect::Policy::none()).timeout(TIMEOUT).build()
}

/// Delivers what is to be told, for ever; each until its receiver has said that it has it.
pub(crate) async fn deliver(app: App, http: Client) {
    let mut under_way = JoinSet::new();
    let (first, longest) = (app.switches.scaled(FIRST), app.switches.scaled(LONGEST));
    loop {
        while under_way.try_join_next().is_some() {}
        match app.books.due(AT_ONCE - under_way.len(), first, longest).await {
            Ok(due) => due.into_iter().for_each(|delivery| {
                under_way.spawn(attempt(app.clone(), http.clone(), delivery));
            }),
            Err(error) => eprintln!("the books: {error}"),
        }
        tokio::time::sleep(TICK).await;
    }
}

/// One attempt. Until the books say that it is delivered, there will be another.
async fn attempt(app: App, http: Client, delivery: Delivery) {
    let signature = examples::webhooks::sign(&delivery.secret, delivery.body.as_bytes());
    let request = http.post(&delivery.url).header(SIGNATURE, signature);
    let request = request.header(CONTENT_TYPE, "application/json").body(delivery.body.clone());
    let taken = request.send().await.is_ok_and(|response| response.status().is_success());
    if taken && let Err(error) = app.books.delivered(delivery).await {
        eprintln!("the books: {error}");
    }
}
