//! Shell words: variables with their modifiers, quotes, escapes; and splitting into words.
//!
//! Every part that fails knows its place in the word, so that a message can point at it.

use std::collections::BTreeSet;

use crate::pattern::{Pattern, PatternError};

/// `${A:-${B:-…}}` nests at most this deep.
const MAX_DEPTH: usize = 64;
/// No expansion grows beyond this, however often it doubles.
pub(crate) const MAX_BYTES: usize = 1 << 20;

/// Looks a variable up.
pub(crate) type Lookup<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// How quotes and escapes are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quotes {
    /// Taken away, as a shell does.
    Remove,
    /// Ordinary characters: bodies of heredocs.
    Text,
}

/// An expanded word, and the variables in it that are not set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Expanded {
    pub(crate) text: String,
    pub(crate) unset: BTreeSet<String>,
    pub(crate) used: BTreeSet<String>,
}

/// Why a word cannot be expanded: bytes of the word, and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpandError {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) message: String,
}

/// Expands variables in `text`; quotes are removed or kept as `quotes` says.
pub(crate) fn expand(
    text: &str,
    escape: char,
    quotes: Quotes,
    lookup: &Lookup<'_>,
) -> Result<Expanded, ExpandError> {
    let mut expander = Expander { text, at: 0, escape, quotes, lookup, seen: Expanded::default() };
    let value = expander.until(None, false, 0)?;
    Ok(Expanded { text: value, ..expander.seen })
}

struct Expander<'a> {
    text: &'a str,
    /// Next byte to read.
    at: usize,
    escape: char,
    quotes: Quotes,
    lookup: &'a Lookup<'a>,
    seen: Expanded,
}

