//! The clients, through a network that fails, to servers whose downstream fails too: whatever
//! happens, each operation happened once, and its client ended with its answer.
//!
//! Each run prints its seed; `IDEM_SEED=… cargo test -p examples --test clients` repeats its
//! faults. (What the machine does meanwhile, no seed repeats.)

#![cfg(test)]

mod common;
#[path = "clients/leash.rs"]
mod leash;

use std::{env, fmt::Debug, iter, sync::Arc, time::Duration};

use common::{Server, failing, proxy::Network, send, sqlite};
use examples::clients::{
    Answer, Draft, Intent, Nora, NoraError, Patience, Pirate, PirateError, PortfolioError,
    Portfolios, Ramp, Signed, Skadi, SkadiError, Wish, Write,
};
use examples::wallet::{Enrolment, Wallet, Withdrawal};
use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use reqwest::Client;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

/// So many operations at once in each run.
const OPERATIONS: usize = 40;

/// So many runs of each client, unless a seed is asked for.
const RUNS: usize = 2;

/// No run takes longer, or something hangs.
const BOUND: Duration = Duration::from_secs(90);

/// Enough for all faults, however they add up.
const PATIENCE: Patience =
    Patience { first: Duration::from_millis(20), longest: Duration::from_secs(2), attempts: 60 };

fn seeds() -> Vec<u64> {
    match env::var("IDEM_SEED") {
        Ok(seed) => vec![seed.parse().expect("IDEM_SEED is a number")],
        Err(_) => iter::repeat_with(rand::random).take(RUNS).collect(),
    }
}

/// Runs something for each seed, all at once.
async fn for_each_seed(run: impl AsyncFn(u64)) {
    let seeds = seeds();
    let runs = seeds.iter().map(|seed| {
        println!("IDEM_SEED={seed}");
        timeout(BOUND, run(*seed))
    });
    assert!(join_all(runs).await.iter().all(Result::is_ok), "a run hangs");
}

/// Connections for clients that wait less than the slowest answers take.
fn hasty() -> Client {
    let limit = Duration::from_millis(600);
    Client::builder().no_proxy().timeout(limit).build().expect("a client")
}

/// A server, and the network before it.
struct World {
    seed: u64,
    server: Server,
    network: Arc<Network>,
    _directory: Option<TempDir>,
}

impl World {
    /// Over each of the stores, half of the times.
    fn new(program: &str, switches: &[&str], seed: u64) -> Self {
        let directory = seed.is_multiple_of(2).then(|| TempDir::new().expect("a directory"));
        let store = directory.as_ref().map_or("memory".to_owned(), |it| sqlite(it.path()));
        let server = Server::start(program, &[&["--store", &store], switches].concat());
        let network = Network::new(&server.url, seed);
        Self { seed, server, network, _directory: directory }
    }

    /// Runs each operation in a lane of its own, all at once; and when all is over, each again
    /// without faults, for what must be the same answer. `effects` have happened then, and nothing
    /// else.
    async fn survive<O, F, E>(&self, operations: Vec<O>, run: fn(String, O) -> F, effects: Value)
    where
        O: Clone + Send + 'static,
        F: Future<Output = Result<Vec<Answer>, E>> + Send + 'static,
        E: Debug + Send + 'static,
    {
        let mut lanes = Vec::new();
        let mut running = JoinSet::new();
        for (number, operation) in operations.iter().cloned().enumerate() {
            let lane = self.network.lane(number as u64).await;
            let ending = run(lane.url.clone(), operation);
            running.spawn(async move { (number, ending.await) });
            lanes.push(lane);
        }
        let (failures, mut ended) = tokio::join!(self.trouble(), running.join_all());
        ended.sort_by_key(|(number, _)| *number);
        self.network.calm().await;

        for ((number, ended), operation) in ended.into_iter().zip(operations) {
            let about = format!("operation {number}, IDEM_SEED={}", self.seed);
            let answers = ended.unwrap_or_else(|error| panic!("{about}: {error:?}"));
            let again = run(self.server.url.clone(), operation).await;
            let again = again.unwrap_or_else(|error| panic!("{about}, again: {error:?}"));
            assert_eq!(answers, again, "{about}");
        }
        let happened = send(self.server.get("/_effects")).await.json();
        assert_eq!(happened, effects, "IDEM_SEED={}", self.seed);
        let (requests, tally) = (self.network.requests(), self.network.tally());
        println!("IDEM_SEED={}: {requests} requests, {tally:?}", self.seed);
        println!("and {failures} failures of the downstream");
        let faults: u32 = tally.values().sum();
        assert!(faults as usize >= OPERATIONS, "too easy: {tally:?}");
    }

