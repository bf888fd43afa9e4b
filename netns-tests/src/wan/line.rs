//! The thread that carries one direction: reads frames from one TUN device, lets the [`Shaper`] decide, writes them to
//! the other device on time. The thread owns all state; orders and questions reach it as closures and are answered
//! before the asker goes on. Runs with real-time priority where that is allowed, because lateness here is measured delay
//! there.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::frame::{Frame, VNET_HEADER_BYTES};
use super::shaper::Shaper;

/// The most frames read before the due ones are sent.
const MAX_BURST: usize = 64;

/// The shortest sleep between two departures: at 1 Gbit/s it saves most wake-ups, and 40 µs late is 0.04 ms of delay.
const SHORTEST_SLEEP: Duration = Duration::from_micros(40);

/// How long an order may wait in the queue; the thread answers in microseconds.
const ORDERS: usize = 16;

type Order = Box<dyn FnOnce(&mut Shaper) + Send>;

/// A handle to the thread; dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Line {
    orders: Option<SyncSender<Order>>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// Starts carrying from `from` to `to`. Times are counted since `start`.
    pub fn start(name: &str, shaper: Shaper, from: Arc<File>, to: Arc<File>, start: Instant) -> Result<Self> {
        let (orders, receiver) = sync_channel(ORDERS);
        let (wake, woken) = UnixStream::pair().context("Cannot make a socket pair")?;
        woken.set_nonblocking(true)?;
        let carrier = Carrier { shaper, from, to, orders: receiver, woken, start };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || carrier.carry())
            .context("Cannot start a WAN thread")?;
        Ok(Self { orders: Some(orders), wake, thread: Some(thread) })
    }

    /// Has the thread run `question` on its state and waits for the answer.
    pub fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Shaper) -> T + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        let order: Order = Box::new(move |shaper| {
            // The asker waits; a failed send means that it was ended meanwhile.
            let _ = reply.send(question(shaper));
        });
        let ended = "The WAN emulator's thread has ended: its device is gone";
        self.orders.as_ref().context(ended)?.send(order).ok().context(ended)?;
        self.wake_up();
        answer.recv().context(ended)
    }

    fn wake_up(&self) {
        // A full or closed socket means that the thread is awake or gone already.
        let _ = (&self.wake).write(&[0]);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.orders = None;
        self.wake_up();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Carrier {
    shaper: Shaper,
    from: Arc<File>,
    to: Arc<File>,
    orders: Receiver<Order>,
    woken: UnixStream,
    start: Instant,
}

impl Carrier {
    fn carry(mut self) {
        raise_priority();
        let mut buffer = vec![0u8; VNET_HEADER_BYTES + 65_536];
        loop {
            if !self.obey() {
                return;
            }
            let Ok(drained) = self.read_burst(&mut buffer) else {
                return;
            };
            self.release();
            if drained && self.wait().is_err() {
                return;
            }
        }
    }

    /// Carries out what was ordered; `false` when the handle is gone.
    fn obey(&mut self) -> bool {
        loop {
            match self.orders.try_recv() {
                Ok(order) => order(&mut self.shaper),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Reads what is there, up to a burst; `true` when nothing is left. An error means that the device is gone.
    fn read_burst(&mut self, buffer: &mut [u8]) -> std::io::Result<bool> {
        for _ in 0..MAX_BURST {
            match (&*self.from).read(buffer) {
                Ok(length) => {
                    let now = self.start.elapsed();
                    if let Some(frame) = Frame::new(buffer[..length].to_vec()) {
                        self.shaper.handle_frame(now, frame);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn release(&mut self) {
        while let Some((frame, tally)) = self.shaper.poll_release(self.start.elapsed()) {
            if (&*self.to).write(frame.as_bytes()).is_err() {
                self.shaper.write_failed(tally);
            }
        }
    }

    fn wait(&mut self) -> nix::Result<()> {
        let now = self.start.elapsed();
        let timeout = self.shaper.poll_timeout().map(|at| at.saturating_sub(now).max(SHORTEST_SLEEP));
        let mut descriptors = [
            PollFd::new(self.from.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
        ];
        match ppoll(&mut descriptors, timeout.map(TimeSpec::from), None) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error),
        }
        if descriptors[1].any().unwrap_or(false) {
            // Only emptied: what it announces is in the channel.
            let _ = (&self.woken).read(&mut [0; 64]);
        }
        Ok(())
    }
}

/// Puts the calling thread before all ordinary work. Best effort: without it delays are right on average but vary more
/// on a busy machine.
#[allow(unsafe_code)]
pub(super) fn raise_priority() {
    let _ = nix::sys::prctl::set_timerslack(1);
    let parameter = libc::sched_param { sched_priority: 10 };
    // SAFETY: `parameter` outlives the call; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameter) };
}
