//! Instructions: keyword, flags, arguments. nom inside one instruction's text.

use nom::bytes::complete::{tag, take_till, take_while, take_while1};
use nom::combinator::opt;
use nom::multi::many0;
use nom::sequence::{preceded, terminated};
use nom::{IResult, Parser};

use crate::ast::{Ast, Flag, Instruction, Kind, Text};
use crate::lexer::{Logical, lex};
use crate::suggest::did_you_mean;
use crate::{Diagnostic, Span};

/// Parses a Dockerfile. The tree is of use only when no diagnostic is an error.
pub fn parse(text: &str) -> (Ast, Vec<Diagnostic>) {
    let mut ast = Ast { escape: '\\', instructions: Vec::new() };
    let lexed = match lex(text) {
        Ok(lexed) => lexed,
        Err(diagnostic) => return (ast, vec![diagnostic]),
    };
    ast.escape = lexed.escape;
    let mut diagnostics = Vec::new();
    for line in &lexed.lines {
        match instruction(line) {
            Ok(instruction) => ast.instructions.push(instruction),
            Err(diagnostic) => diagnostics.push(diagnostic),
        }
    }
    if lexed.lines.is_empty() {
        diagnostics.push(Diagnostic::error(Span { start: 0, end: 0 }, "the Dockerfile has no instructions"));
    }
    (ast, diagnostics)
}

fn blank(input: &str) -> IResult<&str, &str> {
    take_while(|c: char| c.is_ascii_whitespace()).parse(input)
}

fn keyword(input: &str) -> IResult<&str, &str> {
    terminated(take_till(|c: char| c.is_ascii_whitespace()), blank).parse(input)
}

/// `--name[=value]` and the blanks behind it; the value ends at a blank outside quotes.
fn flag(input: &str) -> IResult<&str, (&str, &str, Option<&str>)> {
    let name = take_while1(|c: char| c.is_ascii_alphanumeric() || c == '-');
    let value = preceded(tag("="), quoted_word);
    let (after, (name, value)) = preceded(tag("--"), (name, opt(value))).parse(input)?;
    let (rest, _) = blank(after)?;
    Ok((rest, (input, name, value)))
}

fn quoted_word(input: &str) -> IResult<&str, &str> {
    let mut quote = None;
    let mut escaped = false;
    let end = input.char_indices().find(|&(_, c)| {
        let ends = quote.is_none() && !escaped && c.is_ascii_whitespace();
        match (quote, c) {
            _ if escaped => escaped = false,
            (_, '\\') => escaped = true,
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            _ => {}
        }
        ends
    });
    let end = end.map_or(input.len(), |(at, _)| at);
    Ok((&input[end..], &input[..end]))
}

fn instruction(line: &Logical) -> Result<Instruction, Diagnostic> {
    let text = line.text.as_str();
    let place = |part: &str| {
        let start = text.len() - part.len();
        start..start
    };
    let unparsed = |_| Diagnostic::error(line.whole(), "the instruction cannot be read");
    let (rest, word) = keyword(text).map_err(unparsed)?;
    let known = Kind::ALL.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
    let Some((name, kind)) = known else {
        let hint = did_you_mean(word, Kind::ALL.iter().map(|(name, _)| *name));
        let message = format!("unknown instruction `{word}`");
        return Err(Diagnostic::error(line.span(0, word.len()), message).with_hint(hint));
    };
    let (rest, found) = if kind.flags().is_empty() {
        (rest, Vec::new())
    } else {
        many0(flag).parse(rest).map_err(unparsed)?
    };
    let mut flags: Vec<Flag> = Vec::new();
    for (at, flag, value) in found {
        let start = place(at).start;
        let length = 2 + flag.len() + value.map_or(0, |value| value.len() + 1);
        let span = line.span(start, start + 2 + flag.len());
        let Some((_, supported)) = kind.flags().iter().find(|(known, _)| *known == flag) else {
            let hint = did_you_mean(flag, kind.flags().iter().map(|(name, _)| *name))
                .map(|hint| hint.replace('`', "`--").replacen("`--?", "`?", 1));
            let message = format!("unknown flag `--{flag}` for {name}");
            return Err(Diagnostic::error(span, message).with_hint(hint));
        };
        if !supported {
            return Err(Diagnostic::error(span, format!("{name} --{flag} is not supported yet")));
        }
        if flags.iter().any(|known| known.name == flag) {
            return Err(Diagnostic::error(span, format!("--{flag} is given twice")));
        }
        let value = value.map(|value| value.chars().filter(|c| !matches!(c, '"' | '\'')).collect());
        flags.push(Flag { name: flag.to_owned(), value, span: line.span(start, start + length) });
    }
    let start = place(rest).start;
    let rest = Text { value: rest.to_owned(), span: line.span(start, text.len()) };
    if rest.value.is_empty() {
        return Err(Diagnostic::error(line.whole(), format!("{name} needs at least one argument")));
    }
    let json = if kind.takes_json() { json_list(&rest)? } else { None };
    Ok(Instruction {
        kind: *kind,
        flags,
        json,
        heredocs: line.heredocs.clone(),
        title: text.split_whitespace().collect::<Vec<_>>().join(" "),
        rest,
        span: line.whole(),
        first_line: line.first_line,
        last_line: line.last_line,
    })
}

/// The exec form. Text that only looks like JSON is shell form, as in docker; a list that holds
/// something other than strings is an error.
fn json_list(rest: &Text) -> Result<Option<Vec<String>>, Diagnostic> {
    if !rest.value.starts_with('[') {
        return Ok(None);
    }
    let Ok(list) = serde_json::from_str::<Vec<serde_json::Value>>(&rest.value) else { return Ok(None) };
    let strings: Option<Vec<String>> = list.iter().map(|value| value.as_str().map(str::to_owned)).collect();
    strings.map(Some).ok_or_else(|| Diagnostic::error(rest.span, "only strings are allowed in the JSON list"))
}