    /// The downstream fails, before its effects and after them, for a while. How often it did.
    async fn trouble(&self) -> u64 {
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let mut failures = 0;
        for _ in 0..25 {
            let fail = rng.random_range(0..=8);
            let (after_effect, latency) = (rng.random::<bool>(), rng.random_range(0..60));
            let told = json!({ "fail": fail, "after_effect": after_effect, "latency_ms": latency });
            self.server.behave(told).await;
            sleep(Duration::from_millis(rng.random_range(10..80))).await;
            let left = send(self.server.get("/_downstream")).await.json()["fail"].as_u64();
            failures += fail - left.unwrap_or_default();
        }
        self.server.behave(json!({})).await;
        failures
    }
}

/// Every operation is one of so many kinds, and there are equally many of each.
const KINDS: usize = 4;
const OF_A_KIND: usize = OPERATIONS / KINDS;

mod nora {
    use super::*;

    const NORA: &str = env!("CARGO_BIN_EXE_nora");

    fn client(http: Client, url: &str) -> Nora {
        Nora::new(http, url, "acme-sandbox-1", PATIENCE)
    }

    fn id(answer: &Answer) -> String {
        answer.json::<Value>().expect("JSON")["id"].as_str().expect("an id").to_owned()
    }

    #[derive(Clone)]
    enum Operation {
        Submit(Intent),
        /// Submits an intent, and then approves its burn.
        Burn(Intent, String),
        /// Binds a party's wallet.
        Bind(String, String),
        /// Creates a party.
        Party(String),
    }

    async fn run(url: String, operation: Operation) -> Result<Vec<Answer>, NoraError> {
        let client = client(hasty(), &url);
        Ok(match operation {
            Operation::Submit(intent) => vec![client.submit(&intent).await?],
            Operation::Burn(intent, signature) => {
                let created = client.submit(&intent).await?;
                let approved = client.approve_burn(&id(&created), &signature).await?;
                vec![created, approved]
            }
            Operation::Bind(party, wallet) => vec![client.bind_wallet(&party, &wallet).await?],
            Operation::Party(cpf) => match client.create_party(&cpf).await {
                // It has no key: it happens once, but its answer can be lost.
                Ok(_) | Err(NoraError::PartyExists(_)) => Vec::new(),
                Err(error) => return Err(error),
            },
        })
    }

    #[tokio::test]
    async fn survives() {
        for_each_seed(async |seed| {
            let world = World::new(NORA, &[], seed);
            let mut operations = Vec::new();
            for n in 0..OF_A_KIND {
                let amount = format!("{n}.50");
                operations.push(Operation::Submit(Intent::new(Ramp::On, &*amount)));
                operations.push(Operation::Burn(Intent::new(Ramp::Off, amount), format!("5ig{n}")));
                let created = client(world.server.client.clone(), &world.server.url)
                    .create_party(&format!("1-{n}"))
                    .await;
                let party = id(&created.expect("a party"));
                operations.push(Operation::Bind(party, format!("wallet {n}")));
                operations.push(Operation::Party(format!("2-{n}")));
            }
            let effects = json!({
                "onramp_intents": OF_A_KIND, "offramp_intents": OF_A_KIND, "burns": OF_A_KIND,
                "parties": 2 * OF_A_KIND, "wallet_bindings": OF_A_KIND,
            });
            world.survive(operations, run, effects).await;
        })
        .await;
    }

