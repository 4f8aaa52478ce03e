//! Lines: comments, continuations, heredoc bodies. What is left is one piece of text an
//! instruction, with a map back to the file.

use std::sync::Arc;

use crate::directive::{Directives, directives};
use crate::heredoc::{Heredoc, openers};
use crate::{Diagnostic, Span};

/// One instruction's text with line continuations taken out.
#[derive(Debug)]
pub(crate) struct Line {
    /// Joined text, blanks around it dropped.
    pub(crate) text: String,
    /// Where runs of `text` stand in the file: offset in `text`, offset in the file.
    runs: Vec<(usize, usize)>,
    /// Everything of this line is reported here: triggers of a base image stand in no file.
    stands_for: Option<Span>,
    pub(crate) heredocs: Vec<Heredoc>,
    /// Comments directly above, the one farthest away first.
    pub(crate) comments: Vec<String>,
    /// The first empty line inside a continued instruction.
    pub(crate) empty_line: Option<Span>,
    /// Lines of the file, counted from 1.
    pub(crate) first_line: usize,
    pub(crate) last_line: usize,
}

impl Line {
    /// Bytes of the file behind bytes of `text`.
    pub(crate) fn span(&self, start: usize, end: usize) -> Span {
        if let Some(span) = self.stands_for {
            return span;
        }
        let from = self.place(start);
        let to = if end > start { self.place(end - 1) + 1 } else { from };
        Span { start: from, end: to }
    }

    /// The whole instruction without heredoc bodies.
    pub(crate) fn whole(&self) -> Span {
        self.span(0, self.text.len())
    }

    fn place(&self, at: usize) -> usize {
        let run = self.runs.partition_point(|(start, _)| *start <= at).saturating_sub(1);
        self.runs.get(run).map_or(0, |(start, file)| file + at.saturating_sub(*start))
    }
}

/// A Dockerfile as instructions.
#[derive(Debug)]
pub(crate) struct Lexed {
    pub(crate) directives: Directives,
    pub(crate) lines: Vec<Arc<Line>>,
}

/// A physical line longer than this is refused, as BuildKit does.
const MAX_LINE_BYTES: usize = 65_535;

/// A line of the file without its end.
pub(crate) struct Physical<'a> {
    pub(crate) start: usize,
    pub(crate) text: &'a str,
    crlf: bool,
}

/// Splits a Dockerfile into instructions. With `stands_for`, all of it is reported at that place.
pub(crate) fn lex(text: &str, stands_for: Option<Span>) -> Result<Lexed, Diagnostic> {
    let at = |span| stands_for.unwrap_or(span);
    let mut physical = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        if line.len() > MAX_LINE_BYTES + 1 {
            let span = at(Span { start, end: start + 1 });
            return Err(Diagnostic::error(span, format!("the line is longer than {MAX_LINE_BYTES} bytes")));
        }
        let ended = line.strip_suffix('\n').unwrap_or(line);
        let bare = ended.strip_suffix('\r').unwrap_or(ended);
        physical.push(Physical { start, text: bare, crlf: bare.len() < ended.len() });
        start += line.len();
    }
    let (directives, first) = directives(&physical)?;
    let mut lexer = Lexer { physical, next: first, escape: directives.escape, stands_for };
    let mut lines = Vec::new();
    let mut comments = Vec::new();
    while let Some(line) = lexer.physical.get(lexer.next) {
        let text = line.text.trim_start();
        match text.strip_prefix('#') {
            Some(comment) if !comment.trim().is_empty() => comments.push(comment.trim().to_owned()),
            None if !text.is_empty() => {
                lines.push(Arc::new(lexer.instruction(std::mem::take(&mut comments))?));
                continue;
            }
            // An empty line or comment takes what stands above it away from what follows.
            _ => comments.clear(),
        }
        lexer.next += 1;
    }
    Ok(Lexed { directives, lines })
}

struct Lexer<'a> {
    physical: Vec<Physical<'a>>,
    /// Index of the next physical line.
    next: usize,
    escape: char,
    stands_for: Option<Span>,
}

impl Lexer<'_> {
    /// Reads the instruction that starts at the next line, with its heredocs.
    fn instruction(&mut self, comments: Vec<String>) -> Result<Line, Diagnostic> {
        let first = self.next;
        let (mut text, mut runs) = (String::new(), Vec::new());
        let (mut last, mut empty_line) = (first, None);
        let mut crlf = false;
        while let Some(line) = self.physical.get(self.next) {
            let trimmed = line.text.trim_start();
            let is_first = self.next == first;
            self.next += 1;
            if !is_first && trimmed.starts_with('#') {
                continue;
            }
            if !is_first && trimmed.is_empty() {
                empty_line.get_or_insert(Span { start: line.start, end: line.start + line.text.len() });
                continue;
            }
            last = self.next - 1;
            crlf = line.crlf;
            let from = if is_first { line.text.len() - trimmed.len() } else { 0 };
            let (piece, continued) = strip_continuation(&line.text[from..], self.escape);
            if !piece.is_empty() {
                runs.push((text.len(), line.start + from));
                text.push_str(piece);
            }
            if !continued {
                break;
            }
        }
        text.truncate(text.trim_end().len());
        let mut line = Line {
            text,
            runs,
            stands_for: self.stands_for,
            heredocs: Vec::new(),
            comments,
            empty_line,
            first_line: first + 1,
            last_line: last + 1,
        };
        for mut heredoc in openers(&line.text, self.escape) {
            heredoc.body = self.body(&heredoc, &line, crlf)?;
            line.last_line = self.next;
            line.heredocs.push(heredoc);
        }
        Ok(line)
    }

    /// The lines up to the heredoc's name. Files with CRLF give the same body as files with LF.
    fn body(&mut self, heredoc: &Heredoc, line: &Line, crlf: bool) -> Result<String, Diagnostic> {
        let mut body = String::new();
        loop {
            let Some(physical) = self.physical.get(self.next) else {
                let span = line.span(heredoc.word.start, heredoc.word.end);
                let message = format!(
                    "the heredoc `{}` is not closed",
                    &line.text[heredoc.word.start..heredoc.word.end]
                );
                let hint = if heredoc.name.ends_with("))") {
                    // `$((1 << 3))`
                    "for a shift in shell arithmetic put no blank in front of `<<`".to_owned()
                } else {
                    format!("put `{}` alone on a line behind its text", heredoc.name)
                };
                return Err(Diagnostic::error(span, message).with_hint(Some(hint)));
            };
            self.next += 1;
            let content =
                if heredoc.strip_tabs { physical.text.trim_start_matches('\t') } else { physical.text };
            if content == heredoc.name {
                return Ok(body);
            }
            body.push_str(physical.text);
            body.push_str(if physical.crlf && !crlf { "\r\n" } else { "\n" });
        }
    }
}

/// The escape character at the end of a line, with blanks behind it, continues the line, unless
/// another one stands before it.
fn strip_continuation(line: &str, escape: char) -> (&str, bool) {
    match line.trim_end_matches([' ', '\t']).strip_suffix(escape) {
        Some(rest) if !rest.ends_with(escape) => (rest, true),
        _ => (line, false),
    }
}
