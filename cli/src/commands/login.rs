//! `kiln login`, `kiln logout`

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::sync::Arc;

use kiln_build::BuildCancel;
use kiln_build::registry::Registries;
use kiln_oci::Reference;
use kiln_registry::credentials::Stored;
use kiln_registry::{Client, Credential, DockerConfig, credential_key};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use super::print;
use crate::args::registry::{LoginArgs, LogoutArgs};
use crate::config::Config;
use crate::errors::{Failure, exit, say};
use crate::registries::{docker_config, settings};

/// No password is longer.
const MAX_PASSWORD_BYTES: u64 = 64 << 10;

pub(crate) fn login(args: &LoginArgs) -> Result<u8, Failure> {
    let domain = domain(&args.registry)?;
    let file = file()?;
    let terminal = io::stdin().is_terminal();
    let user = match &args.username {
        Some(user) => user.clone(),
        None if terminal && !args.password_stdin => ask("User: ")?,
        None => return Err(Failure::usage("login: say who with --username")),
    };
    let password = if args.password_stdin {
        let mut text = String::new();
        io::stdin()
            .take(MAX_PASSWORD_BYTES)
            .read_to_string(&mut text)
            .map_err(|error| Failure::source(format!("the password cannot be read: {error}")))?;
        text.trim_end_matches(['\r', '\n']).to_owned()
    } else if terminal {
        ask_hidden("Password: ")?
    } else {
        return Err(Failure::usage("login: standard input is no terminal to ask for a password on")
            .hint("`--password-stdin` reads it from there"));
    };
    if user.is_empty() || user.contains(':') || password.is_empty() {
        return Err(Failure::usage("login: a user without a colon and a password are needed"));
    }
    let credential = Credential::Password { user, password };
    let config = Config::read()?;
    let client = Client::new(settings(&config, &args.registries), Arc::new(credential.clone()));
    let registries = Registries::new(client.clone());
    let token = registries.wait(&BuildCancel::new()?, client.login(&domain))?;
    let what = if token.is_some() { "a token that stands for the password" } else { "the password" };
    let kept = token.unwrap_or(credential);
    match file.store(credential_key(&domain), &kept).map_err(kiln_registry::Error::from)? {
        Stored::Plain(path) => say(&format!(
            "warning: {what} is in {} for whoever can read that file; a credential helper \
             (\"credsStore\") keeps it elsewhere\n",
            path.display()
        )),
        Stored::Helper(_) => {}
    }
    print(&format!("logged in at {domain}\n"))?;
    Ok(0)
}

pub(crate) fn logout(args: &LogoutArgs) -> Result<u8, Failure> {
    let domain = domain(&args.registry)?;
    let known = file()?.erase(credential_key(&domain)).map_err(kiln_registry::Error::from)?;
    let text = if known { "logged out of" } else { "there is nothing left of a login at" };
    print(&format!("{text} {domain}\n"))?;
    Ok(0)
}

fn file() -> Result<DockerConfig, Failure> {
    docker_config()
        .ok_or_else(|| Failure::usage("there is no place for credentials: set HOME or DOCKER_CONFIG"))
}

/// The host of what was written as one; `https://` and a path are left out, as docker does.
pub(super) fn domain(text: &str) -> Result<String, Failure> {
    let bare = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    let host = bare.split('/').next().unwrap_or_default();
    let wrong = || Failure::usage(format!("{text:?} is not the name of a registry"));
    // As references know it, which is how it will be asked for.
    let parsed: Reference = format!("{host}/x").parse().map_err(|_| wrong())?;
    match parsed.domain() {
        "docker.io" if !matches!(host, "docker.io" | "index.docker.io") => Err(wrong()),
        domain => Ok(domain.to_owned()),
    }
}

fn ask(question: &str) -> Result<String, Failure> {
    say(question);
    let mut line = String::new();
    let read = io::stdin().lock().take(MAX_PASSWORD_BYTES).read_line(&mut line);
    read.map_err(|error| Failure::source(format!("standard input: {error}")))?;
    Ok(line.trim().to_owned())
}

/// Reads a line that nobody sees.
fn ask_hidden(question: &str) -> Result<String, Failure> {
    let failed = |error: rustix::io::Errno| Failure::source(format!("the terminal: {error}"));
    let stdin = io::stdin();
    let before = tcgetattr(&stdin).map_err(failed)?;
    let mut hidden = before.clone();
    // Signals as well: whoever presses Ctrl-C gets a terminal back that shows what is typed.
    hidden.local_modes.remove(LocalModes::ECHO | LocalModes::ISIG | LocalModes::ICANON);
    say(question);
    tcsetattr(&stdin, OptionalActions::Flush, &hidden).map_err(failed)?;
    let line = read_keys(&mut stdin.lock());
    let restored = tcsetattr(&stdin, OptionalActions::Now, &before).map_err(failed);
    let _ = io::stderr().write_all(b"\n");
    restored?;
    line
}

fn read_keys(keys: &mut impl Read) -> Result<String, Failure> {
    let mut line: Vec<u8> = Vec::new();
    let mut key = [0];
    loop {
        let count =
            keys.read(&mut key).map_err(|error| Failure::source(format!("standard input: {error}")))?;
        match key[0] {
            _ if count == 0 => break,
            b'\r' | b'\n' | 0x04 => break,
            0x03 => return Err(Failure::usage("login: interrupted").with_code(exit::INTERRUPTED)),
            0x7f | 0x08 => drop(line.pop()),
            byte if line.len() < MAX_PASSWORD_BYTES as usize => line.push(byte),
            _ => {}
        }
    }
    String::from_utf8(line).map_err(|_| Failure::usage("login: the password is no text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_named_as_people_name_them() {
        for (text, name) in [
            ("docker.io", "docker.io"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("https://h.example:5000/v2/", "h.example:5000"),
            ("localhost", "localhost"),
            ("[::1]:5000", "[::1]:5000"),
        ] {
            assert_eq!(domain(text).map_err(|failure| failure.render()).unwrap(), name);
        }
        for text in ["", "user", "a b", "-x.example", "https://"] {
            assert!(domain(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_hidden_line_is_what_is_left_of_the_keys() {
        let typed = |keys: &[u8]| read_keys(&mut &keys[..]).map_err(|failure| failure.exit_code().number());
        assert_eq!(typed(b"secrex\x7ft\n"), Ok("secret".to_owned()));
        assert_eq!(typed(b"x\x08\x08y"), Ok("y".to_owned()));
        assert_eq!(typed(b"sec\x03"), Err(exit::INTERRUPTED.number()));
    }
}