    #[tokio::test]
    async fn gives_up_at_once_on_what_stays_refused() {
        let world = World::new(NORA, &[], 1);
        let lane = world.network.honest().await;
        let client = client(world.server.client.clone(), &lane.url);
        let wrong = Intent::new(Ramp::On, "a lot");
        assert!(matches!(client.submit(&wrong).await, Err(NoraError::Refused(_))));
        let created = client.submit(&Intent::new(Ramp::Off, "20.00")).await.unwrap();
        let id = id(&created);
        world.server.behave(failing(1, 422)).await;
        let refused = client.approve_burn(&id, "expired").await;
        assert!(matches!(refused, Err(NoraError::BurnRefused(_))), "{refused:?}");
        client.approve_burn(&id, "fresh").await.unwrap();
        let second = client.approve_burn(&id, "another").await;
        assert!(matches!(second, Err(NoraError::OtherSignature(_))), "{second:?}");
        client.create_party("1").await.unwrap();
        assert!(matches!(client.create_party("1").await, Err(NoraError::PartyExists(_))));
        // Not one of them was sent twice.
        assert_eq!(world.network.requests(), 7);
    }
}

mod pirate {
    use super::*;

    const PIRATE: &str = env!("CARGO_BIN_EXE_pirate");

    fn client(http: Client, url: &str) -> Pirate {
        Pirate::new(http, url, "blackbeard", PATIENCE)
    }

    async fn run(url: String, write: Write) -> Result<Vec<Answer>, PirateError> {
        Ok(vec![client(hasty(), &url).send(&write).await?])
    }

    #[tokio::test]
    async fn survives() {
        for_each_seed(async |seed| {
            let world = World::new(PIRATE, &[], seed);
            let mut writes = Vec::new();
            for n in 0..OF_A_KIND {
                let name = format!("Doubloon {n}");
                let pool = Write::new(
                    "/v2/pools",
                    &json!({ "name": name, "external_uid": n.to_string() }),
                );
                let made = client(world.server.client.clone(), &world.server.url)
                    .send(&pool)
                    .await
                    .expect("a pool");
                let pool = made.json::<Value>().expect("JSON")["address"].clone();
                let path = format!("/v2/pools/{}/fee-claims", pool.as_str().expect("an address"));
                let claim = json!({ "kind": "dbc", "payer": "WALLET_PUBKEY", "mode": "unsigned" });
                writes.push(Write::new(path, &claim));
                writes.push(Write::new("/v2/tokens", &json!({ "name": name, "symbol": "DBL" })));
                let airdrop = json!({ "mint": n.to_string(), "authority": "WALLET_PUBKEY" });
                writes.push(Write::new("/v2/airdrops", &airdrop));
                // The same bytes, and yet another transaction each time.
                writes.push(Write::new("/v2/transactions", &json!({ "transaction": "AQAB" })));
            }
            let effects = json!({
                "pools": OF_A_KIND, "fee_claims": OF_A_KIND, "tokens": OF_A_KIND,
                "airdrops": OF_A_KIND, "broadcasts": OF_A_KIND,
            });
            world.survive(writes, run, effects).await;
        })
        .await;
    }

    #[tokio::test]
    async fn gives_up_at_once_on_what_stays_refused() {
        let world = World::new(PIRATE, &[], 1);
        let lane = world.network.honest().await;
        let client = client(world.server.client.clone(), &lane.url);
        let pool = Write::new("/v2/pools", &json!({ "name": "Doubloon" }));
        let answer = client.send(&pool).await.unwrap();
        assert_eq!(client.send(&pool).await.unwrap(), answer);
        let other = pool.with_body(&json!({ "name": "Florin" }));
        assert!(matches!(client.send(&other).await, Err(PirateError::Conflict(_))));
        let wrong = Write::new("/v2/pools", &json!({}));
        assert!(matches!(client.send(&wrong).await, Err(PirateError::Refused(_))));
        // Not one of them was sent twice.
        assert_eq!(world.network.requests(), 4);
    }
}

mod portfolio {
    use super::*;

    const PORTFOLIO: &str = env!("CARGO_BIN_EXE_portfolio");
    const USER: &str = "0x70997970c51812dc3a010c7d01b50e0d17dc79c8";
    const PAYEE: &str = "0x00000000000000000000000000000000000000aa";

    fn client(http: Client, url: &str) -> Portfolios {
        Portfolios::new(http, url, "acme-1", PATIENCE)
    }

    /// The owner of the first portfolios, and another user.
    fn wallets() -> (Wallet, Wallet) {
        let mut wallets = Wallet::demo();
        (wallets.next().expect("an owner"), wallets.next().expect("a user"))
    }

