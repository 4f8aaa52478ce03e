//! Commands in shell form and exec form.

use kiln_oci::image::RunConfig;

use crate::ast::Command;

/// Exec form as it is; shell form behind the image's shell.
pub(super) fn words(command: &Command, config: &RunConfig) -> Vec<String> {
    match command {
        Command::Exec(words) => words.clone(),
        Command::Shell(text) => with_shell(config, &text.value),
    }
}

/// `text` as the last argument of the image's shell.
pub(super) fn with_shell(config: &RunConfig, text: &str) -> Vec<String> {
    let mut words = match config.shell.as_slice() {
        [] => vec!["/bin/sh".to_owned(), "-c".to_owned()],
        shell => shell.to_vec(),
    };
    words.push(text.to_owned());
    words
}

/// `["a" "b"]`: Go's `%q` of a list, which image histories hold.
pub(super) fn quoted(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
    format!("[{}]", words.join(" "))
}

/// Go's `%q` of a text.
fn quote(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() && (c as u32) < 0x80 => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// `[a b]`: Go's `%v` of a list.
pub(super) fn listed(words: &[String]) -> String {
    format!("[{}]", words.join(" "))
}
