//! Progress of a build: lines as BuildKit prints them, or a live display.

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use kiln_build::why::{Reason, in_words};
use kiln_build::{Dockerfile, Progress};
use kiln_frontend::Diagnostic;
use kiln_solver::{Event, Stream};

/// What is seen of a build: its steps while they run, warnings when all is done, so that the
/// output of the steps does not push them off the screen.
pub(crate) struct Shown {
    steps: Box<dyn Steps>,
    warnings: Mutex<Vec<String>>,
}

/// How steps are shown.
pub(crate) trait Steps: Send + Sync {
    fn plan(&self, titles: &[String]);
    fn event(&self, event: Event);
    /// Why a step runs that was started.
    fn why(&self, vertex: usize, reasons: &str);
}

impl Shown {
    pub(crate) fn new(steps: impl Steps + 'static) -> Self {
        Self { steps: Box::new(steps), warnings: Mutex::default() }
    }

    /// Writes the warnings to standard error.
    pub(crate) fn finish(&self) {
        for warning in std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner)) {
            line(warning.trim_end());
        }
    }
}

impl Progress for Shown {
    fn plan(&self, titles: &[String]) {
        self.steps.plan(titles);
    }

    fn warning(&self, dockerfile: &Dockerfile, warning: &Diagnostic) {
        let text = warning.render(&dockerfile.name, &dockerfile.text);
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    fn event(&self, event: Event) {
        self.steps.event(event);
    }

    fn note(&self, text: &str) {
        let text = format!("warning: {}", printable(text.as_bytes()));
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    fn why(&self, vertex: usize, reasons: &[Reason]) {
        // In a first build all of it goes without saying.
        if reasons.iter().any(Reason::is_news) {
            self.steps.why(vertex, &printable(in_words(reasons).as_bytes()));
        }
    }
}

/// Where a result came from that was not in the store.
fn from_of(from: Option<&str>) -> String {
    from.map(|from| format!(" from {}", printable(from.as_bytes()))).unwrap_or_default()
}

/// Shows nothing at all.
pub(crate) struct Quiet;

impl Steps for Quiet {
    fn plan(&self, _titles: &[String]) {}
    fn event(&self, _event: Event) {}
    fn why(&self, _vertex: usize, _reasons: &str) {}
}

/// `#N title`, `#N CACHED`, `#N 0.123 output`, `#N DONE 1.2s` on standard error.
#[derive(Default)]
pub(crate) struct Plain(Mutex<State>);

#[derive(Default)]
struct State {
    titles: Vec<String>,
    /// Number and start of every step that was shown.
    shown: HashMap<usize, (usize, Instant)>,
    /// Output without its line end yet. Each stream has its own: `set -x` writes half lines.
    partial: HashMap<(usize, bool), Vec<u8>>,
}

impl State {
    fn number(&mut self, vertex: usize) -> (usize, Instant) {
        if let Some(known) = self.shown.get(&vertex) {
            return *known;
        }
        let entry = (self.shown.len() + 1, Instant::now());
        self.shown.insert(vertex, entry);
        let title = self.titles.get(vertex).map_or("", String::as_str);
        line(&format!("#{} {title}", entry.0));
        entry
    }

    fn log(&mut self, vertex: usize, stream: Stream, bytes: &[u8], end: bool) {
        let (number, started) = self.number(vertex);
        let key = (vertex, stream == Stream::Stderr);
        let mut text = self.partial.remove(&key).unwrap_or_default();
        text.extend_from_slice(bytes);
        let at = started.elapsed().as_secs_f64();
        for whole in take_lines(&mut text) {
            line(&format!("#{number} {at:.3} {}", printable(&whole)));
        }
        // A line that never ends is shown in pieces, so that memory stays bounded.
        if !text.is_empty() && (end || text.len() > 64 << 10) {
            line(&format!("#{number} {at:.3} {}", printable(&text)));
        } else if !text.is_empty() {
            self.partial.insert(key, text);
        }
    }

    /// Shows what is left of a step's output.
    fn rest(&mut self, vertex: usize) {
        self.log(vertex, Stream::Stdout, b"", true);
        self.log(vertex, Stream::Stderr, b"", true);
    }
}

/// Takes the whole lines out of `text`, without their ends.
///
/// They end at LF, CRLF, or at the CR with which a progress bar goes back; a CR in front of
/// anything moves nothing. What a CR at the very end means is not known yet.
fn take_lines(text: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let (mut lines, mut from) = (Vec::new(), 0);
    while let Some(length) = text[from..].iter().position(|b| matches!(b, b'\n' | b'\r')) {
        let end = from + length;
        let is_newline = text[end] == b'\n';
        let next = match text.get(end + 1) {
            _ if is_newline => end + 1,
            Some(b'\n') => end + 2,
            Some(_) => end + 1,
            None => break,
        };
        if length > 0 || text[next - 1] == b'\n' {
            lines.push(text[from..end].to_vec());
        }
        from = next;
    }
    text.drain(..from);
    lines
}

/// A whole line in one write, so that lines of several steps do not mix.
fn line(text: &str) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// What a step prints is not ours: control bytes other than tabs and colours do not reach the
/// terminal.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.strip_suffix('\r').unwrap_or(&text);
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let colour = colour_length(rest);
        if colour > 0 {
            out.push_str(&rest[..colour]);
            rest = &rest[colour..];
            continue;
        }
        out.push(if c.is_control() && c != '\t' { '\u{fffd}' } else { c });
        rest = &rest[c.len_utf8()..];
    }
    out
}

