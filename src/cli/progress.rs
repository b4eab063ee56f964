//! Progress of long work: bars on a terminal, a line now and then elsewhere.

use super::size::show_size;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

/// Between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress of several volumes.
#[derive(Debug)]
pub(super) struct Progress {
    all: MultiProgress,
    bars: Vec<(String, ProgressBar)>,
    plain: bool,
    verb: &'static str,
    begun: Instant,
    last_line: Instant,
}

impl Progress {
    /// A bar for each name. `verb`: what is done, for the lines.
    pub(super) fn new(verb: &'static str, names: impl IntoIterator<Item = String>) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let all = MultiProgress::with_draw_target(if plain {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        });
        let names: Vec<String> = names.into_iter().collect();
        let width = names.iter().map(String::len).max().unwrap_or(0);
        let style = ProgressStyle::with_template(&format!(
            "{{prefix:{width}}} [{{bar:30}}] {{binary_bytes}}/{{binary_total_bytes}} {{binary_bytes_per_sec}} {{eta}} left"
        ))
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
        let bars = names
            .into_iter()
            .map(|name| {
                let bar = all.add(ProgressBar::new(0).with_style(style.clone()).with_prefix(name.clone()));
                (name, bar)
            })
            .collect();
        Self { all, bars, plain, verb, begun: Instant::now(), last_line: Instant::now() }
    }

    /// Bytes done and in all, of the volume with this index.
    pub(super) fn set(&mut self, index: usize, done: u64, total: u64) {
        if let Some((_, bar)) = self.bars.get(index) {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// To be called a few times a second.
    pub(super) fn tick(&mut self) {
        if !self.plain || self.last_line.elapsed() < LINE_EVERY {
            return;
        }
        self.last_line = Instant::now();
        let (done, total) = self
            .bars
            .iter()
            .fold((0, 0), |(done, total), (_, bar)| (done + bar.position(), total + bar.length().unwrap_or(0)));
        let seconds = self.begun.elapsed().as_secs_f64().max(0.001);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate to show")]
        let rate = (done as f64 / seconds) as u64;
        let left = total.saturating_sub(done).checked_div(rate);
        let left = left.map_or_else(|| "unknown time".into(), |seconds| format!("{seconds} s"));
        eprintln!("{}: {} of {}, {}/s, {left} left", self.verb, show_size(done), show_size(total), show_size(rate));
    }

    /// Takes the bars away.
    pub(super) fn finish(&self) {
        let _ = self.all.clear();
    }
}

/// Progress of work whose steps are counted, and whose size is not known before.
#[derive(Debug)]
pub(super) struct Steps {
    bar: ProgressBar,
    plain: bool,
    what: &'static str,
    last_line: Instant,
}

impl Steps {
    /// `what` is done, such as `listing chunks`.
    pub(super) fn new(what: &'static str) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(None, target).with_style(style).with_prefix(what);
        Self { bar, plain, what, last_line: Instant::now() }
    }

    /// Steps done and in all; `found` says what they found so far.
    pub(super) fn set(&mut self, done: u64, total: u64, found: impl FnOnce() -> String) {
        if !self.plain {
            self.bar.set_length(total);
            self.bar.set_position(done);
            self.bar.set_message(found());
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            eprintln!("{}: {done} of {total}, {}", self.what, found());
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
