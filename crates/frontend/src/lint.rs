//! Warnings: what the rules found.

use std::collections::BTreeSet;

use crate::ast::{Ast, Body, Instruction, Kind};
use crate::{CheckOptions, Diagnostic, Rule, Span};

/// Collects warnings of the rules that are switched on.
#[derive(Debug)]
pub(crate) struct Lint {
    options: CheckOptions,
    pub(crate) found: Vec<Diagnostic>,
}

impl Lint {
    pub(crate) fn new(options: CheckOptions) -> Self {
        Self { options, found: Vec::new() }
    }

    /// Whether warnings end the build.
    pub(crate) fn is_error(&self) -> bool {
        self.options.error
    }

    /// All warnings by their place, each once.
    pub(crate) fn finish(mut self) -> Vec<Diagnostic> {
        self.found.sort_by_key(|warning| (warning.span.start, warning.rule));
        self.found.dedup();
        self.found
    }

    /// Reports what is wrong with `instruction` at `span`.
    pub(crate) fn warn(
        &mut self,
        rule: Rule,
        instruction: &Instruction,
        span: Span,
        message: impl Into<String>,
        hint: Option<String>,
    ) {
        if self.options.with_comments(&instruction.line.comments).reports(rule) {
            self.found.push(Diagnostic::warning(span, Some(rule), message).with_hint(hint));
        }
    }

    /// What can be said of every instruction, reached or not.
    pub(crate) fn whole_file(&mut self, ast: &Ast) {
        self.casing(ast);
        let mut names: BTreeSet<String> = BTreeSet::new();
        for instruction in &ast.instructions {
            self.each(instruction);
            let Body::From(from) = &instruction.body else { continue };
            let Some((keyword, name)) = &from.name else { continue };
            let span = instruction.text_span(name);
            let lower = name.value.to_lowercase();
            if lower != name.value {
                let message = format!("stage name {:?} is not in lower case", name.value);
                self.warn(
                    Rule::StageNameCasing,
                    instruction,
                    span,
                    message,
                    Some(format!("write `{lower}`")),
                );
            }
            let differs = is_upper(&instruction.keyword) && !is_upper(keyword)
                || is_lower(&instruction.keyword) && !is_lower(keyword);
            if differs {
                let message = format!("`{keyword}` and `{}` are cased differently", instruction.keyword);
                self.warn(Rule::FromAsCasing, instruction, instruction.rest_span(), message, None);
            }
            if names.contains(&lower) {
                let message = format!("stage name {lower:?} is used again");
                let hint = Some("the later stage hides the earlier one".to_owned());
                self.warn(Rule::DuplicateStageName, instruction, span, message, hint);
            }
            if lower == "scratch" || lower == "context" {
                let message = format!("stage name {lower:?} is reserved");
                self.warn(Rule::ReservedStageName, instruction, span, message, None);
            }
            names.insert(lower);
        }
    }

    fn each(&mut self, instruction: &Instruction) {
        if let Some(span) = instruction.line.empty_line {
            let message = "a blank line stands inside a continued instruction";
            self.warn(Rule::NoEmptyContinuation, instruction, span, message, None);
        }
        match &instruction.body {
            Body::Maintainer(author) => {
                let hint = format!("write LABEL org.opencontainers.image.authors={:?}", author.value);
                let message = "MAINTAINER is deprecated";
                self.warn(Rule::MaintainerDeprecated, instruction, instruction.span(), message, Some(hint));
            }
            Body::Env(pairs) | Body::Label(pairs) => {
                let name = instruction.kind.name();
                for pair in pairs.iter().filter(|pair| pair.legacy) {
                    let message = format!("`{name} key value` is the deprecated form");
                    let hint = format!("write {name} {}=…", pair.name.value);
                    let span = instruction.rest_span();
                    self.warn(Rule::LegacyKeyValueFormat, instruction, span, message, Some(hint));
                }
            }
            Body::Arg(definitions) => {
                let names: Vec<&str> = definitions.iter().map(|arg| arg.name.value.as_str()).collect();
                self.description(instruction, &names);
            }
            Body::From(from) => {
                let names: Vec<&str> = from.name.iter().map(|(_, name)| name.value.as_str()).collect();
                self.description(instruction, &names);
            }
            _ => {}
        }
        let secrets: Vec<&crate::ast::Text> = match &instruction.body {
            Body::Arg(definitions) => definitions.iter().map(|arg| &arg.name).collect(),
            Body::Env(pairs) => pairs.iter().map(|pair| &pair.name).collect(),
            _ => Vec::new(),
        };
        for name in secrets.into_iter().filter(|name| looks_like_secret(&name.value)) {
            let message = format!(
                "{} {} looks like a secret, and everybody who has the image can read it",
                instruction.kind.name(),
                name.value
            );
            let hint = "pass it by RUN --mount=type=secret".to_owned();
            let span = instruction.text_span(name);
            self.warn(Rule::SecretsUsedInArgOrEnv, instruction, span, message, Some(hint));
        }
    }

