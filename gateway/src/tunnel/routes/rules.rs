//! Policy rules, and the place of the kernel's own among them.
//!
//! The kernel looks up what is its own before anything else: its rule for the table `local` stands first, with priority
//! 0. A visitor's packets to its home must not be caught there where this host has the address that somebody at the
//! visitor's home has. A rule of ours with priority 0 therefore goes before that one: the kernel puts a rule behind
//! those of its priority (`fib_nl_newrule` in net/core/fib_rules.c), so that its own is added once more, behind ours,
//! and then taken away from the front. At no moment is there none. What rules there are is not decided here.

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Error, IpVersion};

use super::{Netlink, errno, gone_is_fine};
use crate::tunnel::error::TunnelError;

/// The table of the host's own addresses.
const RT_TABLE_LOCAL: u8 = 255;
const LOCAL_TABLE: u32 = RT_TABLE_LOCAL as u32;

/// A policy rule of ours: packets from `input` that carry `mark` look up `table`; any, where one is not given.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::tunnel) struct PolicyRule {
    pub v6: bool,
    /// With 0 it comes before the host's own addresses.
    pub priority: u32,
    pub input: Option<String>,
    pub mark: Option<u32>,
    pub table: u32,
}

impl Netlink {
    /// Adds a policy rule.
    pub(in crate::tunnel) async fn add_rule(&self, rule: &PolicyRule) -> Result<(), TunnelError> {
        self.add_missing_rule(rule).await.map(drop)
    }

    /// The same; says whether it was not there, or not in its place.
    pub(in crate::tunnel) async fn add_missing_rule(&self, rule: &PolicyRule) -> Result<bool, TunnelError> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = self.rule(rule);
        let added = match request.execute().await {
            Ok(()) => true,
            Err(error) if errno(&error) == Some(libc::EEXIST) => false,
            Err(error) => return Err(TunnelError::netlink(format!("add {rule}"))(error)),
        };
        let moved = rule.priority == 0 && self.put_before_own_addresses(rule.v6).await?;
        Ok(added || moved)
    }

    /// Removes a policy rule.
    pub(in crate::tunnel) async fn delete_rule(&self, rule: &PolicyRule) -> Result<(), TunnelError> {
        let deleted = self.handle.rule().del(self.rule(rule)).execute().await;
        gone_is_fine(deleted).map_err(TunnelError::netlink(format!("delete {rule}")))
    }

    pub(super) async fn sweep_rules(&self) -> Result<(), TunnelError> {
        for v6 in [false, true] {
            let ours = RuleAttribute::Protocol(RouteProtocol::from(self.protocol));
            for rule in self.rules(v6).await? {
                if rule.attributes.contains(&ours) {
                    gone_is_fine(self.handle.rule().del(rule).execute().await)
                        .map_err(TunnelError::netlink("delete a policy rule"))?;
                }
            }
        }
        Ok(())
    }

    /// Our rules with priority 0 come before the one for the host's own addresses, and those of others that stand behind
    /// that one stay there; says whether one of ours did not. A host that has it elsewhere (one with VRFs) has it behind.
    async fn put_before_own_addresses(&self, v6: bool) -> Result<bool, TunnelError> {
        let first: Vec<RuleMessage> = self.rules(v6).await?.into_iter().filter(is_first).collect();
        let ours = RuleAttribute::Protocol(RouteProtocol::from(self.protocol));
        let is_ours = |rule: &RuleMessage| rule.attributes.contains(&ours);
        let Some(own) = first.iter().position(is_own) else { return Ok(false) };
        if !first[own..].iter().any(is_ours) {
            return Ok(false);
        }
        for rule in first[own..].iter().filter(|rule| !is_ours(rule)) {
            let mut rule = rule.clone();
            rule.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Priority(_)));
            // The kernel does not say a priority of 0, and would choose one.
            rule.attributes.push(RuleAttribute::Priority(0));
            let mut again = self.handle.rule().add().replace();
            *again.message_mut() = rule.clone();
            let failed = "put the host's own addresses behind visitors' rules";
            again.execute().await.map_err(TunnelError::netlink(failed))?;
            // The first that is so is taken.
            let deleted = self.handle.rule().del(rule).execute().await;
            gone_is_fine(deleted).map_err(TunnelError::netlink(failed))?;
        }
        Ok(true)
    }

    async fn rules(&self, v6: bool) -> Result<Vec<RuleMessage>, TunnelError> {
        let version = if v6 { IpVersion::V6 } else { IpVersion::V4 };
        let listed: Result<Vec<RuleMessage>, Error> =
            self.handle.rule().get(version).execute().try_collect().await;
        listed.map_err(TunnelError::netlink("list the policy rules"))
    }

    fn rule(&self, rule: &PolicyRule) -> RuleMessage {
        let mut message = to_table(rule.v6, rule.table);
        message.attributes.extend(rule.input.clone().map(RuleAttribute::Iifname));
        message.attributes.extend(rule.mark.map(RuleAttribute::FwMark));
        message.attributes.extend([
            RuleAttribute::Priority(rule.priority),
            RuleAttribute::Protocol(RouteProtocol::from(self.protocol)),
        ]);
        message
    }
}

impl std::fmt::Display for PolicyRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { v6, priority, input, mark, table } = self;
        write!(f, "{} policy rule {priority}", if *v6 { "IPv6" } else { "IPv4" })?;
        if let Some(input) = input {
            write!(f, " from {input}")?;
        }
        if let Some(mark) = mark {
            write!(f, " with mark {mark:#x}")?;
        }
        write!(f, " to table {table}")
    }
}

fn to_table(v6: bool, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::Table(table)];
    message
}

fn is_first(rule: &RuleMessage) -> bool {
    !rule
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, RuleAttribute::Priority(priority) if *priority != 0))
}

/// Whether it is that one: for everybody, without a condition.
fn is_own(rule: &RuleMessage) -> bool {
    let unconditional = |attribute: &RuleAttribute| {
        matches!(
            attribute,
            RuleAttribute::Table(_)
                | RuleAttribute::Priority(_)
                | RuleAttribute::Protocol(_)
                | RuleAttribute::SuppressPrefixLen(_)
                | RuleAttribute::SuppressIfGroup(_)
        )
    };
    let header = &rule.header;
    let to_own =
        rule.attributes.contains(&RuleAttribute::Table(LOCAL_TABLE)) || header.table == RT_TABLE_LOCAL;
    to_own
        && (header.src_len, header.dst_len, header.tos) == (0, 0, 0)
        && !header.flags.contains(RuleFlags::Invert)
        && rule.attributes.iter().all(unconditional)
}
