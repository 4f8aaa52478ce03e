//! What is wrong, and where.

use crate::Rule;
use crate::redact::{masked_credentials, without_credentials};

/// Bytes of the Dockerfile: `start` inclusive, `end` exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// Behind the last byte.
    pub end: usize,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// No build.
    Error,
    /// No build, because it asks for what nobody may have.
    Refused,
    /// Worth a look.
    Warning,
}

/// A message about a place in a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Where.
    pub span: Span,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// The rule that found it; `None` for what ends the build anyway.
    pub rule: Option<Rule>,
}

impl Diagnostic {
    /// An error without a hint.
    pub(crate) fn error(span: Span, message: impl Into<String>) -> Self {
        let message = without_credentials(&message.into()).into_owned();
        Self { severity: Severity::Error, span, message, hint: None, rule: None }
    }

    /// What security policy refuses.
    pub(crate) fn refused(span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Refused, ..Self::error(span, message) }
    }

    /// A warning.
    pub(crate) fn warning(span: Span, rule: Option<Rule>, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, rule, ..Self::error(span, message) }
    }

    /// Whether it ends the build.
    pub fn is_error(&self) -> bool {
        self.severity != Severity::Warning
    }

    /// The same with a hint, where there is one.
    pub(crate) fn with_hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint.map(|hint| without_credentials(&hint).into_owned());
        self
    }

    /// The message with the marked source lines, as it is shown to users.
    ///
    /// ```text
    /// error: unknown instruction `RNU`
    ///   Dockerfile:2:1
    ///      1 |     FROM debian
    ///      2 | >>> RNU make
    ///        |     ^^^
    /// hint: did you mean `RUN`?
    /// ```
    pub fn render(&self, file: &str, text: &str) -> String {
        let severity = match self.severity {
            Severity::Error | Severity::Refused => "error",
            Severity::Warning => "warning",
        };
        let rule = self.rule.map(|rule| format!("{}: ", rule.name())).unwrap_or_default();
        let mut out = format!("{severity}: {rule}{}\n", visible(&self.message));
        out.push_str(&frame(self.span, file, text));
        if let Some(hint) = &self.hint {
            out.push_str(&format!("hint: {}\n", visible(hint)));
        }
        out
    }
}

fn frame(span: Span, file: &str, text: &str) -> String {
    // What stands nowhere in the file: an argument of the command line, an empty file.
    if span.end == 0 {
        return format!("  {file}\n");
    }
    let start = span.start.min(text.len());
    let end = span.end.clamp(start, text.len());
    let line_of = |at: usize| text.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
    let (first, last) =
        (line_of(start), line_of(end.max(start + 1).min(text.len()).saturating_sub(1).max(start)));
    let line_start = text.as_bytes()[..start].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    let column = String::from_utf8_lossy(&text.as_bytes()[line_start..start]).chars().count();
    let mut out = format!("  {file}:{}:{}\n", first + 1, column + 1);
    let before = text.as_bytes()[..line_start.saturating_sub(1)].iter().rposition(|&b| b == b'\n');
    let shown_from = before.map_or(0, |at| at + 1);
    let numbers = first.saturating_sub(1)..(last + 1).min(first + 6);
    for (number, line) in numbers.zip(text[shown_from..].lines()) {
        let marked = number >= first;
        let mark = if marked { ">>>" } else { "   " };
        out.push_str(&format!("{:6} | {mark} {}\n", number + 1, clean(line)));
        if number == first && first == last {
            let width = String::from_utf8_lossy(&text.as_bytes()[start..end]).chars().count().max(1);
            let blanks: String =
                line.chars().take(column).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
            out.push_str(&format!("       |     {blanks}{}\n", "^".repeat(width.min(200))));
        }
    }
    out
}

fn clean(line: &str) -> String {
    visible(&masked_credentials(line)).chars().take(400).collect()
}

/// A Dockerfile may come from anybody: no control byte of it reaches the terminal.
fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}
