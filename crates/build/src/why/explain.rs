//! Compares what a step's key is made of with what it was made of before.

use std::collections::BTreeSet;

use super::listing::Listing;
use super::pre_image::{InputImage, PreImage, named};
use super::reason::{Reason, VariableKind};

/// What else is known when two pre-images are compared.
pub(crate) struct Around<'a> {
    /// Titles of the steps that ran in this build so far.
    pub(crate) ran: &'a BTreeSet<String>,
    /// Reads a list of files that is kept under a name.
    pub(crate) list: &'a dyn Fn(&str) -> Option<Listing>,
}

/// How `now` differs from `before`; empty: not at all, as far as is known.
pub(crate) fn differences(now: &PreImage, before: &PreImage, around: &Around<'_>) -> Vec<Reason> {
    let mut out = Vec::new();
    let is_other = now.text() != before.text();
    if is_other && now.op != before.op {
        let (from, to) = (before.text().to_owned(), now.text().to_owned());
        out.push(Reason::Instruction { from, to });
    }
    compare_parts(now, before, is_other, &mut out);
    if out.is_empty() && now.op != before.op {
        out.push(Reason::Hidden);
    }
    compare_inputs(now, before, around, &mut out);
    out
}

fn compare_parts(now: &PreImage, before: &PreImage, is_other: bool, out: &mut Vec<Reason>) {
    let (new, old) = (named(&now.parts), named(&before.parts));
    let value = |parts: &[(String, Vec<&str>)], name: &str| {
        parts.iter().find(|(known, _)| known == name).map(|(_, values)| values.join(" "))
    };
    let gone = old.iter().filter(|(name, _)| new.iter().all(|(known, _)| known != name));
    for (name, _) in new.iter().chain(gone) {
        let (from, to) = (value(&old, name), value(&new, name));
        if from == to {
            continue;
        }
        if let Some(variable) = name.strip_prefix("env ") {
            let is_arg = now.args.iter().chain(&before.args).any(|arg| arg == variable);
            let kind = if is_arg { VariableKind::Arg } else { VariableKind::Env };
            out.push(Reason::Variable { kind, name: variable.to_owned(), from, to });
        } else if !is_other {
            // An instruction that reads otherwise says it better than its parts.
            out.push(Reason::Part { name: plain(name).to_owned(), from, to });
        }
    }
}

/// A component's name in words of Dockerfiles.
fn plain(name: &str) -> &str {
    match name {
        "arg" => "the command",
        "cwd" => "WORKDIR",
        "user" => "USER",
        "base" => "what it stands on",
        other => other,
    }
}

fn compare_inputs(now: &PreImage, before: &PreImage, around: &Around<'_>, out: &mut Vec<Reason>) {
    let longest = now.inputs.len().max(before.inputs.len());
    for nth in 0..longest {
        let reason = match (now.inputs.get(nth), before.inputs.get(nth)) {
            (Some(new), Some(old)) if new.is_same(old) => continue,
            (Some(new), old) => compare_input(new, old, around),
            // The op has fewer inputs, and says so itself.
            (None, _) => continue,
        };
        if !out.contains(&reason) {
            out.push(reason);
        }
    }
}

fn compare_input(new: &InputImage, old: Option<&InputImage>, around: &Around<'_>) -> Reason {
    match (new, old) {
        (InputImage::Files { title, list }, Some(InputImage::Files { list: old, .. })) => {
            let read = |name: &Option<String>| name.as_ref().and_then(|name| (around.list)(name));
            let changes = match (read(list), read(old)) {
                (Some(new), Some(old)) => Some(new.changes(&old)),
                _ => None,
            };
            Reason::Files { tree: title.clone(), changes }
        }
        (
            InputImage::Image { name: to_name, config: to, .. },
            Some(InputImage::Image { name: from_name, config: from, .. }),
        ) => {
            let (from_name, to_name) = (from_name.clone(), to_name.clone());
            Reason::Base { from_name, from: from.clone(), to_name, to: to.clone() }
        }
        (InputImage::Step { title, .. }, _) if around.ran.contains(title) => {
            Reason::Parent { step: title.clone() }
        }
        (InputImage::Files { title, .. }, _) => Reason::Files { tree: title.clone(), changes: None },
        (new, old) => Reason::Stand { from: old.and_then(title), to: title(new) },
    }
}

fn title(input: &InputImage) -> Option<String> {
    match input {
        InputImage::Image { name, .. } => Some(name.clone()),
        InputImage::Step { title, .. } | InputImage::Files { title, .. } => Some(title.clone()),
    }
}
