//! Parser directives: `# syntax=`, `# escape=`, `# check=` at the very top, and `# kiln:` behind them.

use crate::check::CheckOptions;
use crate::lexer::Physical;
use crate::suggest::did_you_mean;
use crate::{Diagnostic, Span};

/// What stands above the first instruction.
#[derive(Debug, Clone)]
pub(crate) struct Directives {
    pub(crate) escape: char,
    pub(crate) syntax: Option<String>,
    pub(crate) check: CheckOptions,
    /// `# kiln: cache-ttl`: RUN takes `--cache-ttl`.
    pub(crate) cache_ttl: bool,
    /// As written, for the tree's dump.
    pub(crate) written: Vec<(String, String)>,
}

/// Reads the directives; the index of the line behind them.
///
/// They end at the first line that is none: a blank line, another comment, an instruction.
pub(crate) fn directives(lines: &[Physical<'_>]) -> Result<(Directives, usize), Diagnostic> {
    let mut found = Directives::default();
    other_comment_styles(lines)?;
    let mut at = usize::from(lines.first().is_some_and(|line| line.text.starts_with("#!")));
    let mut is_over = false;
    while let Some(line) = lines.get(at) {
        if let Some(names) = extensions(line.text) {
            // A comment for others, which ends their directives.
            is_over = true;
            found.extend(line, names)?;
            at += 1;
            continue;
        }
        if is_over {
            break;
        }
        let Some((name, value)) = directive(line.text) else { break };
        let value_at = line.start + line.text.rfind(value).unwrap_or(0);
        let span = Span { start: value_at, end: value_at + value.len() };
        let name = name.to_ascii_lowercase();
        if !matches!(name.as_str(), "escape" | "syntax" | "check") {
            break;
        }
        if found.written.iter().any(|(known, _)| *known == name) {
            let span = Span { start: line.start, end: line.start + line.text.len() };
            return Err(Diagnostic::error(span, format!("only one {name} parser directive can be used")));
        }
        match name.as_str() {
            "escape" => match value {
                "\\" => {}
                "`" => found.escape = '`',
                _ => {
                    let message = format!("invalid escape {value:?}: only \\ and ` can be used");
                    return Err(Diagnostic::error(span, message));
                }
            },
            "syntax" => {
                check_frontend(value, span)?;
                found.syntax = Some(value.to_owned());
            }
            _ => {
                found.check =
                    CheckOptions::parse(value).map_err(|message| Diagnostic::error(span, message))?;
            }
        }
        found.written.push((name, value.to_owned()));
        at += 1;
    }
    Ok((found, at))
}

/// What goes beyond docker's language, and is switched on by name.
const EXTENSIONS: [&str; 1] = ["cache-ttl"];

/// The names behind `# kiln:`.
fn extensions(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix('#')?.trim_start();
    let (name, names) = text.split_once(':')?;
    name.trim_end().eq_ignore_ascii_case("kiln").then(|| names.trim())
}

impl Default for Directives {
    fn default() -> Self {
        let check = CheckOptions::default();
        Self { escape: '\\', syntax: None, check, cache_ttl: false, written: Vec::new() }
    }
}

impl Directives {
    fn extend(&mut self, line: &Physical<'_>, names: &str) -> Result<(), Diagnostic> {
        let known = || format!("kiln knows {}", EXTENSIONS.join(", "));
        let whole = Span { start: line.start, end: line.start + line.text.len() };
        let mut any = false;
        for name in names.split([',', ' ', '\t']).filter(|name| !name.is_empty()) {
            any = true;
            if !EXTENSIONS.contains(&name) {
                let message = format!("there is no extension {name:?}");
                let hint = did_you_mean(name, EXTENSIONS).unwrap_or_else(known);
                return Err(Diagnostic::error(whole, message).with_hint(Some(hint)));
            }
            self.cache_ttl = true;
        }
        if !any {
            return Err(Diagnostic::error(whole, "`# kiln:` names no extension").with_hint(Some(known())));
        }
        self.written.push(("kiln".to_owned(), names.to_owned()));
        Ok(())
    }
}

/// `# name = value`: a comment whose text is a name, an equals sign and something behind it.
fn directive(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.trim_start().strip_prefix('#')?.trim_start().split_once('=')?;
    let (name, value) = (name.trim_end(), value.trim());
    let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric())
        && !value.is_empty();
    is_name.then_some((name, value))
}

/// Files in other languages name their frontend by `//syntax=` or a JSON key.
fn other_comment_styles(lines: &[Physical<'_>]) -> Result<(), Diagnostic> {
    let Some(line) = lines.first() else { return Ok(()) };
    let text = line.text.trim_start();
    let span = Span { start: line.start, end: line.start + line.text.len() };
    if let Some(rest) = text.strip_prefix("//")
        && let Some((name, value)) = rest.trim_start().split_once('=')
        && name.trim_end().eq_ignore_ascii_case("syntax")
    {
        return check_frontend(value.trim(), span);
    }
    if text.starts_with('{') {
        let all: Vec<&str> = lines.iter().map(|line| line.text).collect();
        let json = serde_json::from_str::<serde_json::Value>(&all.join("\n")).unwrap_or_default();
        if let Some(value) = json.get("syntax").and_then(|value| value.as_str()) {
            return check_frontend(value, span);
        }
    }
    Ok(())
}

/// The stable and labs channels of docker's own frontend are built in; nothing else is fetched.
pub(crate) fn check_frontend(value: &str, span: Span) -> Result<(), Diagnostic> {
    let image = value.split_whitespace().next().unwrap_or_default();
    let image =
        ["docker.io/", "index.docker.io/"].iter().find_map(|host| image.strip_prefix(host)).unwrap_or(image);
    let name = image.split([':', '@']).next().unwrap_or_default();
    if matches!(name, "docker/dockerfile" | "docker/dockerfile-upstream" | "dockerfile.v0") {
        return Ok(());
    }
    let message = format!("the external frontend {value:?} is not supported");
    let hint = "remove the line, or use docker/dockerfile:1, which kiln has built in";
    Err(Diagnostic::error(span, message).with_hint(Some(hint.to_owned())))
}
