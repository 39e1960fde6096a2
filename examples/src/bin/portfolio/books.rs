//! What there is: strategies and portfolios.

use std::collections::HashMap;

use alloy_primitives::{Address, address};
use axum::http::StatusCode;
use examples::wallet::Enrolment;
use serde::Serialize;

use crate::{callers::Caller, errors::Error};

/// What there is.
pub(crate) struct Books {
    pub(crate) strategies: Vec<Strategy>,
    pub(crate) portfolios: HashMap<String, Portfolio>,
}

impl Books {
    /// What there is at the start: a strategy for each tenant, and some portfolios of the first
    /// wallet.
    pub(crate) fn new() -> Self {
        let strategy =
            |tenant| Strategy { id: "steady".to_owned(), name: "Steady".to_owned(), tenant };
        let portfolio = |(id, tenant): (&str, _)| Portfolio {
            id: id.to_owned(),
            user: FIRST_USER,
            strategy_id: if id.ends_with('1') { "steady".to_owned() } else { id.to_owned() },
            agent: Address::ZERO,
            account_index: u32::from(id.ends_with('2')),
            running: false,
            tenant,
        };
        let first = [("acme-1", "acme"), ("acme-2", "acme"), ("globex-1", "globex")].map(portfolio);
        Self {
            strategies: ["acme", "globex"].map(strategy).into(),
            portfolios: first.map(|portfolio| (portfolio.id.clone(), portfolio)).into(),
        }
    }

    pub(crate) fn own_strategy(&self, caller: Caller, id: &str) -> Result<(), Error> {
        let own = |known: &Strategy| known.tenant == caller.tenant && known.id == id;
        match self.strategies.iter().any(own) {
            true => Ok(()),
            false => {
                Err(Error::new(StatusCode::NOT_FOUND, "not_found", "there is no such strategy"))
            }
        }
    }

    /// The account that the user's next portfolio gets.
    pub(crate) fn next_account(&self, caller: Caller, user: Address) -> u32 {
        let own = |known: &&Portfolio| known.tenant == caller.tenant && known.user == user;
        let used = self.portfolios.values().filter(own).map(|known| known.account_index + 1);
        used.max().unwrap_or_default()
    }

    /// Whether the user has a portfolio in the strategy that another flow made than this one.
    pub(crate) fn is_enrolled(&self, caller: Caller, message: &Enrolment, id: &str) -> bool {
        self.portfolios.values().any(|known| {
            known.tenant == caller.tenant
                && known.user == message.user
                && known.strategy_id == message.strategyId
                && known.id != id
        })
    }

    /// Makes the portfolio, unless an earlier attempt of the same operation has.
    pub(crate) fn enroll(
        &mut self,
        caller: Caller,
        id: String,
        agent: Address,
        message: Enrolment,
    ) -> Portfolio {
        let Enrolment { strategyId: strategy_id, user, .. } = message;
        let (account_index, tenant) = (self.next_account(caller, user), caller.tenant);
        let made = self.portfolios.entry(id.clone()).or_insert(Portfolio {
            id,
            user,
            strategy_id,
            agent,
            account_index,
            running: false,
            tenant,
        });
        made.clone()
    }
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Portfolio {
    pub(crate) id: String,
    pub(crate) user: Address,
    pub(crate) strategy_id: String,
    pub(crate) agent: Address,
    pub(crate) account_index: u32,
    pub(crate) running: bool,
    #[serde(skip)]
    pub(crate) tenant: &'static str,
}

#[derive(Clone, Serialize)]
pub(crate) struct Strategy {
    pub(crate) id: String,
    pub(crate) name: String,
    #[serde(skip)]
    pub(crate) tenant: &'static str,
}

/// The user of the first portfolios: the first wallet.
pub(crate) const FIRST_USER: Address = address!("f39fd6e51aad88f6f4ce6ab8827279cfffb92266");
