//! When files were looked at: what may have changed since without its times showing it.

use std::time::SystemTime;

use crate::index::Timestamp;

/// The kernel stamps changes with the tick of a coarse clock, up to 10 ms wide.
const TICK_NS: i128 = 10_000_000;

const SECOND_NS: i128 = 1_000_000_000;

/// A moment before the first look at some files.
///
/// Follows git's racy rule: a file whose times are no older than one stamp before that may change again and keep
/// them, so equal times say nothing about it. How wide a stamp is depends on the file system, and is told by the
/// stamp itself.
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
        mtime_ns.max(ctime_ns) < self.unix_ns - width_ns(ctime_ns) - TICK_NS
    }
}

/// For how long a file system goes on giving this stamp to what changes.
///
/// Whole seconds are what ext3, ext4 with inodes of 128 bytes and HFS+ keep, even ones what FAT does. Where stamps are
/// finer, one in a billion is whole by chance, and its file is read once more. Of the two times only the change
/// time is nobody's to set: programs that unpack archives leave whole modification times everywhere.
fn width_ns(ctime_ns: i128) -> i128 {
    match ctime_ns.rem_euclid(2 * SECOND_NS) {
        0 => 2 * SECOND_NS,
        SECOND_NS => SECOND_NS,
        _ => 0,
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

    /// Noon of a day, and some nanoseconds.
    const NOW: LookedAt = LookedAt { unix_ns: 1_700_000_000 * SECOND_NS + 123_456_789 };

    /// Whether a file that changed so long ago, and whose stamps are cut to `width_ns`, is settled.
    fn is_settled(ago_ns: i128, width_ns: i128) -> bool {
        let stamp = (NOW.unix_ns - ago_ns).div_euclid(width_ns) * width_ns;
        NOW.is_settled(stamp, stamp)
    }

    #[test]
    fn what_changed_within_the_last_tick_is_not_settled() {
        assert!(is_settled(TICK_NS + 1, 1) && NOW.is_settled(-1, -1));
        let old = NOW.unix_ns - TICK_NS - 1;
        for recent in [NOW.unix_ns - TICK_NS, NOW.unix_ns, NOW.unix_ns + 3600 * SECOND_NS] {
            assert!(!NOW.is_settled(recent, old) && !NOW.is_settled(old, recent), "{}", recent - NOW.unix_ns);
        }
    }

    #[test]
    fn what_may_change_again_within_the_same_stamp_is_not_settled() {
        // Nanoseconds, jiffies of 4 and 10 ms, seconds, and FAT's two.
        for width in [1, 4_000_000, TICK_NS, SECOND_NS, 2 * SECOND_NS] {
            for ago in (0..4 * SECOND_NS).step_by(1_234_567) {
                let stamp = (NOW.unix_ns - ago).div_euclid(width) * width;
                // What is finer than the clock that stamps is as wide as its tick; what is wider is cut from a
                // time that may be a tick behind.
                let last = stamp + if width > TICK_NS { width + TICK_NS } else { TICK_NS };
                assert!(last <= NOW.unix_ns || !is_settled(ago, width), "{ago} of {width}");
            }
            assert!(is_settled(4 * SECOND_NS, width), "{width}: not for ever");
        }
        // An odd second is none of FAT's.
        let odd = (NOW.unix_ns.div_euclid(2 * SECOND_NS) * 2 - 1) * SECOND_NS;
        assert!(NOW.is_settled(odd, odd) && odd + 2 * SECOND_NS > NOW.unix_ns);
    }

    #[test]
    fn a_modification_time_that_was_set_says_nothing_about_stamps() {
        // As tar leaves it: whole, and just now.
        let whole = NOW.unix_ns.div_euclid(SECOND_NS) * SECOND_NS;
        assert!(NOW.is_settled(whole, NOW.unix_ns - TICK_NS - 1));
        // Where the change time is whole, an older modification time does not help.
        assert!(!NOW.is_settled(-1, whole));
        assert_eq!([width_ns(0), width_ns(-SECOND_NS), width_ns(-1)], [2 * SECOND_NS, SECOND_NS, 0]);
    }
}
