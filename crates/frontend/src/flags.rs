//! `--name[=value]` words behind a keyword.

use crate::ast::{Flag, FlagValue, Kind, Text};
use crate::lexer::Line;
use crate::suggest::nearest;
use crate::words::Piece;
use crate::{Diagnostic, Span};

/// Reads the flags of an instruction from `from` on; they and the start of what follows.
///
/// They end at the first word without two dashes, or behind a lone `--`.
pub(crate) fn flags(
    line: &Line,
    from: usize,
    kind: Kind,
    escape: char,
) -> Result<(Vec<Flag>, usize), Diagnostic> {
    let text = line.text.as_str();
    let mut flags: Vec<Flag> = Vec::new();
    let mut at = skip_blanks(text, from);
    while text[at..].starts_with("--") {
        let (word, end) = unquoted_word(text, at, escape);
        let piece = Piece { start: at, end };
        at = skip_blanks(text, end);
        if word == "--" {
            break;
        }
        let flag = flag(text, piece, &word);
        check(line, kind, &flag, &flags)?;
        flags.push(flag);
    }
    Ok((flags, at))
}

fn skip_blanks(text: &str, from: usize) -> usize {
    text[from..].find(|c: char| !c.is_whitespace()).map_or(text.len(), |at| from + at)
}

/// The word at `start` without its quotes and escapes, and where it ends.
fn unquoted_word(text: &str, start: usize, escape: char) -> (String, usize) {
    let (mut word, mut quote) = (String::new(), None);
    let mut chars = text[start..].char_indices();
    while let Some((at, c)) = chars.next() {
        match quote {
            None if c.is_whitespace() => return (word, start + at),
            None if c == '"' || c == '\'' => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ if c == escape => word.extend(chars.next().map(|(_, c)| c)),
            _ => word.push(c),
        }
    }
    (word, text.len())
}

fn flag(text: &str, piece: Piece, word: &str) -> Flag {
    let (name, value) = match word[2..].split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (&word[2..], None),
    };
    let value = value.map(|value| {
        let start = text[piece.start..piece.end].find('=').map_or(piece.end, |at| piece.start + at + 1);
        let exact = &text[start..piece.end] == value;
        Text { value: value.to_owned(), piece: Piece { start, end: piece.end }, exact }
    });
    Flag { name: name.to_owned(), value, piece }
}

fn check(line: &Line, kind: Kind, flag: &Flag, earlier: &[Flag]) -> Result<(), Diagnostic> {
    let Flag { name, value, piece } = flag;
    let name_span: Span = line.span(piece.start, piece.end.min(piece.start + 2 + name.len()));
    let Some((_, takes)) = kind.flags().iter().find(|(known, _)| known == name) else {
        let near = nearest(name, kind.flags().iter().map(|(name, _)| *name));
        let hint = match near {
            Some(near) => Some(format!("did you mean `--{near}`?")),
            None if kind.flags().is_empty() => Some(format!("{} takes no flags", kind.name())),
            None => {
                let known: Vec<String> = kind.flags().iter().map(|(name, _)| format!("--{name}")).collect();
                Some(format!("{} takes {}", kind.name(), known.join(", ")))
            }
        };
        let message = format!("unknown flag `--{name}` for {}", kind.name());
        return Err(Diagnostic::error(name_span, message).with_hint(hint));
    };
    if *takes != FlagValue::Texts && earlier.iter().any(|known| known.name == *name) {
        return Err(Diagnostic::error(name_span, format!("`--{name}` is given twice")));
    }
    let span = line.span(piece.start, piece.end);
    match (takes, value) {
        (FlagValue::Switch, Some(value)) if !matches!(value.value.as_str(), "true" | "false") => {
            let message = format!("`--{name}` takes true or false, not {:?}", value.value);
            Err(Diagnostic::error(span, message))
        }
        (FlagValue::Text | FlagValue::Texts, None) => {
            Err(Diagnostic::error(span, format!("`--{name}` needs a value, such as --{name}=…")))
        }
        _ => Ok(()),
    }
}
