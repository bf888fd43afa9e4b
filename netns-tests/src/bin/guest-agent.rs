//! The service that runs inside the laboratory's guest; see [`netns_tests::agent`].

use clap::Parser;
use netns_tests::agent::{AgentOptions, agent_main};

fn main() -> anyhow::Result<()> {
    agent_main(AgentOptions::parse())
}
