//! Ranges of bytes: `Range` of who reads, `Content-Range` of who sends a piece of a blob.

/// What to send of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// All of it: nothing else was asked for, or something that nobody has to understand (RFC 9110, 14.2).
    Whole,
    /// From the first of these bytes to before the second; never empty.
    Part(u64, u64),
    /// Nothing of it lies there.
    Outside,
}

/// Reads `bytes=FROM-TO`, `bytes=FROM-` and `bytes=-COUNT` for a blob of this size. Several ranges at once are
/// answered with the whole.
pub fn asked(header: &str, size: u64) -> Asked {
    let Some(range) = header.trim().strip_prefix("bytes=") else { return Asked::Whole };
    let Some((from, to)) = range.trim().split_once('-') else { return Asked::Whole };
    match (number(from), number(to)) {
        (Some(from), _) if to.is_empty() && from < size => Asked::Part(from, size),
        (Some(from), Some(to)) if to < from => Asked::Whole,
        (Some(from), Some(to)) if from < size => Asked::Part(from, to.saturating_add(1).min(size)),
        (Some(_), Some(_)) => Asked::Outside,
        (Some(_), None) if to.is_empty() => Asked::Outside,
        (None, Some(count)) if from.is_empty() && count > 0 && size > 0 => {
            Asked::Part(size.saturating_sub(count), size)
        }
        (None, Some(_)) if from.is_empty() => Asked::Outside,
        _ => Asked::Whole,
    }
}

/// Reads `FROM-TO`, both of them sent, as the specification writes it, or `bytes FROM-TO/SIZE`, as HTTP does:
/// the first byte, and how many.
pub fn piece(header: &str) -> Option<(u64, u64)> {
    let text = header.trim();
    let text = text.strip_prefix("bytes ").or_else(|| text.strip_prefix("bytes=")).unwrap_or(text);
    let ends = text.split_once('/').map_or(text, |(ends, _)| ends);
    let (from, to) = ends.split_once('-')?;
    let (from, to) = (number(from)?, number(to)?);
    Some((from, to.checked_sub(from)?.checked_add(1)?))
}

/// Digits and nothing else: `parse` would take a sign as well.
fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_with_the_blob() {
        for (header, size, expected) in [
            ("bytes=0-4", 10, Asked::Part(0, 5)),
            ("bytes=5-", 10, Asked::Part(5, 10)),
            ("bytes=-3", 10, Asked::Part(7, 10)),
            ("bytes=-30", 10, Asked::Part(0, 10)),
            ("bytes=9-99", 10, Asked::Part(9, 10)),
            ("bytes=9-18446744073709551615", 10, Asked::Part(9, 10)),
            ("bytes=10-", 10, Asked::Outside),
            ("bytes=10-11", 10, Asked::Outside),
            ("bytes=-0", 10, Asked::Outside),
            ("bytes=0-", 0, Asked::Outside),
            ("bytes=-1", 0, Asked::Outside),
            ("bytes=4-2", 10, Asked::Whole),
            ("bytes=0-1,4-5", 10, Asked::Whole),
            ("bytes=", 10, Asked::Whole),
            ("bytes=-", 10, Asked::Whole),
            ("bytes=+1-2", 10, Asked::Whole),
            ("bytes=18446744073709551616-", 10, Asked::Whole),
            ("lines=1-2", 10, Asked::Whole),
        ] {
            assert_eq!(asked(header, size), expected, "{header} of {size}");
        }
    }

    #[test]
    fn pieces_have_a_beginning_and_a_length() {
        assert_eq!(piece("0-0"), Some((0, 1)));
        assert_eq!(piece("10-19"), Some((10, 10)));
        assert_eq!(piece("bytes 10-19/*"), Some((10, 10)));
        for bad in ["", "1", "-", "2-1", "a-b", "+1-2", "1-", "-1", "0-18446744073709551615", "1-2-3"] {
            assert_eq!(piece(bad), None, "{bad}");
        }
    }
}
