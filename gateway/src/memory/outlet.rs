//! The sending end of a bulk channel that can be waited for without ever giving up a send half-way.
//!
//! A channel's `send` need not survive being dropped before it is done; here the future in flight is kept
//! until it is, so that the source can go on reading (and absorb) meanwhile.

use std::collections::VecDeque;
use std::future::{Future, pending};
use std::pin::Pin;

use bytes::Bytes;
use longhaul_core::units::Rate;

use crate::chunk::{ChunkClosed, ChunkSend};

type Sending<S> = Pin<Box<dyn Future<Output = (S, Result<(), ChunkClosed>)> + Send>>;

/// A channel, the chunks that wait for it, and the send in flight.
pub(super) struct Outlet<S> {
    idle: Option<S>,
    sending: Option<Sending<S>>,
    waiting: VecDeque<Bytes>,
    waiting_bytes: u64,
    /// What the channel had on its way when the send in flight began, with that chunk.
    before_send_bytes: u64,
    /// What its path was believed to carry then.
    carries: Option<Rate>,
}

impl<S: ChunkSend> Outlet<S> {
    pub(super) fn new(channel: S) -> Self {
        Self {
            idle: Some(channel),
            sending: None,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            before_send_bytes: 0,
            carries: None,
        }
    }

    pub(super) fn push(&mut self, chunk: Bytes) {
        self.waiting_bytes += chunk.len() as u64;
        self.waiting.push_back(chunk);
    }

    /// Starts what can be started. With `absorb_below`, chunks are handed over without waiting as long as
    /// fewer bytes than that are on their way.
    pub(super) fn dispatch(&mut self, absorb_below: Option<u64>) -> Result<(), ChunkClosed> {
        while let Some(mut channel) = self.idle.take() {
            let Some(chunk) = self.waiting.pop_front() else {
                self.idle = Some(channel);
                return Ok(());
            };
            self.waiting_bytes -= chunk.len() as u64;
            if absorb_below.is_some_and(|limit| channel.unacknowledged() < limit) {
                channel.absorb(chunk)?;
                self.idle = Some(channel);
                continue;
            }
            self.before_send_bytes = channel.unacknowledged() + chunk.len() as u64;
            self.carries = channel.carries();
            self.sending = Some(Box::pin(async move {
                let sent = channel.send(chunk).await;
                (channel, sent)
            }));
        }
        Ok(())
    }

    /// Waits for the send in flight; for ever when there is none. Cancel-safe.
    pub(super) async fn sent(&mut self) -> Result<(), ChunkClosed> {
        let Some(sending) = self.sending.as_mut() else { return pending().await };
        let (channel, sent) = sending.await;
        self.sending = None;
        self.idle = Some(channel);
        sent
    }

    /// Nothing waits and nothing is being sent.
    pub(super) fn is_drained(&self) -> bool {
        self.waiting.is_empty() && self.sending.is_none()
    }

    /// No chunk waits behind the one that is being sent.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What the path carries, where that is known.
    pub(super) fn carries(&self) -> Option<Rate> {
        self.idle.as_ref().map_or(self.carries, ChunkSend::carries)
    }

    /// Bytes that wait here or, as far as is known, in the channel.
    pub(super) fn backlog_bytes(&self) -> u64 {
        self.waiting_bytes + self.idle.as_ref().map_or(self.before_send_bytes, ChunkSend::unacknowledged)
    }
}
