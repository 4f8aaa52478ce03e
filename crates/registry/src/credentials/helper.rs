//! Programs that keep credentials: `docker-credential-NAME get|store|erase`.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::{Credential, CredentialError};
use crate::error::clean;

/// More is no answer of a helper.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// The user of a token that stands where a password would.
const TOKEN_USER: &str = "<token>";

/// What all helpers say of a registry they know nothing about.
const NOT_FOUND: &str = "credentials not found";

/// A helper by its name.
pub(super) struct Helper {
    program: String,
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    #[serde(rename = "ServerURL", default)]
    server_url: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

impl Helper {
    /// Finds the helper `name` in the absolute directories of PATH: a relative one may be the context of a
    /// build, whose author would choose the program.
    ///
    /// # Errors
    /// [`CredentialError::HelperName`], [`CredentialError::NoHelper`].
    pub(super) fn find(name: &str) -> Result<Self, CredentialError> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > 100 || !name.chars().all(fits) {
            return Err(CredentialError::HelperName { name: clean(name) });
        }
        let program = format!("docker-credential-{name}");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).filter(|place| place.is_absolute());
        match places.map(|place| place.join(&program)).find(|file| file.is_file()) {
            Some(path) => Ok(Self { program, path }),
            None => Err(CredentialError::NoHelper { program }),
        }
    }

    /// The credential for `key`; `None`: it has none.
    pub(super) fn get(&self, key: &str) -> Result<Option<Credential>, CredentialError> {
        let (good, answer) = self.run("get", key.as_bytes())?;
        if !good {
            let said = String::from_utf8_lossy(&answer);
            let absent = said.trim().to_ascii_lowercase().starts_with(NOT_FOUND);
            return if absent { Ok(None) } else { Err(self.failed(&said)) };
        }
        let entry: Entry =
            serde_json::from_slice(&answer).map_err(|_| self.failed("its answer is no JSON"))?;
        Ok(match entry {
            Entry { username, secret, .. } if username.is_empty() && secret.is_empty() => None,
            Entry { username, secret, .. } if username == TOKEN_USER => Some(Credential::Identity(secret)),
            Entry { username, secret, .. } => Some(Credential::Password { user: username, password: secret }),
        })
    }

    /// Keeps a credential.
    pub(super) fn store(&self, key: &str, credential: &Credential) -> Result<(), CredentialError> {
        let (username, secret) = match credential {
            Credential::Password { user, password } => (user.clone(), password.clone()),
            Credential::Identity(token) | Credential::Registry(token) => {
                (TOKEN_USER.to_owned(), token.clone())
            }
        };
        let entry = Entry { server_url: key.to_owned(), username, secret };
        let json = serde_json::to_vec(&entry).expect("three strings are JSON");
        self.expect("store", &json)
    }

    /// Forgets a credential; false: it had none, as far as it says.
    pub(super) fn erase(&self, key: &str) -> Result<bool, CredentialError> {
        match self.run("erase", key.as_bytes())? {
            (true, _) => Ok(true),
            (false, said) => {
                let said = String::from_utf8_lossy(&said);
                let absent = said.trim().to_ascii_lowercase().starts_with(NOT_FOUND);
                if absent { Ok(false) } else { Err(self.failed(&said)) }
            }
        }
    }

    fn expect(&self, verb: &str, input: &[u8]) -> Result<(), CredentialError> {
        match self.run(verb, input)? {
            (true, _) => Ok(()),
            (false, said) => Err(self.failed(&String::from_utf8_lossy(&said))),
        }
    }

    fn failed(&self, said: &str) -> CredentialError {
        CredentialError::Helper { program: self.program.clone(), said: clean(said) }
    }

    /// Whether it ended well, and what it printed. Its messages go to ours.
    fn run(&self, verb: &str, input: &[u8]) -> Result<(bool, Vec<u8>), CredentialError> {
        let failed = |source| CredentialError::Run { program: self.program.clone(), source };
        let mut command = Command::new(&self.path);
        // Not where a build happens to be: the helper may look for files of its own there.
        command.arg(verb).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(input) {
                // One that does not read its input says below what is wrong.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
                _ => {}
            }
        }
        let mut answer = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).map_err(failed)?;
        }
        let good = child.wait().map_err(failed)?.success();
        Ok((good, answer))
    }
}