    #[derive(Clone)]
    enum Operation {
        Enrol(Wish),
        Withdraw(Wish),
        Start,
    }

    async fn run(url: String, operation: Operation) -> Result<Vec<Answer>, PortfolioError> {
        let (client, (owner, user)) = (client(hasty(), &url), wallets());
        Ok(vec![match operation {
            Operation::Enrol(wish) => {
                let message = client.begin(&wish).await?;
                let signature = user.sign(&message).expect("a signature");
                client.submit(&Signed::enrolment(&message, &signature)).await?
            }
            Operation::Withdraw(wish) => {
                let message = client.begin(&wish).await?;
                let signature = owner.sign(&message).expect("a signature");
                client.submit(&Signed::withdrawal(&message, &signature)).await?
            }
            Operation::Start => client.start("acme-2").await?,
        }])
    }

    async fn strategy(world: &World) -> String {
        let made = client(world.server.client.clone(), &world.server.url)
            .create_strategy("Bold")
            .await
            .expect("a strategy");
        made.json::<Value>().expect("JSON")["id"].as_str().expect("an id").to_owned()
    }

    #[tokio::test]
    async fn survives() {
        for_each_seed(async |seed| {
            let world = World::new(PORTFOLIO, &[], seed);
            let mut operations = Vec::new();
            for _ in 0..OF_A_KIND {
                operations.push(Operation::Enrol(Wish::enrolment(USER, &strategy(&world).await)));
                for portfolio in ["acme-1", "acme-2"] {
                    operations.push(Operation::Withdraw(Wish::withdrawal(portfolio, PAYEE, 2_500)));
                }
                operations.push(Operation::Start);
            }
            let effects = json!({
                "strategies": OF_A_KIND, "agent_slots": OF_A_KIND, "enrolments": OF_A_KIND,
                "transfers": 2 * OF_A_KIND, "confirmations": 2 * OF_A_KIND,
                "verifications": 3 * OF_A_KIND, "starts": 1,
            });
            world.survive(operations, run, effects).await;
        })
        .await;
    }

    #[tokio::test]
    async fn gives_up_at_once_on_what_stays_refused() {
        // Ten minutes are three seconds.
        let world = World::new(PORTFOLIO, &["--time-scale", "200"], 1);
        let lane = world.network.honest().await;
        let (client, (owner, user)) = (client(world.server.client.clone(), &lane.url), wallets());

        let again = Wish::enrolment(USER, "steady");
        for wish in [Wish::enrolment(USER, "steady"), again] {
            let message: Enrolment = client.begin(&wish).await.unwrap();
            let signed = Signed::enrolment(&message, &user.sign(&message).unwrap());
            let forged = Signed::enrolment(&message, &owner.sign(&message).unwrap());
            match client.submit(&signed).await {
                Ok(answer) => {
                    assert_eq!(client.submit(&signed).await.unwrap(), answer);
                    let other = client.submit(&forged).await;
                    assert!(matches!(other, Err(PortfolioError::OtherBody(_))), "{other:?}");
                }
                second => {
                    let enrolled = matches!(second, Err(PortfolioError::AlreadyEnrolled(_)));
                    assert!(enrolled, "{second:?}");
                }
            }
        }

        let theirs = Wish::withdrawal("globex-1", PAYEE, 2_500);
        let refused = client.begin::<Withdrawal>(&theirs).await;
        assert!(matches!(refused, Err(PortfolioError::NotAllowed(_))), "{refused:?}");
        let wish = Wish::withdrawal("acme-1", PAYEE, 2_500);
        let message: Withdrawal = client.begin(&wish).await.unwrap();
        let wrong = client.submit(&Signed::withdrawal(&message, "0x00")).await;
        assert!(matches!(wrong, Err(PortfolioError::Refused(_))), "{wrong:?}");
        sleep(Duration::from_millis(3_200)).await;
        let signed = Signed::withdrawal(&message, &owner.sign(&message).unwrap());
        let late = client.submit(&signed).await;
        assert!(matches!(late, Err(PortfolioError::NonceExpired(_))), "{late:?}");
        // Not one of them was sent twice; nor is a strategy, which has no key.
        assert_eq!(world.network.requests(), 10);
        drop(world);
        let lost = client.create_strategy("Bold").await;
        assert!(matches!(lost, Err(PortfolioError::Unsettled(_))), "{lost:?}");
    }
}

