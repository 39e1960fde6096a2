//! The switches that all examples take.

use std::time::Duration;

use clap::Args;

use crate::StoreChoice;

/// The switches that all examples take.
#[derive(Args, Clone, Debug)]
pub struct Switches {
    /// The port on 127.0.0.1; 0 takes any that is free [default: 3000 for quickstart, 3001 for
    /// nora, 3002 for pirate, 3003 for portfolio, 3004 for skadi, 3005 for leash, 3007 for transfer]
    #[arg(long)]
    pub port: Option<u16>,
    /// Where idem keeps its records: `memory`, `sqlite:PATH`, or (with `--features servers`) the URL
    /// of a server, see `stores.rs` [default: sqlite:quickstart.db for quickstart,
    /// sqlite:transfer.db for transfer, memory for the others]
    #[arg(long, value_name = "STORE")]
    pub store: Option<StoreChoice>,
    /// Divides the documented times by so much, so that their ends can be watched
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub time_scale: u32,
}

impl Switches {
    /// A documented time, as it is to be in this run.
    pub fn scaled(&self, documented: Duration) -> Duration {
        (documented / self.time_scale).max(Duration::from_millis(1))
    }
}
