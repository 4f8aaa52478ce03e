//! Keeps secrets out of logs.

/// What stands in a log instead of a secret.
const MASK: &[u8] = b"***";
/// Shorter values are too likely to be ordinary words.
const MIN_BYTES: usize = 8;

/// Replaces secret values in one stream of output, wherever its chunks begin and end.
///
/// Costs a step per byte and secret, whatever the bytes are (Knuth, Morris and Pratt). What may be
/// the beginning of a secret is held back until more comes, and nothing else is.
pub(crate) struct Redactor {
    needles: Vec<Needle>,
    /// Bytes not passed on yet, each with the length of the longest secret that begins there.
    held: Vec<(u8, usize)>,
    /// How many of the next bytes belong to a secret that began before them.
    covered: usize,
    /// The last thing passed on was a mask.
    in_mask: bool,
}

struct Needle {
    value: Vec<u8>,
    /// For each length matched: the longest shorter one that the same bytes end in.
    fallback: Vec<u32>,
    matched: usize,
}

impl Needle {
    fn new(value: Vec<u8>) -> Self {
        let mut fallback = vec![0; value.len() + 1];
        let mut length = 0;
        for at in 1..value.len() {
            while length > 0 && value[at] != value[length] {
                length = fallback[length] as usize;
            }
            if value[at] == value[length] {
                length += 1;
            }
            fallback[at + 1] = u32::try_from(length).unwrap_or(0);
        }
        Self { value, fallback, matched: 0 }
    }

    /// Takes one byte; whether the value ends with it.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.value[self.matched] != byte {
            self.matched = self.fallback[self.matched] as usize;
        }
        if self.value[self.matched] == byte {
            self.matched += 1;
        }
        let complete = self.matched == self.value.len();
        if complete {
            self.matched = self.fallback[self.matched] as usize;
        }
        complete
    }
}

impl Redactor {
    /// A redactor of `values`. Line ends at a value's end do not count: a shell drops them.
    pub(crate) fn new<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self::of_at_least(MIN_BYTES, values)
    }

    /// The same, of those that have at least `min_bytes`.
    pub(crate) fn of_at_least<'a>(min_bytes: usize, values: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for value in values {
            let end = value.iter().rposition(|b| !matches!(b, b'\n' | b'\r')).map_or(0, |last| last + 1);
            if end >= min_bytes.max(1) {
                kept.push(value[..end].to_vec());
            }
        }
        kept.sort();
        kept.dedup();
        Self {
            needles: kept.into_iter().map(Needle::new).collect(),
            held: Vec::new(),
            covered: 0,
            in_mask: false,
        }
    }

    /// Passes `bytes` on to `out`, masked.
    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut dyn FnMut(&[u8])) {
        if self.needles.is_empty() {
            return out(bytes);
        }
        for &byte in bytes {
            self.held.push((byte, 0));
            for needle in &mut self.needles {
                if needle.step(byte) {
                    let length = needle.value.len();
                    // Everything since its first byte was held back for its sake.
                    let start = self.held.len().saturating_sub(length);
                    self.held[start].1 = self.held[start].1.max(length);
                }
            }
        }
        let longest = self.needles.iter().map(|needle| needle.matched).max().unwrap_or(0);
        self.release(self.held.len() - longest.min(self.held.len()), out);
    }

    /// Passes on what was held back: nothing follows.
    pub(crate) fn finish(&mut self, out: &mut dyn FnMut(&[u8])) {
        self.release(self.held.len(), out);
    }

    fn release(&mut self, count: usize, out: &mut dyn FnMut(&[u8])) {
        let mut text = Vec::with_capacity(count);
        for (byte, secret) in self.held.drain(..count) {
            self.covered = self.covered.max(secret);
            let covered = self.covered > 0;
            if !covered {
                text.push(byte);
            } else if !self.in_mask {
                text.extend_from_slice(MASK);
            }
            self.covered = self.covered.saturating_sub(1);
            self.in_mask = covered;
        }
        if !text.is_empty() {
            out(&text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(secrets: &[&str], chunks: &[&str], expected: &str) {
        let mut redactor = Redactor::new(secrets.iter().map(|secret| secret.as_bytes()));
        let mut seen = Vec::new();
        for chunk in chunks {
            redactor.push(chunk.as_bytes(), &mut |bytes| seen.extend_from_slice(bytes));
        }
        redactor.finish(&mut |bytes| seen.extend_from_slice(bytes));
        assert_eq!(String::from_utf8_lossy(&seen), expected);
    }

    #[test]
    fn a_secret_is_masked_wherever_the_chunks_break() {
        let text = "token=hunter2hunter2, again hunter2hunter2\n";
        for first in 0..text.len() {
            for second in first..text.len() {
                let chunks = [&text[..first], &text[first..second], &text[second..]];
                check(&["hunter2hunter2"], &chunks, "token=***, again ***\n");
            }
        }
    }

    #[test]
    fn what_only_begins_like_a_secret_passes() {
        check(&["hunter2hunter2"], &["hunter2", "hunter", "1"], "hunter2hunter1");
        check(&["aaaaaaaab"], &["aaaaaaa", "aaac"], "aaaaaaaaaac");
        check(&["aaaaaaaab"], &["aaaaaaa", "aaab"], "aa***");
        check(&["hunter2hunter2"], &["hunter2"], "hunter2");
    }

    #[test]
    fn secrets_that_overlap_or_contain_each_other_are_covered_whole() {
        check(&["password", "long-password-1"], &["a long-pass", "word-1 b"], "a *** b");
        check(&["abcdefgh", "efghijkl"], &["xabcdefghijklx"], "x***x");
        check(&["abcdefgh", "defghijk"], &["abcdefgh", "ijk!"], "***!");
    }

    #[test]
    fn the_line_end_of_a_secret_file_does_not_count() {
        check(&["hunter2hunter2\n"], &["Bearer hunter2hunter2;"], "Bearer ***;");
    }

    #[test]
    fn short_values_are_left_alone() {
        check(&["true", ""], &["true story"], "true story");
    }

    #[test]
    fn output_that_is_no_secret_is_not_held_back() {
        let mut redactor = Redactor::new([&b"hunter2hunter2"[..]]);
        let mut seen = String::new();
        redactor.push(b"compiling\nhun", &mut |bytes| seen.push_str(&String::from_utf8_lossy(bytes)));
        assert_eq!(seen, "compiling\n");
    }

    #[test]
    fn a_large_secret_costs_no_more_than_its_size() {
        let secret = "a".repeat(500 << 10) + "b";
        let text = "a".repeat(499 << 10);
        check(&[&secret], &[&text, &text], &(text.clone() + &text));
        check(&[&text], &[&secret, &secret], "***b***b");
    }
}
