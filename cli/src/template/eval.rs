//! Tree and values to text.

use std::cmp::Ordering;

use serde_json::Value;

use super::{Node, Operand, Pipeline, TemplateError, Term};

/// Objects whose keys users choose: what is not in them is no mistake in the template.
const MAPS: [&str; 12] = [
    "Labels",
    "Ports",
    "PortBindings",
    "Networks",
    "Options",
    "Volumes",
    "ExposedPorts",
    "Sysctls",
    "Tmpfs",
    "DriverOpts",
    "Annotations",
    "Storage",
];

/// More text than this nobody has asked for.
const MAX_BYTES: usize = 64 << 20;

struct Scope<'a> {
    root: &'a Value,
    variables: Vec<(String, Value)>,
    out: String,
}

/// A value, and whether users choose its keys.
struct Found {
    value: Value,
    is_map: bool,
}

impl From<Value> for Found {
    fn from(value: Value) -> Self {
        Self { value, is_map: false }
    }
}

fn wrong<T>(message: impl Into<String>) -> Result<T, TemplateError> {
    Err(TemplateError(message.into()))
}

pub(super) fn render(nodes: &[Node], value: &Value) -> Result<String, TemplateError> {
    let mut scope = Scope { root: value, variables: Vec::new(), out: String::new() };
    scope.nodes(nodes, value)?;
    Ok(scope.out)
}

/// What Go calls true: what is not empty.
fn holds(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

/// As Go prints values.
fn show(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(" "))
        }
        Value::Object(fields) => {
            let shown = fields.iter().map(|(name, value)| format!("{name}:{}", show(value)));
            format!("map[{}]", shown.collect::<Vec<_>>().join(" "))
        }
    }
}

impl Scope<'_> {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> Result<(), TemplateError> {
        for node in nodes {
            self.node(node, dot)?;
            if self.out.len() > MAX_BYTES {
                return wrong("it gives too much text");
            }
        }
        Ok(())
    }

    /// The same with variables that end with it.
    fn block(&mut self, nodes: &[Node], dot: &Value) -> Result<(), TemplateError> {
        let known = self.variables.len();
        let done = self.nodes(nodes, dot);
        self.variables.truncate(known);
        done
    }

    fn node(&mut self, node: &Node, dot: &Value) -> Result<(), TemplateError> {
        match node {
            Node::Text(text) => self.out.push_str(text),
            Node::Action(pipeline) => {
                let value = self.pipeline(pipeline, dot)?;
                if pipeline.variables.is_empty() {
                    self.out.push_str(&show(&value));
                } else {
                    self.declare(&pipeline.variables, &[value]);
                }
            }
            Node::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if holds(&self.pipeline(condition, dot)?) {
                        return self.block(body, dot);
                    }
                }
                self.block(otherwise, dot)?;
            }
            Node::With(pipeline, body, otherwise) => {
                let value = self.pipeline(pipeline, dot)?;
                let known = self.variables.len();
                self.declare(&pipeline.variables, std::slice::from_ref(&value));
                let done = if holds(&value) { self.block(body, &value) } else { self.block(otherwise, dot) };
                self.variables.truncate(known);
                done?;
            }
            Node::Range(pipeline, body, otherwise) => self.range(pipeline, body, otherwise, dot)?,
        }
        Ok(())
    }

    fn range(
        &mut self,
        pipeline: &Pipeline,
        body: &[Node],
        otherwise: &[Node],
        dot: &Value,
    ) -> Result<(), TemplateError> {
        let entries: Vec<(Value, Value)> = match self.pipeline(pipeline, dot)? {
            Value::Array(items) => {
                items.into_iter().enumerate().map(|(at, item)| (Value::from(at), item)).collect()
            }
            Value::Object(fields) => {
                fields.into_iter().map(|(name, value)| (Value::String(name), value)).collect()
            }
            Value::Null => Vec::new(),
            other => return wrong(format!("range cannot go over {}", show(&other))),
        };
        if entries.is_empty() {
            return self.block(otherwise, dot);
        }
        for (key, value) in entries {
            let known = self.variables.len();
            match pipeline.variables.len() {
                0 => {}
                1 => self.declare(&pipeline.variables, std::slice::from_ref(&value)),
                _ => self.declare(&pipeline.variables, &[key, value.clone()]),
            }
            let done = self.block(body, &value);
            self.variables.truncate(known);
            done?;
        }
        Ok(())
    }

    fn declare(&mut self, names: &[String], values: &[Value]) {
        self.variables.extend(names.iter().cloned().zip(values.iter().cloned()));
    }

    fn pipeline(&self, pipeline: &Pipeline, dot: &Value) -> Result<Value, TemplateError> {
        let mut last: Option<Value> = None;
        for command in &pipeline.commands {
            last = Some(self.command(command, last.take(), dot)?);
        }
        Ok(last.unwrap_or(Value::Null))
    }

    fn command(
        &self,
        command: &[Operand],
        piped: Option<Value>,
        dot: &Value,
    ) -> Result<Value, TemplateError> {
        let Some((first, rest)) = command.split_first() else { return wrong("an empty command") };
        let arguments = |scope: &Self| {
            let given = rest.iter().map(|operand| scope.operand(operand, dot)).collect::<Result<Vec<_>, _>>();
            given.map(|mut given| {
                given.extend(piped.clone());
                given
            })
        };
        if let Term::Function(name) = &first.term {
            // These two look at no more than they must.
            if let "and" | "or" = name.as_str() {
                return self.junction(name == "and", rest, piped, dot);
            }
            return call(name, arguments(self)?);
        }
        // docker's lists have one method.
        if first.term == Term::Dot && first.fields == ["Label"] {
            let name = arguments(self)?;
            let Some(Value::String(name)) = name.first() else { return wrong("Label needs a name") };
            let labels = dot.get("_Labels").or_else(|| dot.get("Labels"));
            return Ok(labels.and_then(|all| all.get(name)).cloned().unwrap_or_else(|| "".into()));
        }
        if !rest.is_empty() || piped.is_some() {
            return wrong("only functions take arguments");
        }
        self.operand(first, dot)
    }

    fn junction(
        &self,
        all: bool,
        rest: &[Operand],
        piped: Option<Value>,
        dot: &Value,
    ) -> Result<Value, TemplateError> {
        let mut last = Value::Null;
        for operand in rest {
            last = self.operand(operand, dot)?;
            if holds(&last) != all {
                return Ok(last);
            }
        }
        Ok(piped.unwrap_or(last))
    }

    fn operand(&self, operand: &Operand, dot: &Value) -> Result<Value, TemplateError> {
        let mut found = Found::from(match &operand.term {
            Term::Dot => dot.clone(),
            Term::Literal(value) => value.clone(),
            Term::Parens(pipeline) => self.pipeline(pipeline, dot)?,
            Term::Variable(name) if name.is_empty() => self.root.clone(),
            Term::Variable(name) => match self.variables.iter().rev().find(|(known, _)| known == name) {
                Some((_, value)) => value.clone(),
                None => return wrong(format!("there is no variable ${name}")),
            },
            Term::Function(name) => call(name, Vec::new())?,
        });
        for name in &operand.fields {
            found = field(found, name)?;
        }
        Ok(found.value)
    }
}

