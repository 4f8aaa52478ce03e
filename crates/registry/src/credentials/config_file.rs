//! `~/.docker/config.json`: read, and written by `login` and `logout` without losing what else is in it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::helper::Helper;
use super::{Credential, CredentialError, CredentialSource};

/// More is no configuration.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// docker's file of credentials. It is read anew each time it is asked.
#[derive(Debug, Clone)]
pub struct DockerConfig {
    path: PathBuf,
}

/// Where a credential was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// In this file, readable for whoever reads it.
    Plain(PathBuf),
    /// With the helper of this name.
    Helper(String),
}

impl DockerConfig {
    /// The file at `path`, which need not be there.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The file in `$DOCKER_CONFIG`, or in `.docker` of the home directory; `None` when neither is known.
    pub fn usual() -> Option<Self> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = variable("DOCKER_CONFIG").or_else(|| Some(variable("HOME")?.join(".docker")))?;
        Some(Self::at(dir.join("config.json")))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether others than the owner can read the file.
    pub fn is_open_to_others(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|file| file.permissions().mode() & 0o077 != 0)
    }

    /// Keeps a credential: with the helper that is configured for the registry, in the file otherwise.
    ///
    /// # Errors
    /// [`CredentialError`]; the file is as it was then.
    pub fn store(&self, key: &str, credential: &Credential) -> Result<Stored, CredentialError> {
        let mut config = self.read()?;
        if let Some(name) = self.helper_of(&config, key) {
            Helper::find(&name)?.store(key, credential)?;
            return Ok(Stored::Helper(name));
        }
        let entry = match credential {
            Credential::Password { user, password } => {
                let auth = STANDARD.encode(format!("{user}:{password}"));
                Map::from_iter([("auth".to_owned(), Value::String(auth))])
            }
            Credential::Identity(token) => {
                Map::from_iter([("identitytoken".to_owned(), Value::String(token.clone()))])
            }
            Credential::Registry(token) => {
                Map::from_iter([("registrytoken".to_owned(), Value::String(token.clone()))])
            }
        };
        let auths = config.entry("auths").or_insert_with(|| Value::Object(Map::new()));
        let auths = auths.as_object_mut().ok_or_else(|| self.entry_error("auths"))?;
        auths.insert(key.to_owned(), Value::Object(entry));
        self.write(&config)?;
        Ok(Stored::Plain(self.path.clone()))
    }

    /// Forgets the credential for `key`; whether there was one, with the helper or in the file.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn erase(&self, key: &str) -> Result<bool, CredentialError> {
        let mut config = self.read()?;
        let helper = self.helper_of(&config, key);
        let was_kept = helper.map_or(Ok(false), |name| Helper::find(&name)?.erase(key))?;
        let Some(auths) = config.get_mut("auths").and_then(Value::as_object_mut) else { return Ok(was_kept) };
        let before = auths.len();
        auths.retain(|known, _| !same_registry(known, key));
        if auths.len() == before {
            return Ok(was_kept);
        }
        self.write(&config)?;
        Ok(true)
    }

    /// The registries that the file itself has credentials for.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn keys(&self) -> Result<Vec<String>, CredentialError> {
        let config = self.read()?;
        let auths = config.get("auths").and_then(Value::as_object);
        Ok(auths.map(|auths| auths.keys().cloned().collect()).unwrap_or_default())
    }

    fn read(&self) -> Result<Map<String, Value>, CredentialError> {
        let failed = |source| CredentialError::File { path: self.path.clone(), what: "read", source };
        let file = match File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
            .open(&self.path)
        {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Map::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(failed(io::Error::from(io::ErrorKind::FileTooLarge)));
        }
        if bytes.trim_ascii().is_empty() {
            return Ok(Map::new());
        }
        serde_json::from_slice(&bytes)
            .map_err(|source| CredentialError::Form { path: self.path.clone(), source })
    }

    /// Replaces the file as a whole, for its owner only. A link stays a link.
    fn write(&self, config: &Map<String, Value>) -> Result<(), CredentialError> {
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let failed = |source| CredentialError::File { path: path.clone(), what: "written", source };
        let dir = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(failed)?;
        let mut json = Vec::new();
        let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
        let mut serializer = serde_json::Serializer::with_formatter(&mut json, formatter);
        serde::Serialize::serialize(config, &mut serializer).expect("a JSON value is JSON");
        let temporary = dir.join(format!(".config.json.{}", std::process::id()));
        let made = (|| {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&json)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        })();
        made.map_err(|error| {
            // Ours, or an earlier process's of this number.
            let _ = fs::remove_file(&temporary);
            failed(error)
        })
    }

    /// The helper for a registry: its own, or the one for all.
    fn helper_of(&self, config: &Map<String, Value>, key: &str) -> Option<String> {
        let own = config.get("credHelpers").and_then(Value::as_object);
        let own = own.and_then(|helpers| {
            let found = helpers.iter().find(|(known, _)| same_registry(known, key))?;
            found.1.as_str()
        });
        let all = config.get("credsStore").and_then(Value::as_str);
        own.or(all).filter(|name| !name.is_empty()).map(str::to_owned)
    }

    fn entry_error(&self, key: &str) -> CredentialError {
        CredentialError::Entry { path: self.path.clone(), key: key.to_owned() }
    }

    fn entry(&self, key: &str, entry: &Value) -> Result<Option<Credential>, CredentialError> {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        if let Some(token) = text("registrytoken") {
            return Ok(Some(Credential::Registry(token.to_owned())));
        }
        if let Some(token) = text("identitytoken") {
            return Ok(Some(Credential::Identity(token.to_owned())));
        }
        if let Some(auth) = text("auth") {
            let decoded = STANDARD.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            // docker of old padded it with NUL.
            let decoded = decoded.as_deref().map(|text| text.trim_end_matches('\0'));
            let pair = decoded.and_then(|text| text.split_once(':'));
            let (user, password) = pair.ok_or_else(|| self.entry_error(key))?;
            return Ok(Some(Credential::Password { user: user.to_owned(), password: password.to_owned() }));
        }
        let pair = text("username").zip(text("password"));
        Ok(pair.map(|(user, password)| Credential::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        }))
    }
}

