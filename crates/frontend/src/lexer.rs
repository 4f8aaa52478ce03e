//! Lines: directives, comments, continuations, heredocs. What is left is one piece of text an
//! instruction, with a map back to the file.

use crate::{Diagnostic, Span};

/// One instruction's text with line continuations taken out.
#[derive(Debug, Clone)]
pub(crate) struct Logical {
    /// Joined text, blanks around it dropped.
    pub(crate) text: String,
    /// For each byte of `text`, and its end: the byte of the file.
    offsets: Vec<usize>,
    /// Bodies of the heredocs that it opens, in order.
    pub(crate) heredocs: Vec<Heredoc>,
    /// Lines of the file, counted from 1.
    pub(crate) first_line: usize,
    pub(crate) last_line: usize,
}

/// A heredoc's word and body.
#[derive(Debug, Clone)]
pub(crate) struct Heredoc {
    /// As written: `<<EOF`.
    pub(crate) opener: String,
    pub(crate) name: String,
    pub(crate) body: String,
    pub(crate) strip_tabs: bool,
}

impl Logical {
    /// Bytes of the file behind bytes of `text`.
    pub(crate) fn span(&self, start: usize, end: usize) -> Span {
        let last = self.offsets.len() - 1;
        let from = self.offsets[start.min(last)];
        let to = if end > start { self.offsets[(end - 1).min(last)] + 1 } else { from };
        Span { start: from, end: to }
    }

    /// The whole instruction.
    pub(crate) fn whole(&self) -> Span {
        self.span(0, self.text.len())
    }
}

/// A Dockerfile as instructions.
#[derive(Debug)]
pub(crate) struct Lexed {
    pub(crate) escape: char,
    pub(crate) lines: Vec<Logical>,
}

/// A physical line longer than this is refused, as BuildKit does.
const MAX_LINE_BYTES: usize = 65_535;

struct Physical<'a> {
    start: usize,
    text: &'a str,
}

/// Splits a Dockerfile into instructions.
pub(crate) fn lex(text: &str) -> Result<Lexed, Diagnostic> {
    let mut physical = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        if line.len() > MAX_LINE_BYTES {
            let span = Span { start, end: start + 1 };
            return Err(Diagnostic::error(span, format!("the line is longer than {MAX_LINE_BYTES} bytes")));
        }
        physical.push(Physical { start, text: line.trim_end_matches(['\n', '\r']) });
        start += line.len();
    }
    let (escape, mut at) = directives(&physical)?;
    let mut lines = Vec::new();
    while at < physical.len() {
        let line = physical[at].text.trim_start();
        if line.is_empty() || line.starts_with('#') {
            at += 1;
            continue;
        }
        let (logical, next) = instruction(&physical, at, escape)?;
        lines.push(logical);
        at = next;
    }
    Ok(Lexed { escape, lines })
}

/// `# escape=`, `# syntax=`, `# check=` at the very top.
fn directives(lines: &[Physical<'_>]) -> Result<(char, usize), Diagnostic> {
    let mut escape = '\\';
    let mut seen: Vec<String> = Vec::new();
    let mut at = usize::from(lines.first().is_some_and(|line| line.text.starts_with("#!")));
    while let Some(line) = lines.get(at) {
        let Some((name, value)) =
            line.text.trim_start().strip_prefix('#').and_then(|rest| rest.split_once('='))
        else {
            break;
        };
        let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
        let span = Span { start: line.start, end: line.start + line.text.len() };
        match name.as_str() {
            "escape" => match value {
                "\\" | "`" => escape = if value == "`" { '`' } else { '\\' },
                _ => return Err(Diagnostic::error(span, format!("escape must be \\ or `, not {value:?}"))),
            },
            "syntax" if !is_stable_frontend(value) => {
                let message = format!("the external frontend {value:?} is not supported");
                let hint = "remove the line, or use docker/dockerfile:1, which kiln has built in";
                return Err(Diagnostic::error(span, message).with_hint(Some(hint.to_owned())));
            }
            "syntax" | "check" => {}
            _ => break,
        }
        if seen.contains(&name) {
            return Err(Diagnostic::error(span, format!("only one {name} parser directive can be used")));
        }
        seen.push(name);
        at += 1;
    }
    Ok((escape, at))
}

fn is_stable_frontend(value: &str) -> bool {
    let image = value.split_whitespace().next().unwrap_or_default();
    let image = image.strip_prefix("docker.io/").unwrap_or(image);
    let name = image.split([':', '@']).next().unwrap_or_default();
    matches!(name, "docker/dockerfile" | "docker/dockerfile-upstream" | "dockerfile.v0")
}

/// Reads the instruction that starts at line `at`; the line after it.
fn instruction(lines: &[Physical<'_>], at: usize, escape: char) -> Result<(Logical, usize), Diagnostic> {
    let (mut text, mut offsets) = (String::new(), Vec::new());
    let mut next = at;
    let mut last = at;
    while let Some(line) = lines.get(next) {
        let trimmed = line.text.trim_start();
        let first = next == at;
        next += 1;
        if !first && (trimmed.is_empty() || trimmed.starts_with('#')) {
            continue;
        }
        last = next - 1;
        let from = if first { line.text.len() - trimmed.len() } else { 0 };
        let (piece, continued) = strip_continuation(&line.text[from..], escape);
        text.push_str(piece);
        offsets.extend((0..piece.len()).map(|byte| line.start + from + byte));
        if !continued {
            break;
        }
    }
    let kept = text.trim_end().len();
    text.truncate(kept);
    offsets.truncate(kept);
    offsets.push(offsets.last().map_or(lines[at].start, |end| end + 1));
    let mut logical =
        Logical { text, offsets, heredocs: Vec::new(), first_line: at + 1, last_line: last + 1 };
    for (opener, name, strip_tabs) in openers(&logical.text) {
        let opened = logical.whole();
        let mut body = String::new();
        loop {
            let Some(line) = lines.get(next) else {
                return Err(Diagnostic::error(
                    opened,
                    format!("the heredoc `{opener}` has no closing `{name}`"),
                ));
            };
            next += 1;
            let content = if strip_tabs { line.text.trim_start_matches('\t') } else { line.text };
            if content == name {
                break;
            }
            body.push_str(content);
            body.push('\n');
        }
        logical.last_line = next;
        logical.heredocs.push(Heredoc { opener, name, body, strip_tabs });
    }
    Ok((logical, next))
}

/// The escape character at the end of a line, with blanks behind it, continues the line, unless
/// another one stands before it.
fn strip_continuation(line: &str, escape: char) -> (&str, bool) {
    match line.trim_end_matches([' ', '\t']).strip_suffix(escape) {
        Some(rest) if !rest.ends_with(escape) => (rest, true),
        _ => (line, false),
    }
}

/// Heredoc words of RUN, COPY and ADD: word as written, name, whether tabs are stripped.
fn openers(text: &str) -> Vec<(String, String, bool)> {
    let keyword = text.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
    if !matches!(keyword.as_str(), "RUN" | "COPY" | "ADD") {
        return Vec::new();
    }
    let mut found = Vec::new();
    for word in text.split_whitespace().skip(1) {
        let digits = word.trim_start_matches(|c: char| c.is_ascii_digit());
        let Some(rest) = digits.strip_prefix("<<") else { continue };
        let (strip_tabs, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
        let name: String = rest.chars().filter(|c| !matches!(c, '"' | '\'')).collect();
        if !name.is_empty() && !rest.contains('<') && name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            found.push((word.to_owned(), name, strip_tabs));
        }
    }
    found
}