mod skadi {
    use super::*;

    const SKADI: &str = env!("CARGO_BIN_EXE_skadi");
    const SUBMIT: &str = "/create-submission";

    /// The budget fills up fast enough for a test, and slowly enough for some to be refused.
    const SWITCHES: [&str; 2] = ["--time-scale", "100"];

    fn client(http: Client, url: &str) -> Skadi {
        Skadi::new(http, url, "harbor-1", "oak", PATIENCE)
    }

    async fn run(url: String, draft: Draft) -> Result<Vec<Answer>, SkadiError> {
        Ok(vec![client(hasty(), &url).send(&draft).await?])
    }

    async fn quote(world: &World, kind: &str) -> String {
        let quote = Draft::quote(kind, &json!({ "policy": "P-7" }));
        let quoted = client(world.server.client.clone(), &world.server.url)
            .send(&quote)
            .await
            .expect("a quote");
        quoted.json::<Value>().expect("JSON")["id"].as_str().expect("an id").to_owned()
    }

    #[tokio::test]
    async fn survives() {
        for_each_seed(async |seed| {
            let world = World::new(SKADI, &SWITCHES, seed);
            let mut drafts = Vec::new();
            let bound = json!({ "effective": "2027-01-01" });
            for n in 0..OF_A_KIND {
                let id = n.to_string();
                drafts.push(Draft::new(SUBMIT, &id, &json!({ "insured": "Acme" })));
                let premium = json!({ "policy": "P-7", "amount": "9" });
                drafts.push(Draft::new("/process-transaction", &id, &premium));
                for kind in ["renewals", "audits"] {
                    drafts.push(Draft::bind(kind, &quote(&world, kind).await, &bound));
                }
            }
            let effects = json!({
                "submissions": OF_A_KIND, "transactions": OF_A_KIND,
                "renewals": OF_A_KIND, "audits": OF_A_KIND,
            });
            world.survive(drafts, run, effects).await;
        })
        .await;
    }

    #[tokio::test]
    async fn gives_up_at_once_on_what_stays_refused() {
        let world = World::new(SKADI, &[], 1);
        let lane = world.network.honest().await;
        let client = client(world.server.client.clone(), &lane.url);
        let acme = json!({ "insured": "Acme" });
        let answer = client.send(&Draft::new(SUBMIT, "7", &acme)).await.unwrap();
        assert_eq!(client.send(&Draft::new(SUBMIT, "7", &acme)).await.unwrap(), answer);
        let other = client.send(&Draft::new(SUBMIT, "7", &json!({ "insured": "Emca" }))).await;
        assert!(matches!(other, Err(SkadiError::KeyReused(_))), "{other:?}");
        world.server.behave(failing(1, 422)).await;
        let declined = client.send(&Draft::new(SUBMIT, "8", &acme)).await;
        assert!(matches!(declined, Err(SkadiError::Refused(_))), "{declined:?}");
        let forger =
            Skadi::new(world.server.client.clone(), &lane.url, "harbor-1", "ash", PATIENCE);
        let forged = forger.send(&Draft::new(SUBMIT, "9", &acme)).await;
        assert!(matches!(forged, Err(SkadiError::Refused(_))), "{forged:?}");
        // Not one of them was sent twice.
        assert_eq!(world.network.requests(), 5);
    }

    #[tokio::test]
    async fn waits_until_its_budget_allows_another() {
        // Another one each second.
        let world = World::new(SKADI, &["--time-scale", "2"], 1);
        let lane = world.network.honest().await;
        let client = client(world.server.client.clone(), &lane.url);
        let drafts = (0..32).map(|n| {
            let draft = Draft::new(SUBMIT, &n.to_string(), &json!({ "insured": "Acme" }));
            let client = client.clone();
            async move { client.send(&draft).await }
        });
        let answers = join_all(drafts).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert!(world.network.requests() > 32);
        assert_eq!(world.server.effects("submissions").await, 32);
    }
}