fn field(of: Found, name: &str) -> Result<Found, TemplateError> {
    let is_map = MAPS.contains(&name);
    match of.value {
        Value::Object(mut fields) => match fields.remove(name) {
            Some(value) => Ok(Found { value, is_map }),
            None if of.is_map => Ok(Value::Null.into()),
            None => wrong(format!("there is no field .{name}")),
        },
        Value::Null => wrong(format!("nothing is there that could have a field .{name}")),
        other => wrong(format!("{} has no field .{name}", show(&other))),
    }
}

fn text_of(value: Option<&Value>, function: &str) -> Result<String, TemplateError> {
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(_) | Value::Object(_)) | None => wrong(format!("{function} needs a text")),
        Some(other) => Ok(show(other)),
    }
}

fn count_of(value: Option<&Value>, function: &str) -> Result<usize, TemplateError> {
    let count = value.and_then(Value::as_u64).and_then(|count| usize::try_from(count).ok());
    count.filter(|count| *count < MAX_BYTES).map_or_else(|| wrong(format!("{function} needs a number")), Ok)
}

fn call(name: &str, arguments: Vec<Value>) -> Result<Value, TemplateError> {
    let (first, second) = (arguments.first(), arguments.get(1));
    let text = |value| text_of(value, name);
    Ok(match name {
        "json" => match first {
            Some(value) => value.to_string().into(),
            None => return wrong("json needs a value"),
        },
        "upper" => text(first)?.to_uppercase().into(),
        "lower" => text(first)?.to_lowercase().into(),
        "title" => {
            let text = text(first)?;
            let mut chars = text.chars();
            chars.next().map_or(String::new(), |c| c.to_uppercase().chain(chars).collect()).into()
        }
        "join" => match first {
            Some(Value::Array(items)) => {
                items.iter().map(show).collect::<Vec<_>>().join(&text(second)?).into()
            }
            Some(Value::Null) => "".into(),
            _ => return wrong("join needs a list"),
        },
        "split" => {
            let (whole, by) = (text(first)?, text(second)?);
            whole.split(by.as_str()).map(str::to_owned).collect::<Vec<_>>().into()
        }
        "truncate" => {
            let count = count_of(second, name)?;
            text(first)?.chars().take(count).collect::<String>().into()
        }
        "pad" => {
            let (before, after) = (count_of(second, name)?, count_of(arguments.get(2), name)?);
            format!("{}{}{}", " ".repeat(before), text(first)?, " ".repeat(after)).into()
        }
        "len" => match first {
            Some(Value::String(text)) => text.len().into(),
            Some(Value::Array(items)) => items.len().into(),
            Some(Value::Object(fields)) => fields.len().into(),
            Some(Value::Null) => 0.into(),
            _ => return wrong("len needs a text, a list or a map"),
        },
        "index" => index(arguments)?,
        "not" => (!first.is_some_and(holds)).into(),
        "and" | "or" => first.cloned().unwrap_or(Value::Null),
        "eq" => {
            let Some((first, rest)) = arguments.split_first().filter(|(_, rest)| !rest.is_empty()) else {
                return wrong("eq needs two values");
            };
            rest.iter().any(|other| other == first).into()
        }
        "ne" => (first != second).into(),
        "lt" | "le" | "gt" | "ge" => {
            let order = compare(first, second)?;
            match name {
                "lt" => order == Ordering::Less,
                "le" => order != Ordering::Greater,
                "gt" => order == Ordering::Greater,
                _ => order != Ordering::Less,
            }
            .into()
        }
        "print" => arguments.iter().map(show).collect::<String>().into(),
        "println" => format!("{}\n", arguments.iter().map(show).collect::<Vec<_>>().join(" ")).into(),
        "printf" => {
            let format = text(first)?;
            printf(&format, &arguments[1..])?.into()
        }
        _ => return wrong(format!("there is no function {name}")),
    })
}

