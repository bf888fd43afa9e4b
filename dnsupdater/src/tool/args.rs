//! The command line, and the library's configuration made of it. Asks no server.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use dnsupdater::{DnsName, Error, Key, Transport, UpdaterConfig};

const EXIT_CODES: &str = "Exit codes: 0 done; 1 lost, or a server is behind; 2 usage, configuration or shape of the \
    name; 3 unreachable, or the outcome is unknown (repeat the same command); 4 refused; 5 the name is changed, its \
    reverse name is not";

/// Changes DNS names atomically (RFC 2136 with prerequisites and TSIG).
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    pub access: Access,
    /// Answer in JSON, one object.
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args)]
pub struct Access {
    /// Name server, ADDRESS or ADDRESS:PORT; the primary first, repeat for the others.
    #[arg(long = "server", global = true, env = "DNSUPDATER_SERVERS", value_delimiter = ',', value_parser = server)]
    pub servers: Vec<SocketAddr>,
    /// Zone that holds the name. Default: the one the primary says holds it.
    #[arg(long, global = true, env = "DNSUPDATER_ZONE")]
    pub zone: Option<DnsName>,
    /// File with the TSIG key, as tsig-keygen writes it (key "NAME" { ... };), or NAME:ALGORITHM:BASE64. Without it:
    /// DNSUPDATER_KEY.
    #[arg(long, visible_alias = "tsig-key-file", global = true, env = "DNSUPDATER_KEY_FILE")]
    pub key_file: Option<PathBuf>,
    /// Where the last swap of each name is kept, for undo, restore-ttl and repeating after a lost answer. Default:
    /// dnsupdater in $XDG_STATE_HOME or ~/.local/state.
    #[arg(long, global = true, env = "DNSUPDATER_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Use UDP, and TCP only for truncated answers.
    #[arg(long, global = true)]
    pub udp: bool,
    /// Seconds one exchange may take.
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub timeout: u64,
    /// How often a failed exchange is repeated.
    #[arg(long, global = true, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=20))]
    pub retries: u32,
    /// Seconds the clocks may differ.
    #[arg(long, global = true, default_value_t = 300, value_parser = clap::value_parser!(u16).range(1..))]
    pub fudge: u16,
    /// Accept unsigned answers to reads, for servers that sign answers to updates only.
    #[arg(long, global = true)]
    pub unsigned_reads: bool,
    /// Port of the zone's own name servers when they are verified.
    #[arg(long, global = true, default_value_t = 53)]
    pub ns_port: u16,
}

#[derive(Subcommand)]
pub enum Command {
    /// Show a name: addresses, time to live, ownership record.
    Read {
        /// The name.
        name: DnsName,
    },
    /// Prove that a swap would work, changing nothing.
    Preflight {
        /// The name.
        name: DnsName,
        /// Addresses it will get, to rehearse their record types.
        #[arg(long = "to", value_delimiter = ',')]
        to: Vec<IpAddr>,
    },
    /// Give a name these addresses, whatever it has now; create it if it has none.
    Set {
        /// The name.
        name: DnsName,
        /// Its addresses.
        #[arg(required = true)]
        addresses: Vec<IpAddr>,
        /// Time to live in seconds.
        #[arg(long, default_value_t = 300)]
        ttl: u32,
        /// Owner to record. Default: the present one, else nobody (-).
        #[arg(long)]
        owner: Option<String>,
        #[command(flatten)]
        after: After,
    },
    /// Change a name only if it is as you say; lose otherwise.
    Swap {
        /// The name.
        name: DnsName,
        /// Addresses it must have, all of them.
        #[arg(long, required = true, value_delimiter = ',')]
        from: Vec<IpAddr>,
        /// Addresses it gets.
        #[arg(long, required = true, value_delimiter = ',')]
        to: Vec<IpAddr>,
        /// Time to live in seconds.
        #[arg(long, default_value_t = 30)]
        ttl: u32,
        /// Owner to record. Default: the present one, else nobody (-).
        #[arg(long)]
        owner: Option<String>,
        /// Epoch it must have. Default: the present one.
        #[arg(long)]
        epoch: Option<u64>,
        #[command(flatten)]
        after: After,
    },
    /// Take back the last swap or set of a name: addresses, reverse names, time to live.
    Undo {
        /// The name.
        name: DnsName,
        /// Then wait up to this many seconds until every name server of the zone has it.
        #[arg(long, value_name = "SECONDS")]
        verify: Option<u64>,
        #[command(flatten)]
        reverse: ReverseAccess,
    },
    /// Lower a name's time to live before a swap, and remember what it was.
    LowerTtl {
        /// The name.
        name: DnsName,
        /// Time to live in seconds.
        #[arg(long, default_value_t = 30)]
        ttl: u32,
    },
    /// Set a name's time to live back after a swap.
    RestoreTtl {
        /// The name.
        name: DnsName,
        /// Time to live in seconds. Default: what it was before lower-ttl or swap.
        #[arg(long)]
        ttl: Option<u32>,
    },
    /// Ask every server whether it answers these addresses, from a zone as new as the primary's.
    Verify {
        /// The name.
        name: DnsName,
        /// Addresses it should have, all of them.
        #[arg(long, required = true, value_delimiter = ',')]
        expect: Vec<IpAddr>,
        /// Ask the zone's own name servers too.
        #[arg(long)]
        all: bool,
        /// Seconds to wait until all have caught up.
        #[arg(long, default_value_t = 0)]
        wait: u64,
    },
}