/// Length of an SGR sequence (`ESC [ digits ; … m`) at the start; 0 for anything else.
fn colour_length(text: &str) -> usize {
    let Some(rest) = text.strip_prefix("\x1b[") else { return 0 };
    let digits = rest.bytes().take_while(|b| b.is_ascii_digit() || *b == b';').count();
    if rest.as_bytes().get(digits) == Some(&b'm') { digits + 3 } else { 0 }
}

fn seconds(took: Duration) -> String {
    format!("{:.1}s", took.as_secs_f64())
}

impl Steps for Plain {
    fn plan(&self, titles: &[String]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).titles = titles.to_vec();
    }

    fn event(&self, event: Event) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started { vertex } => {
                state.number(vertex);
            }
            Event::Cached { vertex, from } => {
                let (number, _) = state.number(vertex);
                line(&format!("#{number} CACHED{}", from_of(from.as_deref())));
            }
            Event::Log { vertex, stream, bytes } => state.log(vertex, stream, &bytes, false),
            Event::Completed { vertex, took } => {
                state.rest(vertex);
                let (number, _) = state.number(vertex);
                line(&format!("#{number} DONE {}", seconds(took)));
            }
            Event::Failed { vertex, message } => {
                state.rest(vertex);
                let (number, _) = state.number(vertex);
                line(&format!("#{number} ERROR: {message}"));
            }
            Event::Cancelled { vertex } => {
                let (number, _) = state.number(vertex);
                line(&format!("#{number} CANCELED"));
            }
            Event::Quiet { vertex, waits } => {
                let (number, _) = state.number(vertex);
                line(&format!("#{number} nothing happened for a minute: {waits}"));
            }
        }
    }

    fn why(&self, vertex: usize, reasons: &str) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, _) = state.number(vertex);
        line(&format!("#{number} why: {reasons}"));
    }
}

/// One line a running step, finished ones above.
pub(crate) struct Live {
    bars: MultiProgress,
    state: Mutex<LiveState>,
}

#[derive(Default)]
struct LiveState {
    titles: Vec<String>,
    running: HashMap<usize, ProgressBar>,
    /// The last output of each step, shown when it fails.
    tail: HashMap<usize, Vec<u8>>,
    /// Why each step runs, shown below it when it is done.
    why: HashMap<usize, String>,
}

/// This much output of a failed step is shown.
const TAIL_BYTES: usize = 8 << 10;

