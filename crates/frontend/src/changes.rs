//! Instructions that change only the image config, and `kiln import -c`.

use kiln_oci::image::{EmptyObject, History, ImageConfig, RunConfig};

use crate::ast::{Instruction, Kind};
use crate::words::{Lookup, expand, split};
use crate::{Diagnostic, parse};

/// What BuildKit writes beside each history entry; readers take it as a mark of its format.
pub(crate) const COMMENT: &str = "buildkit.dockerfile.v0";

/// An instruction given on the command line is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("instruction `{instruction}`: {message}")]
pub struct ChangeError {
    /// As it was given.
    pub instruction: String,
    /// What is wrong.
    pub message: String,
}

/// Applies instructions such as `CMD ["bash"]` to an image config; the history entries they make,
/// without times.
///
/// # Errors
/// The first instruction that cannot be read, or that would change files.
pub fn apply_changes(
    config: &mut ImageConfig,
    instructions: &[String],
    _platform: &kiln_oci::Platform,
) -> Result<Vec<History>, ChangeError> {
    let mut history = Vec::new();
    for text in instructions {
        let wrong = |message: &str| ChangeError { instruction: text.clone(), message: message.to_owned() };
        let (ast, diagnostics) = parse(text);
        if let Some(diagnostic) = diagnostics.first() {
            return Err(wrong(&diagnostic.message));
        }
        let [instruction] = ast.instructions.as_slice() else {
            return Err(wrong("exactly one instruction is expected"));
        };
        let env = config.config.env.clone();
        let lookup = |name: &str| lookup_env(&env, name);
        let applied = apply(&mut config.config, instruction, ast.escape, &lookup)
            .map_err(|diagnostic| wrong(&diagnostic.message))?;
        let created_by =
            applied.ok_or_else(|| wrong("only instructions that change no files are allowed"))?;
        history.push(entry(created_by));
    }
    Ok(history)
}

/// A history entry without a layer.
pub(crate) fn entry(created_by: String) -> History {
    History {
        created_by: Some(created_by),
        comment: Some(COMMENT.to_owned()),
        empty_layer: true,
        ..History::default()
    }
}

pub(crate) fn lookup_env(env: &[String], name: &str) -> Option<String> {
    env.iter()
        .rev()
        .find_map(|entry| entry.split_once('=').filter(|(known, _)| *known == name))
        .map(|(_, value)| value.to_owned())
}

/// Sets a variable in place, or adds it at the end.
pub(crate) fn set_env(env: &mut Vec<String>, name: &str, value: &str) {
    let entry = format!("{name}={value}");
    let known = env.iter_mut().find(|old| old.split_once('=').is_some_and(|(known, _)| known == name));
    match known {
        Some(old) => *old = entry,
        None => env.push(entry),
    }
}

/// Applies an instruction that changes only the config; the text for the history. `None` for an
/// instruction of another kind.
pub(crate) fn apply(
    config: &mut RunConfig,
    instruction: &Instruction,
    escape: char,
    lookup: &Lookup<'_>,
) -> Result<Option<String>, Diagnostic> {
    let rest = &instruction.rest;
    let wrong = |message: String| Diagnostic::error(rest.span, message);
    let expanded = |text: &str| expand(text, escape, lookup).map_err(wrong);
    let created_by = match instruction.kind {
        Kind::Cmd => {
            config.cmd = Some(command(instruction, config));
            config.args_escaped = true;
            format!("CMD {}", quoted(config.cmd.as_deref().unwrap_or_default()))
        }
        Kind::Entrypoint => {
            let words = command(instruction, config);
            config.entrypoint = (!words.is_empty()).then_some(words);
            format!("ENTRYPOINT {}", quoted(config.entrypoint.as_deref().unwrap_or_default()))
        }
        Kind::Shell => {
            let shell = instruction.json.clone().filter(|words| !words.is_empty());
            config.shell = shell
                .ok_or_else(|| wrong("SHELL needs a JSON list, such as [\"/bin/sh\", \"-c\"]".to_owned()))?;
            format!("SHELL {}", quoted(&config.shell))
        }
        Kind::Env => {
            let pairs = pairs(instruction, escape, lookup)?;
            for (name, value) in &pairs {
                set_env(&mut config.env, name, value);
            }
            format!("ENV {}", shown(&pairs))
        }
        Kind::Label => {
            let pairs = pairs(instruction, escape, lookup)?;
            config.labels.extend(pairs.iter().cloned());
            format!("LABEL {}", shown(&pairs))
        }
        Kind::Expose => {
            let mut ports = Vec::new();
            for word in rest.value.split_ascii_whitespace() {
                ports.extend(port(&expanded(word)?).map_err(wrong)?);
            }
            ports.sort();
            config.exposed_ports.extend(ports.iter().map(|port| (port.clone(), EmptyObject {})));
            format!("EXPOSE {}", ports.join(" "))
        }
        Kind::User => {
            config.user = expanded(&rest.value)?;
            format!("USER {}", config.user)
        }
        Kind::Volume => {
            let words = match &instruction.json {
                Some(words) => words.clone(),
                None => rest.value.split_ascii_whitespace().map(str::to_owned).collect(),
            };
            for word in &words {
                let path = expanded(word)?;
                if path.trim().is_empty() {
                    return Err(wrong("VOLUME needs a path that is not empty".to_owned()));
                }
                config.volumes.insert(path, EmptyObject {});
            }
            format!("VOLUME {}", quoted(&words))
        }
        Kind::Stopsignal => {
            let signal = expanded(&rest.value)?;
            let known = signal.parse::<u8>().is_ok_and(|n| (1..=64).contains(&n))
                || (signal.starts_with("SIG")
                    && signal.len() > 5
                    && signal
                        .bytes()
                        .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || matches!(b, b'+' | b'-')));
            if !known {
                return Err(wrong(format!("{signal:?} is no signal like SIGTERM or 9")));
            }
            config.stop_signal = Some(signal.clone());
            format!("STOPSIGNAL {signal}")
        }
        Kind::Healthcheck => {
            let none = rest.value.eq_ignore_ascii_case("NONE");
            let test = match rest.value.split_once(char::is_whitespace) {
                _ if none => serde_json::json!(["NONE"]),
                Some((word, command)) if word.eq_ignore_ascii_case("CMD") => {
                    match serde_json::from_str::<Vec<String>>(command.trim()) {
                        Ok(words) => std::iter::once("CMD".to_owned()).chain(words).collect(),
                        Err(_) => serde_json::json!(["CMD-SHELL", command.trim()]),
                    }
                }
                _ => return Err(wrong("HEALTHCHECK needs NONE or CMD and a command".to_owned())),
            };
            config.healthcheck = Some(serde_json::json!({ "Test": test }));
            format!("HEALTHCHECK {}", rest.value)
        }
        Kind::Workdir => {
            config.working_dir = join(&config.working_dir, &expanded(&rest.value)?);
            format!("WORKDIR {}", config.working_dir)
        }
        Kind::Add | Kind::Arg | Kind::Copy | Kind::From | Kind::Maintainer | Kind::Onbuild | Kind::Run => {
            return Ok(None);
        }
    };
    Ok(Some(created_by))
}

