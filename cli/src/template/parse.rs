//! Text to tree.

use nom::branch::alt;
use nom::bytes::complete::{tag, take_until, take_while, take_while1};
use nom::character::complete::{char, multispace0, multispace1, none_of};
use nom::combinator::{cut, map, opt, recognize, value, verify};
use nom::multi::{many0, separated_list1};
use nom::sequence::{delimited, pair, preceded, terminated};
use nom::{IResult, Parser};
use serde_json::{Number, Value};

use super::{Node, Operand, Pipeline, TemplateError, Term};

type Parsed<'a, T> = IResult<&'a str, T>;

/// What stands between `{{` and `}}`.
#[derive(Debug, Clone, PartialEq)]
enum Action {
    Comment,
    If(Pipeline),
    Range(Pipeline),
    With(Pipeline),
    ElseIf(Pipeline),
    Else,
    End,
    Print(Pipeline),
}

type Tokens = std::vec::IntoIter<Token>;

enum Token {
    Text(String),
    Action(Action),
}

/// How a block ended.
#[derive(Debug, PartialEq)]
enum Stop {
    End,
    Else,
    ElseIf(Pipeline),
    Text,
}

/// Blocks and parentheses may stand in each other this deep.
const MAX_DEPTH: usize = 64;

pub(super) fn template(text: &str) -> Result<Vec<Node>, TemplateError> {
    let mut tokens = tokens(text)?.into_iter();
    match block(&mut tokens, 0)? {
        (nodes, Stop::Text) => Ok(nodes),
        _ => Err(TemplateError("`end` or `else` without a beginning".to_owned())),
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, TemplateError> {
    let (mut rest, mut found, mut trim_next) = (text, Vec::new(), false);
    while !rest.is_empty() {
        let (mut before, action) = match rest.find("{{") {
            Some(at) => (&rest[..at], Some(&rest[at + 2..])),
            None => (rest, None),
        };
        if trim_next {
            before = before.trim_start();
        }
        let Some(inside) = action else {
            found.push(Token::Text(before.to_owned()));
            break;
        };
        // Go: the minus counts only with white space behind it.
        let trims = inside.strip_prefix('-').filter(|inside| inside.starts_with(char::is_whitespace));
        if trims.is_some() {
            before = before.trim_end();
        }
        if !before.is_empty() {
            found.push(Token::Text(before.to_owned()));
        }
        let inside = trims.unwrap_or(inside);
        if parens(inside) > MAX_DEPTH {
            return Err(TemplateError("it is nested too deeply".to_owned()));
        }
        let wrong = || {
            let shown: String = inside.chars().take(40).collect();
            TemplateError(format!("`{{{{{shown}` cannot be understood"))
        };
        let (after, parsed) = terminated(action_inside, multispace0).parse(inside).map_err(|_| wrong())?;
        found.push(Token::Action(parsed));
        (rest, trim_next) = match after.strip_prefix("-}}") {
            Some(rest) => (rest, true),
            None => (after.strip_prefix("}}").ok_or_else(wrong)?, false),
        };
    }
    Ok(found)
}

/// How many parentheses open before the action ends, at most.
fn parens(inside: &str) -> usize {
    let end = inside.find("}}").unwrap_or(inside.len());
    inside[..end].matches('(').count()
}

fn block(tokens: &mut Tokens, depth: usize) -> Result<(Vec<Node>, Stop), TemplateError> {
    if depth > MAX_DEPTH {
        return Err(TemplateError("it is nested too deeply".to_owned()));
    }
    let mut nodes = Vec::new();
    while let Some(token) = tokens.next() {
        let action = match token {
            Token::Text(text) => {
                nodes.push(Node::Text(text));
                continue;
            }
            Token::Action(action) => action,
        };
        match action {
            Action::Comment => {}
            Action::Print(pipeline) => nodes.push(Node::Action(pipeline)),
            Action::End => return Ok((nodes, Stop::End)),
            Action::Else => return Ok((nodes, Stop::Else)),
            Action::ElseIf(condition) => return Ok((nodes, Stop::ElseIf(condition))),
            Action::Range(pipeline) => {
                let (body, otherwise) = body(tokens, depth)?;
                nodes.push(Node::Range(pipeline, body, otherwise));
            }
            Action::With(pipeline) => {
                let (body, otherwise) = body(tokens, depth)?;
                nodes.push(Node::With(pipeline, body, otherwise));
            }
            Action::If(condition) => nodes.push(conditional(condition, tokens, depth)?),
        }
    }
    Ok((nodes, Stop::Text))
}

fn unclosed() -> TemplateError {
    TemplateError("an `end` is missing".to_owned())
}

/// A block up to `end`, with what stands behind `else`.
fn body(tokens: &mut Tokens, depth: usize) -> Result<(Vec<Node>, Vec<Node>), TemplateError> {
    match block(tokens, depth + 1)? {
        (body, Stop::End) => Ok((body, Vec::new())),
        (body, Stop::Else) => match block(tokens, depth + 1)? {
            (otherwise, Stop::End) => Ok((body, otherwise)),
            _ => Err(unclosed()),
        },
        _ => Err(unclosed()),
    }
}

fn conditional(condition: Pipeline, tokens: &mut Tokens, depth: usize) -> Result<Node, TemplateError> {
    let (mut branches, mut condition) = (Vec::new(), condition);
    loop {
        let (body, stop) = block(tokens, depth + 1)?;
        branches.push((condition, body));
        match stop {
            Stop::End => return Ok(Node::If(branches, Vec::new())),
            Stop::ElseIf(next) => condition = next,
            Stop::Else => match block(tokens, depth + 1)? {
                (otherwise, Stop::End) => return Ok(Node::If(branches, otherwise)),
                _ => return Err(unclosed()),
            },
            Stop::Text => return Err(unclosed()),
        }
    }
}

fn action_inside(input: &str) -> Parsed<'_, Action> {
    let word = |word| terminated(tag(word), verify(take_while(|_| false), |_: &str| true));
    preceded(
        multispace0,
        alt((
            value(Action::Comment, delimited(tag("/*"), take_until("*/"), tag("*/"))),
            map(preceded((word("if"), multispace1), cut(pipeline)), Action::If),
            map(preceded((word("range"), multispace1), cut(pipeline)), Action::Range),
            map(preceded((word("with"), multispace1), cut(pipeline)), Action::With),
            map(
                preceded((word("else"), multispace1, word("if"), multispace1), cut(pipeline)),
                Action::ElseIf,
            ),
            value(Action::Else, terminated(word("else"), end_of_word)),
            value(Action::End, terminated(word("end"), end_of_word)),
            map(pipeline, Action::Print),
        )),
    )
    .parse(input)
}

/// Nothing that a name could go on with.
fn end_of_word(input: &str) -> Parsed<'_, ()> {
    match input.chars().next() {
        Some(c) if c.is_alphanumeric() || c == '_' || c == '.' => {
            Err(nom::Err::Error(nom::error::Error::new(input, nom::error::ErrorKind::Verify)))
        }
        _ => Ok((input, ())),
    }
}