impl CredentialSource for DockerConfig {
    fn credential(&self, key: &str) -> Result<Option<Credential>, CredentialError> {
        let config = self.read()?;
        if let Some(name) = self.helper_of(&config, key)
            && let Some(found) = Helper::find(&name)?.get(key)?
        {
            return Ok(Some(found));
        }
        let Some(auths) = config.get("auths").and_then(Value::as_object) else { return Ok(None) };
        // What is written just so comes first.
        let exact = auths.get(key).map(|entry| (key, entry));
        let others = auths.iter().filter(|(known, _)| same_registry(known, key));
        for (known, entry) in exact.into_iter().chain(others.map(|(known, entry)| (known.as_str(), entry))) {
            if let Some(found) = self.entry(known, entry)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// Whether two keys mean one registry: `https://h/v1/` is `h`, and Docker Hub has several names.
fn same_registry(a: &str, b: &str) -> bool {
    host_of(a) == host_of(b)
}

fn host_of(key: &str) -> &str {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    match bare.split('/').next().unwrap_or(bare) {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> (tempfile::TempDir, DockerConfig) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, json).unwrap();
        (dir, DockerConfig::at(path))
    }

    fn password(user: &str, password: &str) -> Credential {
        Credential::Password { user: user.to_owned(), password: password.to_owned() }
    }

    #[test]
    fn entries_are_read_in_all_their_forms() {
        let (_dir, file) = config(
            r#"{"auths":{
                "https://index.docker.io/v1/":{"auth":"dTpw"},
                "plain.example":{"username":"a","password":"b:c"},
                "https://old.example/v2/":{"auth":"dTpwOmM="},
                "identity.example":{"auth":"PHRva2VuPjo=","identitytoken":"tok"},
                "registry.example:5000":{"registrytoken":"reg"},
                "empty.example":{}}}"#,
        );
        let get = |key: &str| file.credential(key).unwrap();
        assert_eq!(get("https://index.docker.io/v1/"), Some(password("u", "p")));
        assert_eq!(get("plain.example"), Some(password("a", "b:c")));
        assert_eq!(get("old.example"), Some(password("u", "p:c")));
        assert_eq!(get("identity.example"), Some(Credential::Identity("tok".to_owned())));
        assert_eq!(get("registry.example:5000"), Some(Credential::Registry("reg".to_owned())));
        assert_eq!(get("registry.example"), None);
        assert_eq!(get("empty.example"), None);
    }

    #[test]
    fn what_login_writes_leaves_the_rest_alone_and_is_for_the_owner() {
        let (_dir, file) = config(r#"{"HttpHeaders":{"X":"y"},"auths":{"a.example":{"auth":"dTpw"}}}"#);
        let stored = file.store("b.example", &password("u", "secret")).unwrap();
        assert_eq!(stored, Stored::Plain(file.path().to_owned()));
        assert_eq!(file.credential("b.example").unwrap(), Some(password("u", "secret")));
        assert!(file.credential("a.example").unwrap().is_some());
        assert!(fs::read_to_string(file.path()).unwrap().contains("HttpHeaders"));
        assert!(!file.is_open_to_others());
        assert!(file.erase("https://b.example/v1/").unwrap());
        assert!(!file.erase("b.example").unwrap());
        assert_eq!(file.keys().unwrap(), ["a.example"]);
    }

    #[test]
    fn a_broken_file_is_named_with_its_line() {
        let (_dir, file) = config("{\n\"auths\": {\n");
        let error = file.credential("x").unwrap_err().to_string();
        assert!(error.contains("config.json, line"), "{error}");
        let (_dir, file) = config(r#"{"auths":{"x":{"auth":"!!"}}}"#);
        assert!(matches!(file.credential("x"), Err(CredentialError::Entry { .. })));
        let (_dir, file) = config(r#"{"credHelpers":{"x":"../../bin/sh"}}"#);
        assert!(matches!(file.credential("x"), Err(CredentialError::HelperName { .. })));
        let (_dir, file) = config(r#"{"credsStore":"no-such-helper-here"}"#);
        assert!(matches!(file.credential("x"), Err(CredentialError::NoHelper { .. })));
    }

    #[test]
    fn no_file_is_no_credentials() {
        let file = DockerConfig::at("/absent/config.json".into());
        assert_eq!(file.credential("x").unwrap(), None);
    }
}