    /// A comment directly above tells what the name is for, beginning with the name.
    fn description(&mut self, instruction: &Instruction, names: &[&str]) {
        let comments = &instruction.line.comments;
        let is_check = |comment: &String| comment.trim_start().to_ascii_lowercase().starts_with("check=");
        let Some(last) = comments.iter().rfind(|comment| !is_check(comment)) else { return };
        if names.is_empty() || names.iter().any(|name| description(comments, name).is_some()) {
            return;
        }
        let message = format!("the comment {last:?} is no description of {}", names.join(", "));
        let hint = format!("write `# {} what it is for`, or leave a blank line below the comment", names[0]);
        let span = instruction.rest_span();
        self.warn(Rule::InvalidDefinitionDescription, instruction, span, message, Some(hint));
    }

    fn casing(&mut self, ast: &Ast) {
        let count = |test: fn(&str) -> bool| ast.instructions.iter().filter(|i| test(&i.keyword)).count();
        let lower_wins = count(is_lower) > count(is_upper);
        for instruction in &ast.instructions {
            let fits =
                if lower_wins { is_lower(&instruction.keyword) } else { is_upper(&instruction.keyword) };
            if fits {
                continue;
            }
            let wanted = if lower_wins {
                instruction.kind.name().to_lowercase()
            } else {
                instruction.kind.name().to_owned()
            };
            let message = format!("`{}` is cased unlike the other instructions", instruction.keyword);
            let hint = Some(format!("write `{wanted}`"));
            let span = instruction.keyword_span();
            self.warn(Rule::ConsistentInstructionCasing, instruction, span, message, hint);
        }
    }

    /// A second CMD, ENTRYPOINT or HEALTHCHECK makes the first one useless.
    pub(crate) fn used_again(&mut self, kind: Kind, earlier: &Instruction) {
        let name = kind.name();
        let message = format!("this {name} has no effect: a later one in the stage replaces it");
        self.warn(Rule::MultipleInstructionsDisallowed, earlier, earlier.span(), message, None);
    }

    /// The shell form hides signals from the program.
    pub(crate) fn shell_form(&mut self, instruction: &Instruction) {
        let name = instruction.kind.name();
        let message = format!("{name} in shell form runs a shell, and signals do not reach the program");
        let hint = format!("write {name} [\"program\", \"argument\"]");
        let span = instruction.rest_span();
        self.warn(Rule::JSONArgsRecommended, instruction, span, message, Some(hint));
    }
}

/// The text behind `name` in the comment above a definition.
pub(crate) fn description(comments: &[String], name: &str) -> Option<String> {
    comments.iter().find_map(|comment| {
        let rest = comment.get(..name.len()).filter(|word| word.eq_ignore_ascii_case(name))?;
        let text = comment[rest.len()..].strip_prefix(' ')?.trim();
        (!text.is_empty()).then(|| text.to_owned())
    })
}

fn is_upper(word: &str) -> bool {
    !word.bytes().any(|b| b.is_ascii_lowercase())
}

fn is_lower(word: &str) -> bool {
    !word.bytes().any(|b| b.is_ascii_uppercase())
}

/// `DB_PASSWORD` is, `PASSWORD_FILE` and `KEYBOARD` are not.
pub fn looks_like_secret(name: &str) -> bool {
    const SECRET: [&str; 10] = [
        "apikey",
        "auth",
        "credential",
        "credentials",
        "key",
        "password",
        "pword",
        "passwd",
        "secret",
        "token",
    ];
    const HARMLESS: [&str; 3] = ["public", "file", "version"];
    let lower = name.to_ascii_lowercase();
    let has = |known: &[&str]| lower.split('_').any(|word| known.contains(&word));
    has(&SECRET) && !has(&HARMLESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_told_by_whole_words() {
        for name in ["PASSWORD", "DB_PASSWORD", "api_key", "TOKEN", "AWS_SECRET_ACCESS"] {
            assert!(looks_like_secret(name), "{name}");
        }
        for name in ["KEYBOARD", "PASSWORD_FILE", "PUBLIC_KEY", "TOKENS", "KEY_VERSION", "NAME"] {
            assert!(!looks_like_secret(name), "{name}");
        }
    }

    #[test]
    fn descriptions_begin_with_the_name() {
        let comments = ["something".to_owned(), "Version which one to fetch".to_owned()];
        assert_eq!(description(&comments, "VERSION").as_deref(), Some("which one to fetch"));
        assert_eq!(description(&comments, "other"), None);
    }
}
