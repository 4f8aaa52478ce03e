//! Blocks of `Name: value` lines, as Debian's and Python's package managers write them.

/// The fields of one block. Values of several lines keep the first one.
#[derive(Debug, Default)]
pub(super) struct Stanza {
    fields: Vec<(String, String)>,
}

impl Stanza {
    /// The first field of this name, in whatever letters.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let found = self.fields.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }
}

/// The blocks of a file, one after the other; of the fields only those named.
pub(super) fn stanzas<'a>(bytes: &'a [u8], wanted: &'a [&str]) -> impl Iterator<Item = Stanza> + 'a {
    let mut lines = bytes.split(|&b| b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    std::iter::from_fn(move || {
        let mut stanza = Stanza::default();
        let mut is_begun = false;
        for line in lines.by_ref() {
            if line.is_empty() {
                if is_begun {
                    return Some(stanza);
                }
                continue;
            }
            is_begun = true;
            // A line that begins with a blank goes on with the one before.
            let Some(colon) = line.iter().position(|&b| b == b':').filter(|_| !line[0].is_ascii_whitespace())
            else {
                continue;
            };
            let name = String::from_utf8_lossy(&line[..colon]);
            if wanted.iter().any(|wanted| wanted.eq_ignore_ascii_case(&name)) {
                let value = String::from_utf8_lossy(&line[colon + 1..]).trim().to_owned();
                stanza.fields.push((name.into_owned(), value));
            }
        }
        is_begun.then_some(stanza)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_end_at_empty_lines_and_values_at_their_first_line() {
        let text =
            b"\n\nPackage: a\nVersion:  1 \nDescription: x\n y: z\n.\n\n\npackage: b\r\nVersion: \xff\n";
        let found: Vec<_> = stanzas(text, &["Package", "Version"])
            .map(|stanza| {
                (stanza.get("PACKAGE").map(str::to_owned), stanza.get("version").map(str::to_owned))
            })
            .collect();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(found, [(text("a"), text("1")), (text("b"), text("\u{fffd}"))]);
        assert_eq!(stanzas(b"\n\n", &["a"]).count(), 0);
        assert_eq!(stanzas(b"a:\n", &["a"]).next().unwrap().get("a"), None);
    }
}
