//! Text out of images on the screen: what could move the cursor, or look like something else, is
//! shown as an escape.

/// A path: characters that print as they are, a backslash and all else as `\n`, `\u{202e}` or, what is
/// not UTF-8, `\xff`.
pub(crate) fn path(bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' | '\'' => shown.push(c),
                // Also a character that would join with the one in front of it.
                c => shown.extend(c.escape_debug()),
            }
        }
        shown.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    shown
}

/// What stands between double quotes: these and backslashes with a backslash in front, line ends as `\n`.
pub(crate) fn quoted(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\'' => shown.push(c),
            c => shown.extend(c.escape_debug()),
        }
    }
    shown
}

/// Text of several lines and columns: line feeds and tabs stay, other control characters do not.
pub(crate) fn text(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            c if c.is_control() => shown.extend(c.escape_debug()),
            c => shown.push(c),
        }
    }
    shown
}

/// One line of at most `width` characters; line ends and tabs are blanks.
pub(crate) fn line(text: &str, width: usize) -> String {
    let flat: String = text.chars().map(|c| if matches!(c, '\n' | '\t') { ' ' } else { c }).collect();
    let mut shown = String::new();
    for c in flat.trim().chars() {
        match c {
            '"' | '\'' | '\\' => shown.push(c),
            c => shown.extend(c.escape_debug()),
        }
    }
    match shown.char_indices().nth(width) {
        None => shown,
        Some(_) => shown.chars().take(width - 1).chain(['…']).collect(),
    }
}

/// A path in JSON: as text, and as hexadecimal digits of its bytes when it is none.
pub(crate) fn json(bytes: &[u8]) -> (String, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (text.to_owned(), None),
        Err(_) => {
            let hex = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            (String::from_utf8_lossy(bytes).into_owned(), Some(hex))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_show_what_they_are_and_nothing_else() {
        for (bytes, shown) in [
            (&b"etc/it's \"x\""[..], "etc/it's \"x\""),
            ("köln/文".as_bytes(), "köln/文"),
            (b"a\nb\x1b[2J\\", "a\\nb\\u{1b}[2J\\\\"),
            ("\u{202e}txt\u{200b}".as_bytes(), "\\u{202e}txt\\u{200b}"),
            (b"\xff\xfe", "\\xff\\xfe"),
        ] {
            assert_eq!(path(bytes), shown);
        }
    }

    #[test]
    fn lines_are_one_and_short() {
        assert_eq!(line("RUN a\n\tb 'c' \\d\x07", 80), "RUN a  b 'c' \\d\\u{7}");
        assert_eq!(line("0123456789", 10), "0123456789");
        assert_eq!(line("0123456789x", 10), "012345678…");
    }

    #[test]
    fn json_has_bytes_where_text_would_lie() {
        assert_eq!(json(b"a\nb"), ("a\nb".to_owned(), None));
        assert_eq!(json(b"a\xff"), ("a\u{fffd}".to_owned(), Some("61ff".to_owned())));
    }
}
