//! Go's `filepath.Match` for one path component, on bytes.

/// The pattern ends inside a class or an escape.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadPattern;

/// Whether the component needs matching at all.
pub(crate) fn has_meta(component: &[u8]) -> bool {
    component.iter().any(|b| matches!(b, b'*' | b'?' | b'[' | b'\\'))
}

/// Whether `name` matches `pattern`: `*`, `?`, `[a-z]`, `[^a-z]`, `\x`.
pub(crate) fn matches(pattern: &[u8], name: &[u8]) -> Result<bool, BadPattern> {
    let (mut p, mut n) = (0, 0);
    // Where to go back to: behind the last `*`, and the first byte it has not swallowed yet.
    let mut retry: Option<(usize, usize)> = None;
    check(pattern)?;
    loop {
        let step = match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, n));
                p += 1;
                continue;
            }
            None if n == name.len() => return Ok(true),
            Some(_) if n < name.len() => one(&pattern[p..], name[n])?,
            _ => None,
        };
        match (step, retry) {
            (Some(width), _) => {
                p += width;
                n += 1;
            }
            (None, Some((back, from))) if from < name.len() => {
                retry = Some((back, from + 1));
                p = back;
                n = from + 1;
            }
            (None, _) => return Ok(false),
        }
    }
}

/// Go reports a malformed pattern even when the name already failed to match.
fn check(pattern: &[u8]) -> Result<(), BadPattern> {
    let mut p = 0;
    while p < pattern.len() {
        p += if pattern[p] == b'*' { 1 } else { class(&pattern[p..], 0)?.1 };
    }
    Ok(())
}

/// The width of the pattern's first element when it matches `byte`.
fn one(pattern: &[u8], byte: u8) -> Result<Option<usize>, BadPattern> {
    let (hit, width) = class(pattern, byte)?;
    Ok(hit.then_some(width))
}

fn class(pattern: &[u8], byte: u8) -> Result<(bool, usize), BadPattern> {
    match pattern[0] {
        b'?' => Ok((true, 1)),
        b'\\' => pattern.get(1).map(|&literal| (literal == byte, 2)).ok_or(BadPattern),
        b'[' => {
            let negated = pattern.get(1) == Some(&b'^');
            let mut at = if negated { 2 } else { 1 };
            let mut hit = false;
            let mut ranges = 0;
            while pattern.get(at) != Some(&b']') || ranges == 0 {
                let low = bound(pattern, &mut at)?;
                let high = if pattern.get(at) == Some(&b'-') {
                    at += 1;
                    bound(pattern, &mut at)?
                } else {
                    low
                };
                hit |= (low..=high).contains(&byte);
                ranges += 1;
            }
            Ok((hit != negated, at + 1))
        }
        literal => Ok((literal == byte, 1)),
    }
}

/// One end of a range; `]` and `-` need an escape there.
fn bound(pattern: &[u8], at: &mut usize) -> Result<u8, BadPattern> {
    let byte = match pattern.get(*at) {
        Some(b'\\') => {
            *at += 1;
            pattern.get(*at)
        }
        Some(b'-' | b']') | None => None,
        other => other,
    };
    *at += 1;
    // A pattern that ends here has no closing bracket.
    if *at >= pattern.len() { Err(BadPattern) } else { byte.copied().ok_or(BadPattern) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_match_as_in_go() {
        for (pattern, name, expected) in [
            ("*", "abc", true),
            ("a*c", "abbc", true),
            ("a*c", "abbd", false),
            ("*.c", "x.c.c", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("a\\*c", "a*c", true),
            ("a\\*c", "abc", false),
            ("a*b*c", "aXbYbZc", true),
            ("", "", true),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), Ok(expected), "{pattern} {name}");
        }
    }

    #[test]
    fn malformed_patterns_are_errors() {
        for pattern in ["[", "[a", "[]", "a\\", "[a-]", "[-x]"] {
            assert_eq!(matches(pattern.as_bytes(), b"zzz"), Err(BadPattern), "{pattern}");
        }
    }
}