/// Exec form as it is; shell form behind the image's shell.
pub(crate) fn command(instruction: &Instruction, config: &RunConfig) -> Vec<String> {
    instruction.json.clone().unwrap_or_else(|| with_shell(config, &instruction.rest.value))
}

pub(crate) fn with_shell(config: &RunConfig, text: &str) -> Vec<String> {
    let mut words = match config.shell.as_slice() {
        [] => vec!["/bin/sh".to_owned(), "-c".to_owned()],
        shell => shell.to_vec(),
    };
    words.push(text.to_owned());
    words
}

/// `A=b C=d`, or the old form `A b c` for one pair.
fn pairs(
    instruction: &Instruction,
    escape: char,
    lookup: &Lookup<'_>,
) -> Result<Vec<(String, String)>, Diagnostic> {
    let rest = &instruction.rest;
    let wrong = |message: String| Diagnostic::error(rest.span, message);
    let words = split(&rest.value, escape);
    let first = words.first().map_or("", String::as_str);
    if !first.contains('=') {
        let value = rest.value[first.len().min(rest.value.len())..].trim();
        if value.is_empty() {
            return Err(wrong(format!("{first} needs a value, such as {first}=value")));
        }
        let value = expand(value, escape, lookup).map_err(wrong)?;
        return Ok(vec![(expand(first, escape, lookup).map_err(wrong)?, value)]);
    }
    words
        .iter()
        .map(|word| {
            let (name, value) = word
                .split_once('=')
                .ok_or_else(|| wrong(format!("{word:?} is not of the form name=value")))?;
            let name = expand(name, escape, lookup).map_err(wrong)?;
            if name.is_empty() {
                return Err(wrong(format!("{word:?} has no name in front of `=`")));
            }
            Ok((name, expand(value, escape, lookup).map_err(wrong)?))
        })
        .collect()
}

fn shown(pairs: &[(String, String)]) -> String {
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
}

fn quoted(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
    format!("[{}]", words.join(" "))
}

/// `80`, `80/udp`, `8000-8010`; as docker keeps them.
fn port(word: &str) -> Result<Vec<String>, String> {
    let (range, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let number = |text: &str| text.parse::<u16>().ok().filter(|&port| port > 0);
    let (low, high) = range.split_once('-').unwrap_or((range, range));
    match (number(low), number(high)) {
        (Some(low), Some(high)) if low <= high && matches!(protocol.as_str(), "tcp" | "udp" | "sctp") => {
            Ok((low..=high).map(|port| format!("{port}/{protocol}")).collect())
        }
        _ => Err(format!("{word:?} is no port like 80, 80/udp or 8000-8010")),
    }
}

/// An absolute, clean path: `path` seen from `base`.
pub(crate) fn join(base: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let base = if path.starts_with('/') { "" } else { base };
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}
