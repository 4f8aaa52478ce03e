//! `--format`: the part of Go's templates that people script docker with.
//!
//! `parse.rs` makes a tree of the text, `eval.rs` fills it in from JSON values.
//!
//! Text stands as it is; `{{…}}` is replaced. There are fields (`.State.Pid`, `$`, `$name`), `if`,
//! `else if`, `else`, `range`, `with`, `end`, variables, pipes, parentheses, comments, `{{-` and `-}}`,
//! and the functions `json join split upper lower title print printf println len index eq ne lt le gt ge
//! and or not truncate pad`.

mod eval;
mod parse;

use serde_json::Value;

use crate::escape;

/// A template, parsed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Template(Vec<Node>);

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Text(String),
    /// Prints what it gives, unless it declares variables.
    Action(Pipeline),
    /// The first whose condition holds, else the rest.
    If(Vec<(Pipeline, Vec<Node>)>, Vec<Node>),
    Range(Pipeline, Vec<Node>, Vec<Node>),
    With(Pipeline, Vec<Node>, Vec<Node>),
}

#[derive(Debug, Clone, PartialEq)]
struct Pipeline {
    /// Variables it is assigned to.
    variables: Vec<String>,
    /// Each gets what the one before gave as its last argument.
    commands: Vec<Vec<Operand>>,
}

/// A term and the fields asked of it.
#[derive(Debug, Clone, PartialEq)]
struct Operand {
    term: Term,
    fields: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
enum Term {
    Dot,
    Variable(String),
    Function(String),
    Literal(Value),
    Parens(Box<Pipeline>),
}

/// Why a template gives nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TemplateError(pub(crate) String);

impl std::fmt::Display for TemplateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "template: {}", self.0)
    }
}

impl Template {
    pub(crate) fn parse(text: &str) -> Result<Self, TemplateError> {
        parse::template(text).map(Self)
    }

    /// Fills it in; a field that is not there is an error, in maps of the user's it is `<no value>`.
    pub(crate) fn render(&self, value: &Value) -> Result<String, TemplateError> {
        eval::render(&self.0, value)
    }
}

/// What `--format` of a listing asks for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Listing {
    /// The usual table, of these columns.
    Table(Template),
    /// One line an entry.
    Lines(Template),
    /// One object an entry.
    Json,
}

impl Listing {
    /// `table TEMPLATE`, `json`, or a template; `usual` is what `table` alone means.
    pub(crate) fn parse(format: Option<&str>, usual: &str) -> Result<Self, TemplateError> {
        let columns = |text: &str| Template::parse(&text.replace("\\t", "\t").replace("\\n", "\n"));
        Ok(match format {
            None | Some("table") => Self::Table(columns(usual)?),
            Some("json") => Self::Json,
            Some(text) => match text.strip_prefix("table ") {
                Some(rest) => Self::Table(columns(rest.trim_start())?),
                None => Self::Lines(columns(text)?),
            },
        })
    }

    /// The text for all entries; `headers` names the columns.
    pub(crate) fn render(&self, headers: &Value, entries: &[Value]) -> Result<String, TemplateError> {
        match self {
            Self::Json => Ok(entries.iter().map(|entry| format!("{}\n", public(entry))).collect()),
            Self::Lines(template) => {
                let line = |entry| template.render(entry).map(|line| format!("{}\n", escape::text(&line)));
                entries.iter().map(line).collect()
            }
            Self::Table(template) => {
                let mut rows = vec![template.render(headers)?];
                for entry in entries {
                    rows.push(template.render(entry)?);
                }
                let rows: Vec<Vec<String>> =
                    rows.iter().map(|row| row.split('\t').map(escape::text).collect()).collect();
                Ok(crate::commands::table(&rows))
            }
        }
    }
}

/// An entry without what only functions look at.
fn public(entry: &Value) -> Value {
    let mut entry = entry.clone();
    if let Value::Object(fields) = &mut entry {
        fields.retain(|name, _| !name.starts_with('_'));
    }
    entry
}

#[cfg(test)]
mod tests;