fn compare(one: Option<&Value>, other: Option<&Value>) -> Result<Ordering, TemplateError> {
    match (one, other) {
        (Some(Value::String(one)), Some(Value::String(other))) => Ok(one.cmp(other)),
        (Some(Value::Number(one)), Some(Value::Number(other))) => {
            let order = one.as_f64().zip(other.as_f64()).and_then(|(one, other)| one.partial_cmp(&other));
            Ok(order.unwrap_or(Ordering::Equal))
        }
        _ => wrong("values of different kinds cannot be compared"),
    }
}

fn index(arguments: Vec<Value>) -> Result<Value, TemplateError> {
    let mut arguments = arguments.into_iter();
    let Some(mut value) = arguments.next() else { return wrong("index needs a value") };
    for key in arguments {
        value = match (value, &key) {
            (Value::Object(mut fields), Value::String(name)) => {
                fields.remove(name).unwrap_or_else(|| "".into())
            }
            (Value::Array(mut items), Value::Number(_)) => {
                let at = count_of(Some(&key), "index")?;
                if at >= items.len() {
                    return wrong(format!("index {at} is out of range"));
                }
                items.swap_remove(at)
            }
            (Value::Null, _) => return wrong("index of nothing"),
            (other, _) => return wrong(format!("{} cannot be indexed by {}", show(&other), show(&key))),
        };
    }
    Ok(value)
}

/// `%s`, `%v`, `%d`, `%q`, `%f`, `%t`, `%%` with `-`, width and precision.
fn printf(format: &str, arguments: &[Value]) -> Result<String, TemplateError> {
    let (mut out, mut arguments) = (String::new(), arguments.iter());
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let left = chars.next_if_eq(&'-').is_some();
        let number = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| {
            let mut digits = String::new();
            while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            digits.parse::<usize>().ok().map(|number| number.min(10_000))
        };
        let width = number(&mut chars).unwrap_or(0);
        let precision = chars.next_if_eq(&'.').map(|_| number(&mut chars).unwrap_or(0));
        let verb = chars.next();
        if verb == Some('%') {
            out.push('%');
            continue;
        }
        let Some(value) = arguments.next() else { return wrong("printf lacks a value") };
        let shown = match verb {
            Some('s' | 'v' | 'd' | 't') => show(value),
            Some('q') => Value::String(show(value)).to_string(),
            Some('f') => format!("{:.*}", precision.unwrap_or(6), value.as_f64().unwrap_or(0.0)),
            _ => return wrong("printf knows %s, %v, %d, %q, %f and %t"),
        };
        out.push_str(&if left { format!("{shown:<width$}") } else { format!("{shown:>width$}") });
    }
    Ok(out)
}
