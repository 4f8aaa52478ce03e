//! Patterns of `${V#p}`, `${V%p}` and `${V/p/r}`: `*`, `?` and escapes; no brackets.

/// Cells that a match may look at: value length times pattern length.
const MAX_CELLS: usize = 1 << 26;

/// A parsed pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pattern {
    tokens: Vec<Token>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`
    One,
    /// `*`
    Many,
}

/// Why a pattern is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PatternError {
    #[error("invalid escape `\\{0}` in the pattern; only \\* \\? \\\\ \\}} and \\/ are known")]
    Escape(char),
    #[error("a pattern must not end with a single `\\`")]
    Trailing,
    #[error("the pattern is too costly for a value of this size")]
    Costly,
}

impl Pattern {
    pub(crate) fn parse(text: &str) -> Result<Self, PatternError> {
        let mut tokens = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            tokens.push(match c {
                '*' if tokens.last() == Some(&Token::Many) => continue,
                '*' => Token::Many,
                '?' => Token::One,
                '\\' => match chars.next() {
                    Some(c @ ('*' | '?' | '\\' | '}' | '/')) => Token::Char(c),
                    Some(c) => return Err(PatternError::Escape(c)),
                    None => return Err(PatternError::Trailing),
                },
                c => Token::Char(c),
            });
        }
        Ok(Self { tokens })
    }

    pub(crate) fn trim_prefix<'a>(&self, value: &'a str, longest: bool) -> Result<&'a str, PatternError> {
        let chars: Vec<(usize, char)> = value.char_indices().collect();
        let ends = self.ends(&chars, 0)?;
        let end = if longest { ends.iter().rposition(|&hit| hit) } else { ends.iter().position(|&hit| hit) };
        Ok(end.map_or(value, |end| &value[offset(&chars, value, end)..]))
    }

    pub(crate) fn trim_suffix<'a>(&self, value: &'a str, longest: bool) -> Result<&'a str, PatternError> {
        // A suffix of the value is a prefix of its mirror image.
        let mirror = Self { tokens: self.tokens.iter().rev().copied().collect() };
        let chars: Vec<(usize, char)> = value.char_indices().collect();
        let reversed: Vec<(usize, char)> = chars.iter().rev().copied().collect();
        let ends = mirror.ends(&reversed, 0)?;
        let end = if longest { ends.iter().rposition(|&hit| hit) } else { ends.iter().position(|&hit| hit) };
        Ok(end.map_or(value, |end| &value[..offset(&chars, value, chars.len() - end)]))
    }

    /// Replaces the first match, or all, each as long as possible.
    ///
    /// With `all`, `$0` and `${0}` in the replacement mean the match and other `$name` nothing:
    /// that is how Go's regexp replaces, which docker shows to its users.
    pub(crate) fn replace(&self, value: &str, replacement: &str, all: bool) -> Result<String, PatternError> {
        let chars: Vec<(usize, char)> = value.char_indices().collect();
        let (mut out, mut at, mut spent) = (String::new(), 0, 0);
        while at <= chars.len() {
            let end = if self.may_start_at(&chars, at) {
                let ends = self.ends(&chars, at)?;
                spent += ends.len() * self.tokens.len().max(1);
                if spent > MAX_CELLS {
                    return Err(PatternError::Costly);
                }
                ends.iter().rposition(|&hit| hit)
            } else {
                None
            };
            let Some(end) = end else {
                out.extend(chars.get(at).map(|(_, c)| c));
                at += 1;
                continue;
            };
            let end = at + end;
            let matched = &value[offset(&chars, value, at)..offset(&chars, value, end)];
            if !all {
                out.push_str(replacement);
                out.push_str(&value[offset(&chars, value, end)..]);
                return Ok(out);
            }
            out.push_str(&with_match(replacement, matched));
            if out.len() > crate::words::MAX_BYTES {
                return Err(PatternError::Costly);
            }
            // An empty match moves on by one character, or it would never end.
            if end == at {
                out.extend(chars.get(at).map(|(_, c)| c));
                at += 1;
            } else {
                at = end;
                if at == chars.len() {
                    break;
                }
            }
        }
        Ok(out)
    }

    fn may_start_at(&self, chars: &[(usize, char)], at: usize) -> bool {
        match self.tokens.first() {
            Some(Token::Char(c)) => chars.get(at).is_some_and(|(_, found)| found == c),
            Some(Token::One) => at < chars.len(),
            Some(Token::Many) | None => true,
        }
    }

    /// For each length: whether the pattern matches that many characters from `from` on.
    fn ends(&self, chars: &[(usize, char)], from: usize) -> Result<Vec<bool>, PatternError> {
        let mut chars = &chars[from..];
        if !self.tokens.contains(&Token::Many) {
            chars = &chars[..chars.len().min(self.tokens.len())];
        }
        if chars.len().saturating_mul(self.tokens.len()) > MAX_CELLS {
            return Err(PatternError::Costly);
        }
        let mut reached = vec![false; chars.len() + 1];
        reached[0] = true;
        for token in &self.tokens {
            match token {
                // `.` of docker's patterns stops at a line's end.
                Token::Many => {
                    for at in 0..chars.len() {
                        reached[at + 1] |= reached[at] && chars[at].1 != '\n';
                    }
                }
                Token::One | Token::Char(_) => {
                    for at in (0..chars.len()).rev() {
                        let fits = match token {
                            Token::Char(c) => chars[at].1 == *c,
                            _ => chars[at].1 != '\n',
                        };
                        reached[at + 1] = reached[at] && fits;
                    }
                    reached[0] = false;
                }
            }
        }
        Ok(reached)
    }
}

/// Byte offset of the character number `at`.
fn offset(chars: &[(usize, char)], value: &str, at: usize) -> usize {
    chars.get(at).map_or(value.len(), |(byte, _)| *byte)
}

/// `$0`, `${0}` and `$$` in a replacement.
fn with_match(replacement: &str, matched: &str) -> String {
    let mut out = String::new();
    let mut rest = replacement;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let (name, next) = if let Some(inside) = after.strip_prefix('{') {
            match inside.find('}') {
                Some(end) if inside[..end].chars().all(is_name) => (&inside[..end], &inside[end + 1..]),
                _ => ("", after),
            }
        } else {
            let end = after.find(|c| !is_name(c)).unwrap_or(after.len());
            (&after[..end], &after[end..])
        };
        if let Some(next) = after.strip_prefix('$') {
            out.push('$');
            rest = next;
            continue;
        }
        match name {
            "" => out.push('$'),
            "0" => out.push_str(matched),
            _ => {}
        }
        rest = if name.is_empty() { after } else { next };
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn replaced(pattern: &str, value: &str, replacement: &str, all: bool) -> String {
        Pattern::parse(pattern).unwrap().replace(value, replacement, all).unwrap()
    }

    #[test]
    fn matches_are_as_long_as_they_can_be() {
        assert_eq!(replaced("a*c", "xabcabcx", "-", false), "x-x");
        assert_eq!(replaced("?", "abc", "-", true), "---");
        assert_eq!(replaced("b", "aébc", "$0$0", true), "aébbc");
        assert_eq!(replaced("b", "abc", "$0", false), "a$0c");
        assert_eq!(replaced("b", "abc", "$x${0}$$", true), "ab$c");
    }

    #[test]
    fn costs_are_bounded() {
        let pattern = Pattern::parse(&"?".repeat(60_000)).unwrap();
        assert_eq!(pattern.trim_prefix(&"x".repeat(60_000), true), Err(PatternError::Costly));
    }
}
