//! `kiln build --check` and `--call`: what is said of a Dockerfile without building it.

use kiln_build::BuildRequest;
use kiln_frontend::{Diagnostic, Outline, Target};
use serde_json::{Value, json};

use super::{print, table};
use crate::errors::{Failure, exit};
use crate::session::Session;

/// Exit codes: 0 nothing found, 1 warnings, that of a failed build when there are errors.
pub(super) fn check(session: &Session, request: &BuildRequest, as_json: bool) -> Result<u8, Failure> {
    let checked = kiln_build::check(&session.engine, request, &session.cancel)?;
    let (file, text) = (&checked.dockerfile.name, &checked.dockerfile.text);
    let code = match checked.errors.first() {
        Some(error) if error.severity == kiln_frontend::Severity::Refused => exit::POLICY.number(),
        Some(_) => exit::DOCKERFILE.number(),
        None => u8::from(!checked.warnings.is_empty()),
    };
    if as_json {
        let document = json!({
            "warnings": checked.warnings.iter().map(|warning| warning_json(warning, text)).collect::<Vec<_>>(),
            "sources": [{ "filename": file, "data": text }],
            "buildError": checked.errors.first().map(|error| json!({
                "message": error.message,
                "location": location_json(error, text),
            })),
        });
        print(&format!("{document:#}\n"))?;
        return Ok(code);
    }
    let mut out = String::new();
    for found in checked.warnings.iter().chain(&checked.errors) {
        out.push_str(&found.render(file, text));
        if let Some(url) = found.rule.and_then(kiln_frontend::Rule::url) {
            out.push_str(&format!("see {url}\n"));
        }
        out.push('\n');
    }
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    out.push_str(&match (checked.warnings.len(), checked.errors.len()) {
        (0, 0) => format!("{file}: no warnings\n"),
        (warnings, 0) => format!("{file}: {}\n", count(warnings, "warning")),
        (0, errors) => format!("{file}: {}\n", count(errors, "error")),
        (warnings, errors) => format!("{file}: {}, {}\n", count(errors, "error"), count(warnings, "warning")),
    });
    print(&out)?;
    Ok(code)
}

fn warning_json(warning: &Diagnostic, text: &str) -> Value {
    json!({
        "ruleName": warning.rule.map(kiln_frontend::Rule::name),
        "description": warning.rule.map(kiln_frontend::Rule::description),
        "url": warning.rule.and_then(kiln_frontend::Rule::url),
        "detail": warning.message,
        "hint": warning.hint,
        "location": location_json(warning, text),
    })
}

/// Lines count from 1, characters from 0, as in BuildKit's answers.
fn location_json(found: &Diagnostic, text: &str) -> Value {
    let position = |at: usize| {
        let at = at.min(text.len());
        let start = text.as_bytes()[..at].iter().rposition(|&b| b == b'\n').map_or(0, |newline| newline + 1);
        let line = 1 + text.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
        json!({ "line": line, "character": String::from_utf8_lossy(&text.as_bytes()[start..at]).chars().count() })
    };
    json!({ "sourceIndex": 0, "ranges": [{ "start": position(found.span.start), "end": position(found.span.end) }] })
}

pub(super) fn outline(session: &Session, request: &BuildRequest, as_json: bool) -> Result<u8, Failure> {
    let outline = kiln_build::outline(&session.engine, request, &session.cancel)?;
    let Outline { name, description, args, secrets, ssh, caches } = &outline;
    if as_json {
        let document = json!({
            "name": name,
            "description": description,
            "args": args.iter().map(|arg| json!({
                "name": arg.name,
                "description": arg.description,
                "value": arg.value,
                "location": { "line": arg.line },
            })).collect::<Vec<_>>(),
            "secrets": secrets.iter().map(wish_json).collect::<Vec<_>>(),
            "ssh": ssh.iter().map(wish_json).collect::<Vec<_>>(),
            "cache": caches.iter().map(|id| json!({ "ID": id })).collect::<Vec<_>>(),
        });
        print(&format!("{document:#}\n"))?;
        return Ok(0);
    }
    let mut out = format!("target: {}\n", name.as_deref().unwrap_or("(without a name)"));
    out.extend(description.iter().map(|text| format!("description: {text}\n")));
    if !args.is_empty() {
        let mut rows = vec![row(&["BUILD ARG", "VALUE", "DESCRIPTION"])];
        rows.extend(args.iter().map(|arg| {
            row(&[&arg.name, arg.value.as_deref().unwrap_or(""), arg.description.as_deref().unwrap_or("")])
        }));
        out.push_str(&format!("\n{}", table(&rows)));
    }
    for (title, list) in [("SECRET", secrets), ("SSH", ssh)] {
        if list.is_empty() {
            continue;
        }
        let mut rows = vec![row(&[title, "REQUIRED"])];
        rows.extend(list.iter().map(|(id, required)| row(&[id, if *required { "yes" } else { "no" }])));
        out.push_str(&format!("\n{}", table(&rows)));
    }
    if !caches.is_empty() {
        let mut rows = vec![row(&["CACHE MOUNT"])];
        rows.extend(caches.iter().map(|id| row(&[id])));
        out.push_str(&format!("\n{}", table(&rows)));
    }
    print(&out)?;
    Ok(0)
}

fn wish_json((id, required): &(String, bool)) -> Value {
    json!({ "name": id, "required": required })
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|&cell| cell.to_owned()).collect()
}

pub(super) fn targets(session: &Session, request: &BuildRequest, as_json: bool) -> Result<u8, Failure> {
    let targets = kiln_build::targets(&session.engine, request, &session.cancel)?;
    if as_json {
        let list: Vec<Value> = targets
            .iter()
            .map(|target: &Target| {
                json!({
                    "name": target.name,
                    "default": target.is_default,
                    "description": target.description,
                    "base": target.base,
                    "platform": target.platform,
                    "location": { "line": target.line },
                })
            })
            .collect();
        print(&format!("{:#}\n", json!({ "targets": list })))?;
        return Ok(0);
    }
    let mut rows = vec![row(&["TARGET", "BASE", "DESCRIPTION"])];
    rows.extend(targets.iter().map(|target| {
        let name = target.name.as_deref().unwrap_or("(without a name)");
        let name = if target.is_default { format!("{name} (default)") } else { name.to_owned() };
        row(&[&name, &target.base, target.description.as_deref().unwrap_or("")])
    }));
    print(&table(&rows))?;
    Ok(0)
}
