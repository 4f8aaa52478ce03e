//! JSON as text: a member of it, and a form that people can read. Nothing is made of it, so that numbers keep their
//! digits, names their order, and a large document takes no more memory than it has bytes.

use std::io::{self, Write};

use serde::de::IgnoredAny;

use super::DocumentError;
use super::strict::MAX_DEPTH;

/// A document of which is known that it is JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JsonText<'j>(&'j str);

impl<'j> JsonText<'j> {
    /// Checks that `bytes` are JSON, and of no more levels than anybody needs.
    ///
    /// # Errors
    /// [`DocumentError::Json`], [`DocumentError::Depth`].
    pub fn new(bytes: &'j [u8]) -> Result<Self, DocumentError> {
        let text = std::str::from_utf8(bytes).map_err(|error| {
            DocumentError::Json(serde::de::Error::custom(format!(
                "it is no UTF-8 at byte {}",
                error.valid_up_to()
            )))
        })?;
        serde_json::from_str::<IgnoredAny>(text).map_err(DocumentError::Json)?;
        let mut depth = 0_usize;
        for (_, token) in Tokens::new(text) {
            match token {
                "{" | "[" => depth += 1,
                "}" | "]" => depth -= 1,
                _ => {}
            }
            if depth > MAX_DEPTH {
                return Err(DocumentError::Depth { at: "the document".to_owned() });
            }
        }
        Ok(Self(text))
    }

    /// As it was written.
    pub fn as_str(self) -> &'j str {
        self.0
    }

    /// The value of a name of the outermost object; of several the last one.
    pub fn member(self, name: &str) -> Option<Self> {
        self.0.trim_start().strip_prefix('{')?;
        let mut found = None;
        // Whether the name in front of the value is the one; `None`: it has not come yet.
        let (mut depth, mut is_it, mut begin) = (0_usize, None, 0);
        for (at, token) in Tokens::new(self.0) {
            match token {
                "{" | "[" => depth += 1,
                "," | "}" if depth == 1 => {
                    if is_it.take() == Some(true) {
                        found = Some(Self(self.0[begin..at].trim()));
                    }
                    depth -= usize::from(token == "}");
                }
                "}" | "]" => depth -= 1,
                ":" if depth == 1 => begin = at + 1,
                word if depth == 1 && is_it.is_none() => {
                    is_it = Some(serde_json::from_str::<String>(word).is_ok_and(|key| key == name));
                }
                _ => {}
            }
        }
        found
    }

    /// Writes it indented, with a line end behind it. In strings stands as an escape what a terminal would obey, or
    /// show as something else than it is; the value is the same.
    ///
    /// # Errors
    /// Those of `out`, which is written to in small pieces.
    pub fn write_pretty(self, out: &mut dyn Write) -> io::Result<()> {
        let mut depth = 0;
        let mut tokens = Tokens::new(self.0).peekable();
        while let Some((_, token)) = tokens.next() {
            match token {
                "{" | "[" => {
                    out.write_all(token.as_bytes())?;
                    if let Some((_, end)) = tokens.next_if(|(_, next)| matches!(*next, "}" | "]")) {
                        out.write_all(end.as_bytes())?;
                    } else {
                        depth += 1;
                        begin_line(out, depth)?;
                    }
                }
                "}" | "]" => {
                    depth -= 1;
                    begin_line(out, depth)?;
                    out.write_all(token.as_bytes())?;
                }
                "," => {
                    out.write_all(b",")?;
                    begin_line(out, depth)?;
                }
                ":" => out.write_all(b": ")?,
                word => write_word(out, word)?,
            }
        }
        out.write_all(b"\n")
    }
}

fn begin_line(out: &mut dyn Write, depth: usize) -> io::Result<()> {
    write!(out, "\n{:1$}", "", 2 * depth)
}

fn write_word(out: &mut dyn Write, word: &str) -> io::Result<()> {
    let mut rest = word;
    while let Some(at) = rest.find(is_hidden) {
        let (plain, behind) = rest.split_at(at);
        out.write_all(plain.as_bytes())?;
        let mut chars = behind.chars();
        if let Some(c) = chars.next() {
            // All of them have numbers of four digits.
            write!(out, "\\u{:04x}", u32::from(c))?;
        }
        rest = chars.as_str();
    }
    out.write_all(rest.as_bytes())
}

