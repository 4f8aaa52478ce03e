//! The keys that leave a container without ending it.

use std::str::FromStr;

/// A sequence of keys on the way in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachKeys {
    keys: Vec<u8>,
    /// So many of them have come.
    matched: usize,
}

impl Default for DetachKeys {
    /// Ctrl-P, Ctrl-Q.
    fn default() -> Self {
        Self { keys: vec![0x10, 0x11], matched: 0 }
    }
}

impl DetachKeys {
    /// What of `input` is for the process, and whether the keys were all there. The beginning of a
    /// sequence is held back until it is known not to be one.
    pub(crate) fn filter(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(input.len());
        for &byte in input {
            // Keys begin anew where they do not go on: `aab` is in `aaab`.
            while self.matched > 0 && self.keys.get(self.matched) != Some(&byte) {
                let kept = (0..self.matched)
                    .rev()
                    .find(|&len| self.keys[..len] == self.keys[self.matched - len..self.matched])
                    .unwrap_or(0);
                passed.extend_from_slice(&self.keys[..self.matched - kept]);
                self.matched = kept;
            }
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    self.matched = 0;
                    return (passed, true);
                }
            } else {
                passed.push(byte);
            }
        }
        (passed, false)
    }
}

impl FromStr for DetachKeys {
    type Err = String;

    /// `ctrl-p,ctrl-q`, `a`, `ctrl-@,x`; an empty text: none.
    fn from_str(text: &str) -> Result<Self, String> {
        let key = |word: &str| {
            let byte = match word.as_bytes() {
                [byte] => Some(*byte),
                b"DEL" => Some(127),
                [b'c', b't', b'r', b'l', b'-', byte @ b'a'..=b'z'] => Some(byte - b'a' + 1),
                [b'c', b't', b'r', b'l', b'-', b'@'] => Some(0),
                [b'c', b't', b'r', b'l', b'-', byte @ b'['..=b'_'] => Some(byte - b'[' + 27),
                _ => None,
            };
            byte.ok_or_else(|| format!("{word:?} is no key: there are letters and ctrl-LETTER"))
        };
        if text.is_empty() {
            return Ok(Self { keys: Vec::new(), matched: 0 });
        }
        Ok(Self { keys: text.split(',').map(key).collect::<Result<_, _>>()?, matched: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &str, inputs: &[&[u8]], passed: &[u8], leaves: bool) {
        let mut keys: DetachKeys = keys.parse().unwrap();
        let (mut all, mut left) = (Vec::new(), false);
        for input in inputs {
            let (bytes, leaves) = keys.filter(input);
            all.extend(bytes);
            left |= leaves;
        }
        assert_eq!((all.as_slice(), left), (passed, leaves));
    }

    #[test]
    fn keys_end_it_wherever_they_are_cut() {
        check("ctrl-p,ctrl-q", &[b"ab\x10\x11"], b"ab", true);
        check("ctrl-p,ctrl-q", &[b"ab\x10", b"\x11"], b"ab", true);
        check("ctrl-p,ctrl-q", &[b"\x10\x10\x11"], b"\x10", true);
        check("ctrl-p,ctrl-q", &[b"\x10x\x11"], b"\x10x\x11", false);
        check("a,a,b", &[b"aaab"], b"a", true);
        check("ctrl-[", &[b"x\x1b"], b"x", true);
        check("", &[b"\x10\x11"], b"\x10\x11", false);
    }

    #[test]
    fn what_is_no_key_is_said() {
        for bad in ["ctrl-", "ctrl-1", "alt-x", "ctrl-p,"] {
            assert!(bad.parse::<DetachKeys>().is_err(), "{bad}");
        }
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(DetachKeys::default()));
    }
}
