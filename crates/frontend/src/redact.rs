//! Names and passwords in URLs do not show.

use std::borrow::Cow;
use std::ops::Range;

/// `text` with `***` instead of what logs in at the host of each URL in it. Who only names a user of
/// ssh or git keeps the name: it is no secret there.
///
/// Costs a pass over the text, and nothing more where there is no URL.
pub fn without_credentials(text: &str) -> Cow<'_, str> {
    replaced(text, |_| "***".to_owned())
}

/// The same in the same width, so that marks below the line still stand where they should.
pub fn masked_credentials(text: &str) -> Cow<'_, str> {
    replaced(text, |secret| "*".repeat(secret.chars().count()))
}

fn replaced(text: &str, mask: impl Fn(&str) -> String) -> Cow<'_, str> {
    let (mut out, mut kept) = (String::new(), 0);
    for Range { start, end } in credentials(text) {
        out.push_str(&text[kept..start]);
        out.push_str(&mask(&text[start..end]));
        kept = end;
    }
    if kept == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[kept..]);
    Cow::Owned(out)
}

/// Where credentials stand.
fn credentials(text: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    for (at, mark) in text.match_indices("://") {
        let word = |b: &u8| b.is_ascii_alphanumeric() || b"+-.".contains(b);
        let scheme = text.as_bytes()[..at].iter().rev().take_while(|b| word(b)).count();
        let scheme = &text[at - scheme..at];
        // Readers of URLs skip slashes that are too many.
        let behind = &text[at + mark.len()..];
        let start = text.len() - behind.trim_start_matches('/').len();
        let ends =
            |c: char| c.is_whitespace() || matches!(c, '/' | '?' | '#' | '"' | '\'' | '<' | '>' | '\\');
        let authority = &text[start..];
        let authority = &authority[..authority.find(ends).unwrap_or(authority.len())];
        let Some(user) = authority.rfind('@') else { continue };
        let password = authority[..user].find(':');
        let is_login = ["ssh", "git", "git+ssh", "ssh+git"].contains(&scheme.to_ascii_lowercase().as_str());
        let secret = match password {
            Some(colon) if is_login => colon + 1..user,
            None if is_login => continue,
            _ => 0..user,
        };
        if !secret.is_empty() {
            found.push(start + secret.start..start + secret.end);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_logs_in_is_replaced_in_every_url() {
        for (text, expected) in [
            ("ADD https://me:word@host/x /", "ADD https://***@host/x /"),
            ("https://token@h:80?a http://u:p@i#b", "https://***@h:80?a http://***@i#b"),
            ("https://a:b@c@host/", "https://***@host/"),
            ("https:///me:word@host/", "https:///***@host/"),
            ("curl \"ftp://me:w\u{f6}rd@host\"", "curl \"ftp://***@host\""),
            ("https://me:word@", "https://***@"),
            ("ssh://git:word@host/a", "ssh://git:***@host/a"),
            ("x=://u@h", "x=://***@h"),
        ] {
            assert_eq!(without_credentials(text), expected);
        }
    }

    #[test]
    fn all_else_stays() {
        for text in [
            "",
            "://",
            "git@host:a/b",
            "ssh://git@host/a",
            "https://host/a@b",
            "https://host?a@b",
            "https://host me@b",
            "https://@host/",
        ] {
            assert!(matches!(without_credentials(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    #[test]
    fn masks_keep_the_width() {
        let text = "ADD https://m\u{e9}:word@host/x /";
        assert_eq!(masked_credentials(text), "ADD https://*******@host/x /");
        assert_eq!(masked_credentials(text).chars().count(), text.chars().count());
    }
}