/// Whether `c` controls a terminal, turns the direction of writing, begins a line or is not to be seen.
fn is_hidden(c: char) -> bool {
    let is_mark = matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}');
    c.is_control() || is_mark || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Signs, strings with their quotes, numbers and words, each with where it begins.
struct Tokens<'j> {
    text: &'j str,
    at: usize,
}

impl<'j> Tokens<'j> {
    fn new(text: &'j str) -> Self {
        Self { text, at: 0 }
    }
}

impl<'j> Iterator for Tokens<'j> {
    type Item = (usize, &'j str);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.text.as_bytes();
        let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        let is_sign = |byte: &u8| matches!(byte, b'{' | b'}' | b'[' | b']' | b',' | b':');
        let begin = self.at + bytes[self.at..].iter().position(|byte| !is_blank(byte))?;
        let rest = &bytes[begin..];
        let length = match rest[0] {
            b'"' => {
                let mut length = 1;
                while rest.get(length).is_some_and(|byte| *byte != b'"') {
                    length += if rest[length] == b'\\' { 2 } else { 1 };
                }
                length + 1
            }
            _ if is_sign(&rest[0]) => 1,
            _ => rest.iter().position(|byte| is_blank(byte) || is_sign(byte)).unwrap_or(rest.len()),
        };
        self.at = begin + length;
        Some((begin, &self.text[begin..self.at]))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn text(json: &str) -> JsonText<'_> {
        JsonText::new(json.as_bytes()).unwrap()
    }

    fn pretty(json: &str) -> String {
        let mut shown = Vec::new();
        text(json).write_pretty(&mut shown).unwrap();
        String::from_utf8(shown).unwrap()
    }

    #[track_caller]
    fn check_member(json: &str, expected: Option<&str>) {
        assert_eq!(text(json).member("a").map(|found| found.0), expected, "{json}");
    }

    #[test]
    fn a_member_is_what_the_outermost_object_has_under_a_name() {
        check_member(r#"{"a":1}"#, Some("1"));
        check_member(r#" { "b" : [{"a":2}], "a" : { "a" : [1, 2] } , "c":3 } "#, Some(r#"{ "a" : [1, 2] }"#));
        check_member(r#"{"b":{"a":1}}"#, None);
        check_member(r#"[{"a":1}]"#, None);
        check_member(r#"{"b":"a","\u0061":null}"#, Some("null"));
        check_member(r#"{"b":"\"a\":1,","a":"x, \" }"}"#, Some(r#""x, \" }""#));
        check_member(r#"{"a":1,"a":2}"#, Some("2"));
        check_member(r#"["a", 1]"#, None);
        check_member(r#"{"\ud800":"a","b":1}"#, None);
        check_member("{}", None);
        check_member("1", None);
    }

    #[test]
    fn what_is_shown_is_the_same_value() {
        let values = [
            json!({}),
            json!([]),
            json!([[], {}, [1]]),
            json!({ "b": [1, -2.5, 1e300, true, null], "a": { "x": "é \u{1f980} \"\\ \n\t/" } }),
            json!("alone"),
        ];
        for value in values {
            for written in [value.to_string(), format!("{value:#}")] {
                let shown = pretty(&written);
                assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), value);
                assert_eq!(shown, format!("{value:#}\n"), "as serde_json has it");
            }
        }
        let digits = r#"{"z": 123456789012345678901234567890.10, "a": 1}"#;
        assert_eq!(pretty(digits), "{\n  \"z\": 123456789012345678901234567890.10,\n  \"a\": 1\n}\n");
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_shown() {
        let hostile = "\u{7f}\u{9b}31m\u{202e}\u{2028}\u{feff}\u{2066}";
        let written = serde_json::to_string(&json!({ hostile: hostile })).unwrap();
        let shown = pretty(&written);
        assert!(shown.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{shown:?}");
        assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), json!({ hostile: hostile }));
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(JsonText::new(nested(MAX_DEPTH).as_bytes()).is_ok());
        let deep = nested(MAX_DEPTH + 1);
        for bytes in [&b""[..], b"{", b"{} {}", b"\"\xff\"", b"\"\x1b\"", b"nul", deep.as_bytes()] {
            assert!(JsonText::new(bytes).is_err(), "{}", bytes.escape_ascii());
        }
    }
}
