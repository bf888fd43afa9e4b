//! What the leaves of one migration hand to each other, and who has it at the moment.
//!
//! Does not know what it is, nor what a leaf does with it: drivers decide which leaf follows.

use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A `T` that one leaf after the other works on; never two at the same time.
pub(super) enum Work<T> {
    /// Nobody has it.
    Idle(Box<T>),
    /// A leaf does, until it ends; it can be asked to.
    Running {
        /// Asks it to end.
        stop: watch::Sender<bool>,
        /// Gives it back.
        task: JoinHandle<T>,
    },
}

impl<T: Default> Default for Work<T> {
    fn default() -> Self {
        Self::Idle(Box::default())
    }
}

impl<T: Default + Send + 'static> Work<T> {
    /// Ends the leaf that works on it and gives it to the next one, which is told through its receiver
    /// when it is to end.
    pub(super) fn hand_on<F, W>(&mut self, next: F)
    where
        F: FnOnce(T, watch::Receiver<bool>) -> W + Send + 'static,
        W: Future<Output = T> + Send + 'static,
    {
        let (stop, stopped) = watch::channel(false);
        let before = std::mem::take(self);
        let task = tokio::spawn(async move {
            let held = before.end().await;
            next(held, stopped).await
        });
        *self = Self::Running { stop, task };
    }

    async fn end(self) -> T {
        match self {
            Self::Idle(held) => *held,
            Self::Running { stop, task } => {
                stop.send_replace(true);
                // A leaf that panicked has lost what it held; the next one works from QEMU's state.
                task.await.unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_leaf_is_asked_to_end_and_hands_on_what_it_had() {
        let mut work = Work::Idle(Box::new(vec![1]));
        work.hand_on(|mut held, mut stop| async move {
            stop.wait_for(|stop| *stop).await.unwrap();
            held.push(2);
            held
        });
        let (told, seen) = oneshot::channel();
        work.hand_on(|held, _stop| async move {
            told.send(held.clone()).unwrap();
            held
        });
        assert_eq!(seen.await.unwrap(), [1, 2]);
    }

    #[tokio::test]
    async fn after_a_leaf_that_panicked_the_next_begins_with_nothing() {
        let mut work = Work::Idle(Box::new(7u32));
        work.hand_on(|held, _stop| async move { panic!("lost {held}") });
        let (told, seen) = oneshot::channel();
        work.hand_on(|held, _stop| async move {
            told.send(held).unwrap();
            held
        });
        assert_eq!(seen.await.unwrap(), 0);
    }
}