impl Expander<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn wrong<T>(&self, start: usize, message: impl Into<String>) -> Result<T, ExpandError> {
        let end = if start == self.at { self.text.len().min(start + 1) } else { self.at };
        Err(ExpandError { start, end, message: message.into() })
    }

    /// Everything up to `end`. With `raw_escapes` the escape character stays: a pattern needs it.
    fn until(&mut self, end: Option<char>, raw_escapes: bool, depth: usize) -> Result<String, ExpandError> {
        let start = self.at;
        if depth > MAX_DEPTH {
            return self.wrong(start, format!("variables are nested deeper than {MAX_DEPTH}"));
        }
        let mut out = String::new();
        loop {
            let here = self.at;
            let Some(c) = self.peek() else {
                let Some(end) = end else { return Ok(out) };
                return self.wrong(start.saturating_sub(1), format!("a closing `{end}` is missing"));
            };
            if Some(c) == end {
                self.next();
                return Ok(out);
            }
            match c {
                '$' => {
                    let value = self.dollar(depth)?;
                    out.push_str(&value);
                }
                '\'' if self.quotes == Quotes::Remove => self.single_quoted(&mut out)?,
                '"' if self.quotes == Quotes::Remove => self.double_quoted(&mut out, raw_escapes, depth)?,
                c if c == self.escape => {
                    self.next();
                    if raw_escapes {
                        out.push(c);
                    }
                    out.extend(self.next());
                }
                c => {
                    self.next();
                    out.push(c);
                }
            }
            if out.len() > MAX_BYTES {
                return self.wrong(here, format!("the expanded text is longer than {MAX_BYTES} bytes"));
            }
        }
    }

    fn single_quoted(&mut self, out: &mut String) -> Result<(), ExpandError> {
        let start = self.at;
        self.next();
        loop {
            match self.next() {
                Some('\'') => return Ok(()),
                Some(c) => out.push(c),
                None => return self.wrong(start, "a closing `'` is missing"),
            }
        }
    }

    /// Only the quote, `$` and the escape character itself can be escaped here (POSIX sh, 2.2.3).
    fn double_quoted(
        &mut self,
        out: &mut String,
        raw_escapes: bool,
        depth: usize,
    ) -> Result<(), ExpandError> {
        let start = self.at;
        self.next();
        loop {
            match self.peek() {
                None => return self.wrong(start, "a closing `\"` is missing"),
                Some('"') => {
                    self.next();
                    return Ok(());
                }
                Some('$') => {
                    let value = self.dollar(depth)?;
                    out.push_str(&value);
                }
                Some(c) if c == self.escape => {
                    self.next();
                    if raw_escapes {
                        out.push(c);
                    }
                    match self.peek() {
                        Some(next) if next == '"' || next == '$' || next == self.escape => {
                            self.next();
                            out.push(next);
                        }
                        _ if raw_escapes => {}
                        _ => out.push(c),
                    }
                }
                Some(c) => {
                    self.next();
                    out.push(c);
                }
            }
            if out.len() > MAX_BYTES {
                return self.wrong(start, format!("the expanded text is longer than {MAX_BYTES} bytes"));
            }
        }
    }

    fn dollar(&mut self, depth: usize) -> Result<String, ExpandError> {
        let start = self.at;
        self.next();
        if self.peek() == Some('{') {
            self.next();
            return self.braces(start, depth);
        }
        let name = self.name();
        if name.is_empty() { Ok("$".to_owned()) } else { Ok(self.get(&name).unwrap_or_default()) }
    }

    fn get(&mut self, name: &str) -> Option<String> {
        let value = (self.lookup)(name);
        let seen = if value.is_some() { &mut self.seen.used } else { &mut self.seen.unset };
        seen.insert(name.to_owned());
        value
    }

    /// A name, digits, or one special parameter (POSIX sh, 2.5.2), which is never set.
    fn name(&mut self) -> String {
        let start = self.at;
        match self.peek() {
            Some(c) if c.is_ascii_digit() => {
                while self.peek().is_some_and(|c| c.is_ascii_digit()) {
                    self.next();
                }
            }
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => {
                self.next();
            }
            _ => {
                while self.peek().is_some_and(|c| c.is_alphanumeric() || c == '_') {
                    self.next();
                }
            }
        }
        self.text[start..self.at].to_owned()
    }

    /// What follows `${`.
    fn braces(&mut self, start: usize, depth: usize) -> Result<String, ExpandError> {
        match self.peek() {
            None => return self.wrong(start, "a closing `}` is missing"),
            Some('{' | '}' | ':') => {
                self.next();
                return self.wrong(start, "`${` needs a variable name");
            }
            Some(_) => {}
        }
        let name = self.name();
        let mut modifier = String::new();
        let mut empty_is_unset = false;
        let operator_at = self.at;
        let mut operator = self.next();
        modifier.extend(operator);
        if operator == Some('}') {
            return Ok(self.get(&name).unwrap_or_default());
        }
        if operator == Some(':') {
            empty_is_unset = true;
            operator = self.next();
            modifier.extend(operator);
        }
        match operator {
            None => self.wrong(start, "a closing `}` is missing"),
            Some('-' | '+' | '?') => {
                let word = self.operand(start, '}', false, depth)?;
                let value = self.get(&name);
                let is_empty = value.as_deref() == Some("");
                let set = value.filter(|_| !(empty_is_unset && is_empty));
                match (operator, set) {
                    (Some('-'), None) | (Some('+'), Some(_)) => Ok(word),
                    (Some('+'), None) => Ok(String::new()),
                    (_, Some(value)) => Ok(value),
                    (_, None) if word.is_empty() && is_empty => {
                        self.wrong(start, format!("{name}: is not allowed to be empty"))
                    }
                    (_, None) if word.is_empty() => {
                        self.wrong(start, format!("{name}: is not allowed to be unset"))
                    }
                    (_, None) => self.wrong(start, format!("{name}: {word}")),
                }
            }
            Some(operator @ ('#' | '%')) if !empty_is_unset => {
                let word = self.operand(start, '}', true, depth)?;
                let longest = word.starts_with(operator);
                let pattern = self.pattern(start, if longest { &word[1..] } else { &word })?;
                let value = self.get(&name).unwrap_or_default();
                let trimmed = if operator == '#' {
                    pattern.trim_prefix(&value, longest)
                } else {
                    pattern.trim_suffix(&value, longest)
                };
                trimmed.map(str::to_owned).or_else(|error| self.wrong(start, error.to_string()))
            }
            Some('/') if !empty_is_unset => {
                let all = self.peek() == Some('/');
                if all {
                    self.next();
                }
                let pattern = self.operand(start, '/', true, depth)?;
                let pattern = self.pattern(start, &pattern)?;
                let replacement = self.operand(start, '}', true, depth)?;
                let value = self.get(&name).unwrap_or_default();
                let replaced = pattern.replace(&value, &replacement, all);
                let replaced = replaced.or_else(|error| self.wrong(start, error.to_string()))?;
                if replaced.len() > MAX_BYTES {
                    return self.wrong(start, format!("the expanded text is longer than {MAX_BYTES} bytes"));
                }
                Ok(replaced)
            }
            Some(_) => self.wrong(operator_at, format!("unsupported modifier `{modifier}` in ${{{name}…}}")),
        }
    }

    /// The word behind an operator; a missing end is reported at the `$`.
    fn operand(
        &mut self,
        start: usize,
        end: char,
        raw_escapes: bool,
        depth: usize,
    ) -> Result<String, ExpandError> {
        self.until(Some(end), raw_escapes, depth + 1).map_err(|mut error| {
            if error.message == format!("a closing `{end}` is missing") {
                error.start = start;
                error.end = self.text.len();
                if end == '/' {
                    error.message = "a second `/` is missing in ${…/pattern/replacement}".to_owned();
                }
            }
            error
        })
    }

    fn pattern(&self, start: usize, text: &str) -> Result<Pattern, ExpandError> {
        Pattern::parse(text).or_else(|error: PatternError| self.wrong(start, error.to_string()))
    }
}

/// A word of an instruction: bytes `start..end` of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// Splits `text[from..]` at white space outside quotes; quotes and escapes stay for [`expand`].
/// An unclosed quote reaches to the end.
pub(crate) fn split_quoted(text: &str, from: usize, escape: char) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut start, mut quote) = (None, None);
    let mut chars = text[from..].char_indices();
    while let Some((at, c)) = chars.next() {
        let at = from + at;
        match quote {
            None if c.is_whitespace() => {
                pieces.extend(start.take().map(|start| Piece { start, end: at }));
                continue;
            }
            None if c == '"' || c == '\'' => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
        start.get_or_insert(at);
        if c == escape && quote != Some('\'') {
            chars.next();
        }
    }
    pieces.extend(start.map(|start| Piece { start, end: text.len() }));
    pieces
}

/// Splits `text[from..]` at blanks; quotes mean nothing here.
pub(crate) fn split_blanks(text: &str, from: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut start = None;
    for (at, c) in text[from..].char_indices() {
        let at = from + at;
        if is_blank(c) {
            pieces.extend(start.take().map(|start| Piece { start, end: at }));
        } else {
            start.get_or_insert(at);
        }
    }
    pieces.extend(start.map(|start| Piece { start, end: text.len() }));
    pieces
}

/// What separates words of a Dockerfile.
pub(crate) fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\u{b}' | '\u{c}')
}

#[cfg(test)]
mod tests;
