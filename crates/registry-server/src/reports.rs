//! What goes wrong without anybody asking, told to whoever serves the registry.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The same is not said again within this time: clients can make it happen as often as they like.
const PAUSE: Duration = Duration::from_secs(60);
/// No more texts are remembered.
const MAX_KNOWN: usize = 64;

/// Gets what is to be said.
type Sink = Box<dyn Fn(String) + Send + Sync>;

/// Where problems go. Nothing is said before there is somebody to hear it.
#[derive(Default)]
pub(crate) struct Reports {
    sink: OnceLock<Sink>,
    said: Mutex<HashMap<String, Instant>>,
}

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reports").finish_non_exhaustive()
    }
}

impl Reports {
    /// From now on `sink` gets them; the first one counts.
    pub(crate) fn set(&self, sink: impl Fn(String) + Send + Sync + 'static) {
        let _ = self.sink.set(Box::new(sink));
    }

    /// Says it, unless it was said a moment ago.
    pub(crate) fn say(&self, text: String) {
        let Some(sink) = self.sink.get() else { return };
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.get(&text).is_some_and(|when| when.elapsed() < PAUSE) {
            return;
        }
        if said.len() >= MAX_KNOWN {
            said.retain(|_, when| when.elapsed() < PAUSE);
        }
        if said.len() < MAX_KNOWN {
            said.insert(text.clone(), Instant::now());
        }
        drop(said);
        sink(text);
    }

    /// Says an error with all its causes.
    pub(crate) fn error(&self, what: &str, error: &dyn Error) {
        let mut text = format!("{what}: {error}");
        let mut cause = error.source();
        while let Some(next) = cause {
            text.push_str(&format!(": {next}"));
            cause = next.source();
        }
        self.say(text);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_happens_again_and_again_is_said_once() {
        let (reports, heard) = (Reports::default(), Arc::new(Mutex::new(Vec::new())));
        reports.say("nobody hears this".to_owned());
        let to = heard.clone();
        reports.set(move |text| to.lock().unwrap().push(text));
        for _ in 0..3 {
            reports.error("one", &std::io::Error::other("two"));
        }
        reports.say("another".to_owned());
        assert_eq!(*heard.lock().unwrap(), ["one: two", "another"]);
    }
}
