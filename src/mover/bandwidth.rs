//! A limit on bytes per second, shared by everything that moves data in one run.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, sleep_until};

/// A pace: every taker waits until its turn. Bursts are at most a tenth of a second's worth.
#[derive(Debug)]
pub struct Bandwidth {
    bytes_per_second: u64,
    next: Mutex<Instant>,
}

impl Bandwidth {
    /// A limit in bytes per second, at least 1.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), next: Mutex::new(Instant::now()) }
    }

    /// Waits until these bytes may go.
    pub async fn take(&self, bytes: u64) {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let turn = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = (*next).max(Instant::now().checked_sub(Duration::from_millis(100)).unwrap_or(*next));
            *next = turn + cost;
            turn
        };
        sleep_until(turn).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn takers_together_keep_the_pace() {
        let limit = Bandwidth::new(1000);
        let begun = Instant::now();
        for _ in 0..50 {
            limit.take(100).await;
        }
        let took = begun.elapsed().as_secs_f64();
        assert!((4.7..=5.1).contains(&took), "{took}");
    }
}