impl Live {
    pub(crate) fn new() -> Self {
        Self { bars: MultiProgress::new(), state: Mutex::default() }
    }

    fn say(&self, text: &str) {
        let _ = self.bars.println(text);
    }
}

impl Steps for Live {
    fn plan(&self, titles: &[String]) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).titles = titles.to_vec();
    }

    fn event(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let title = |state: &LiveState, vertex: usize| state.titles.get(vertex).cloned().unwrap_or_default();
        let finish = |state: &mut LiveState, vertex: usize| {
            if let Some(bar) = state.running.remove(&vertex) {
                bar.finish_and_clear();
            }
        };
        match event {
            Event::Started { vertex } => {
                let bar = self.bars.add(ProgressBar::new_spinner());
                let style = ProgressStyle::with_template("{spinner} {prefix} {elapsed}  {wide_msg}");
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
                bar.set_prefix(title(&state, vertex).chars().take(60).collect::<String>());
                bar.enable_steady_tick(Duration::from_millis(200));
                state.running.insert(vertex, bar);
            }
            Event::Log { vertex, bytes, .. } => {
                if let Some(bar) = state.running.get(&vertex)
                    && let Some(last) = bytes.split(|&b| b == b'\n').rfind(|line| !line.is_empty())
                {
                    bar.set_message(printable(last));
                }
                let tail = state.tail.entry(vertex).or_default();
                tail.extend_from_slice(&bytes);
                let surplus = tail.len().saturating_sub(TAIL_BYTES);
                tail.drain(..surplus);
            }
            Event::Cached { vertex, from } => {
                self.say(&format!("CACHED  {}{}", title(&state, vertex), from_of(from.as_deref())));
            }
            Event::Completed { vertex, took } => {
                finish(&mut state, vertex);
                self.say(&format!("{:>6}  {}", seconds(took), title(&state, vertex)));
                if let Some(why) = state.why.remove(&vertex) {
                    self.say(&format!("        why: {why}"));
                }
            }
            Event::Failed { vertex, message } => {
                finish(&mut state, vertex);
                let tail = state.tail.remove(&vertex).unwrap_or_default();
                for line in tail.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
                    self.say(&format!("        {}", printable(line)));
                }
                self.say(&format!("FAILED  {}: {message}", title(&state, vertex)));
            }
            Event::Cancelled { vertex } => finish(&mut state, vertex),
            Event::Quiet { vertex, waits } => {
                self.say(&format!("nothing happened for a minute: {}: {waits}", title(&state, vertex)));
            }
        }
    }

    fn why(&self, vertex: usize, reasons: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.why.insert(vertex, reasons.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_bytes_of_steps_do_not_reach_the_terminal() {
        assert_eq!(printable(b"\x1b[1;31mred\x1b[0m\tx"), "\u{1b}[1;31mred\u{1b}[0m\tx");
        assert_eq!(printable(b"\x1b]52;c;x\x07\r"), "\u{fffd}]52;c;x\u{fffd}");
        assert_eq!(printable(b"\x1b[2J"), "\u{fffd}[2J");
    }

    #[track_caller]
    fn check_lines(chunks: &[&str], expected: &[&str], rest: &str) {
        let (mut text, mut lines) = (Vec::new(), Vec::new());
        for chunk in chunks {
            text.extend_from_slice(chunk.as_bytes());
            lines.extend(take_lines(&mut text));
        }
        let lines: Vec<_> = lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect();
        assert_eq!(lines, expected);
        assert_eq!(String::from_utf8_lossy(&text), rest);
    }

    #[test]
    fn output_is_shown_line_by_line() {
        check_lines(&["a\nb", "c\n\nd"], &["a", "bc", ""], "d");
        check_lines(&["a\r\nb\r", "\nc\r"], &["a", "b"], "c\r");
        check_lines(&["\r10%\r20%", "\r\r30%\n"], &["10%", "20%", "30%"], "");
    }
}