/// What follows a change.
#[derive(Args)]
pub struct After {
    /// Let the reverse names follow: each new address gets this name, each old one loses it. Updates of their own, after
    /// the name's; not atomic with it.
    #[arg(long)]
    pub ptr: bool,
    /// Then wait up to this many seconds until every name server of the zone has it.
    #[arg(long, value_name = "SECONDS")]
    pub verify: Option<u64>,
    #[command(flatten)]
    pub reverse: ReverseAccess,
}

/// Where reverse zones are. The fields' names are the arguments' and must differ from the global ones.
#[derive(Args)]
pub struct ReverseAccess {
    /// Reverse zone, repeat for several. Default: the one the primary says holds the reverse name.
    #[arg(long = "ptr-zone", value_name = "ZONE")]
    pub ptr_zones: Vec<DnsName>,
    /// Primary of the reverse zones, if it is another one.
    #[arg(long = "ptr-server", value_name = "SERVER", value_parser = server)]
    pub ptr_server: Option<SocketAddr>,
    /// File with the TSIG key for the reverse zones, if it is another one.
    #[arg(long = "ptr-key-file", value_name = "KEY_FILE")]
    pub ptr_key_file: Option<PathBuf>,
}

impl Command {
    /// The name it is about.
    pub fn name(&self) -> &DnsName {
        match self {
            Self::Read { name }
            | Self::Preflight { name, .. }
            | Self::Set { name, .. }
            | Self::Swap { name, .. }
            | Self::Undo { name, .. }
            | Self::LowerTtl { name, .. }
            | Self::RestoreTtl { name, .. }
            | Self::Verify { name, .. } => name,
        }
    }
}

impl Access {
    /// The configuration for `zone`.
    pub fn config(&self, zone: DnsName) -> Result<UpdaterConfig, Error> {
        let missing = || Error::Config("The key (--key-file) is missing: see dnsupdater --help".to_owned());
        let key = match &self.key_file {
            Some(path) => Key::from_file(path)?,
            None => std::env::var("DNSUPDATER_KEY").map_err(|_| missing())?.parse()?,
        };
        Ok(UpdaterConfig {
            transport: if self.udp { Transport::Udp } else { Transport::Tcp },
            timeout: Duration::from_secs(self.timeout),
            retries: self.retries,
            fudge_s: self.fudge,
            signed_reads: !self.unsigned_reads,
            ns_port: self.ns_port,
            ..UpdaterConfig::new(self.servers.clone(), zone, key)
        })
    }
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "expected ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT".to_owned())
}