fn pipeline(input: &str) -> Parsed<'_, Pipeline> {
    let variable = preceded(char('$'), name);
    let declared = terminated(
        separated_list1((multispace0, char(','), multispace0), variable),
        (multispace0, alt((tag(":="), tag("="))), multispace0),
    );
    let commands = separated_list1((multispace0, char('|'), multispace0), command);
    map(pair(opt(declared), commands), |(variables, commands)| Pipeline {
        variables: variables.unwrap_or_default().into_iter().map(str::to_owned).collect(),
        commands,
    })
    .parse(input)
}

fn command(input: &str) -> Parsed<'_, Vec<Operand>> {
    separated_list1(multispace1, operand).parse(input)
}

fn name(input: &str) -> Parsed<'_, &str> {
    recognize(pair(
        take_while1(|c: char| c.is_alphabetic() || c == '_'),
        take_while(|c: char| c.is_alphanumeric() || c == '_'),
    ))
    .parse(input)
}

fn field(input: &str) -> Parsed<'_, String> {
    map(preceded(char('.'), name), str::to_owned).parse(input)
}

fn operand(input: &str) -> Parsed<'_, Operand> {
    let with = |term: Term| move |fields: Vec<String>| Operand { term: term.clone(), fields };
    alt((
        map(nom::multi::many1(field), |fields| Operand { term: Term::Dot, fields }),
        map(char('.'), |_| with(Term::Dot)(Vec::new())),
        map(pair(preceded(char('$'), opt(name)), many0(field)), |(name, fields)| Operand {
            term: Term::Variable(name.unwrap_or_default().to_owned()),
            fields,
        }),
        map(
            pair(delimited((char('('), multispace0), pipeline, (multispace0, char(')'))), many0(field)),
            |(inside, fields)| Operand { term: Term::Parens(Box::new(inside)), fields },
        ),
        map(literal, |value| Operand { term: Term::Literal(value), fields: Vec::new() }),
        map(name, |name| Operand { term: Term::Function(name.to_owned()), fields: Vec::new() }),
    ))
    .parse(input)
}

fn literal(input: &str) -> Parsed<'_, Value> {
    alt((
        map(delimited(char('"'), many0(character), char('"')), |text| {
            Value::String(text.into_iter().collect())
        }),
        map(delimited(char('`'), take_while(|c| c != '`'), char('`')), |text: &str| {
            Value::String(text.to_owned())
        }),
        map(terminated(tag("true"), end_of_word), |_| Value::Bool(true)),
        map(terminated(tag("false"), end_of_word), |_| Value::Bool(false)),
        map(terminated(tag("nil"), end_of_word), |_| Value::Null),
        number,
    ))
    .parse(input)
}

fn number(input: &str) -> Parsed<'_, Value> {
    let digits = |c: char| c.is_ascii_digit();
    let (rest, text) =
        recognize((opt(char('-')), take_while1(digits), opt(pair(char('.'), take_while1(digits)))))
            .parse(input)?;
    let number = match text.parse::<i64>() {
        Ok(whole) => Some(Number::from(whole)),
        Err(_) => text.parse::<f64>().ok().and_then(Number::from_f64),
    };
    match number {
        Some(number) => Ok((rest, Value::Number(number))),
        None => Err(nom::Err::Error(nom::error::Error::new(input, nom::error::ErrorKind::Digit))),
    }
}

fn character(input: &str) -> Parsed<'_, char> {
    let escaped = map(none_of("\n"), |c| match c {
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        other => other,
    });
    alt((preceded(char('\\'), escaped), none_of("\"\\\n"))).parse(input)
}
