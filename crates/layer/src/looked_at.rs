//! When files were looked at: what may have changed since without its times showing it.

use std::time::SystemTime;

use crate::index::Timestamp;

/// File systems stamp changes with the tick of a coarse clock, up to 10 ms wide.
const GRANULARITY_NS: i128 = 10_000_000;

/// A moment before the first look at some files.
///
/// Follows git's racy rule: a file whose times are no older than one clock tick before that may change again
/// and keep them, so equal times say nothing about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookedAt {
    unix_ns: i128,
}

impl LookedAt {
    /// Now; called before any file is looked at.
    pub fn now() -> Self {
        let unix_ns = match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => since.as_nanos() as i128,
            Err(before) => -(before.duration().as_nanos() as i128),
        };
        Self { unix_ns }
    }

    /// Whether a file with these times would have others if it changed again.
    pub(crate) fn is_settled(self, mtime_ns: i128, ctime_ns: i128) -> bool {
        mtime_ns.max(ctime_ns) < self.unix_ns - GRANULARITY_NS
    }
}

impl Timestamp {
    /// Nanoseconds since 1970.
    pub(crate) fn unix_ns(self) -> i128 {
        i128::from(self.secs) * 1_000_000_000 + i128::from(self.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_within_the_last_tick_is_not_settled() {
        let LookedAt { unix_ns } = LookedAt::now();
        let settled = |mtime, ctime| LookedAt { unix_ns }.is_settled(mtime, ctime);
        let old = unix_ns - GRANULARITY_NS - 1;
        assert!(settled(old, old) && settled(-1, -1));
        for recent in [unix_ns - GRANULARITY_NS, unix_ns, unix_ns + 3_600_000_000_000] {
            assert!(!settled(recent, old) && !settled(old, recent), "{}", recent - unix_ns);
        }
    }
}
