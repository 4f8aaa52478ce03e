//! `--secret`: values that a step may read and that nothing else ever holds.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_frontend::nearest;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{BuildError, OpError, SecretSource};

/// As in BuildKit.
const MAX_SECRET_BYTES: u64 = 500 << 10;

/// What is wrong with the text of `--secret` or `--ssh`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: {reason}")]
pub struct SpecError {
    /// The part that is wrong.
    pub text: String,
    /// Why.
    pub reason: String,
}

impl SpecError {
    pub(crate) fn new(text: &str, reason: impl Into<String>) -> Self {
        Self { text: text.chars().take(200).collect(), reason: reason.into() }
    }
}

/// One `--secret`: an ID and where its value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretSpec {
    id: String,
    source: Source,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    File(PathBuf),
    /// A variable of kiln's own environment.
    Env(String),
    /// Only an ID: the variable of that name if it is set, else the file of that name.
    Either(String),
}

impl SecretSpec {
    /// Reads `id=ID[,type=file|env][,src=PATH|source=PATH][,env=NAME]`, fields as in CSV.
    ///
    /// # Errors
    /// [`SpecError`] with the field that is wrong.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let (mut id, mut kind, mut path, mut env) = (None, None, None, None);
        for field in csv_fields(text)? {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| SpecError::new(&field, "a field of a secret is KEY=VALUE"))?;
            let key = key.trim().to_ascii_lowercase();
            let place = match key.as_str() {
                "id" => &mut id,
                "type" => &mut kind,
                "src" | "source" => &mut path,
                "env" => &mut env,
                _ => {
                    let near = nearest(&key, ["id", "type", "src", "source", "env"]);
                    let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                    return Err(SpecError::new(&field, format!("unknown key {key:?}{hint}")));
                }
            };
            *place = Some(value.to_owned());
        }
        let id = id.filter(|id: &String| !id.is_empty());
        let id = id.ok_or_else(|| SpecError::new(text, "the secret has no id (id=NAME)"))?;
        match kind.as_deref() {
            None | Some("file") => {}
            // `type=env,src=NAME` is another way to say `env=NAME`.
            Some("env") => env = env.or_else(|| path.take()),
            Some(other) => return Err(SpecError::new(other, "the type of a secret is file or env")),
        }
        let source = match (env, path) {
            (Some(_), Some(_)) => {
                return Err(SpecError::new(text, "a secret comes from src or from env, not from both"));
            }
            (Some(name), None) => Source::Env(name),
            (None, Some(path)) => Source::File(path.into()),
            (None, None) => Source::Either(id.clone()),
        };
        Ok(Self { id, source })
    }
}

impl FromStr for SecretSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        Self::parse(text)
    }
}

/// The fields of one line of CSV: commas between them, `"` around a field that holds some.
fn csv_fields(line: &str) -> Result<Vec<String>, SpecError> {
    let mut fields = vec![String::new()];
    let (mut quoted, mut characters) = (false, line.chars().peekable());
    while let Some(character) = characters.next() {
        let field = fields.last_mut().expect("there is one from the start");
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' if quoted || field.is_empty() => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            other => field.push(other),
        }
    }
    if quoted { Err(SpecError::new(line, "a quote is not closed")) } else { Ok(fields) }
}

/// A secret's value. It cannot be printed.
pub struct Secret(Vec<u8>);

impl Secret {
    /// The bytes, as they are in the file or variable.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The value as a file in memory.
    pub(crate) fn to_file(&self) -> std::io::Result<OwnedFd> {
        let mut file = File::from(memfd_create("kiln-secret", MemfdFlags::CLOEXEC)?);
        file.write_all(&self.0)?;
        Ok(file.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// The secrets of one build. Values are read when a step first asks, once: a file may be a pipe.
#[derive(Debug, Clone, Default)]
pub struct SecretStore {
    sources: BTreeMap<String, Source>,
    read: Arc<Mutex<BTreeMap<String, Option<Arc<Secret>>>>>,
}

impl SecretStore {
    /// A store of `specs`; of two with the same ID the later one counts.
    ///
    /// # Errors
    /// [`BuildError::Unreadable`] for a file that is not there; its content is not read yet.
    pub fn new(specs: impl IntoIterator<Item = SecretSpec>) -> Result<Self, BuildError> {
        let mut sources = BTreeMap::new();
        for SecretSpec { id, source } in specs {
            let source = match source {
                Source::Either(name) if std::env::var_os(&name).is_some() => Source::Env(name),
                Source::Either(name) => Source::File(name.into()),
                other => other,
            };
            if let Source::File(path) = &source {
                std::fs::metadata(path)
                    .map_err(|source| BuildError::Unreadable { path: path.clone(), source })?;
            }
            sources.insert(id, source);
        }
        Ok(Self { sources, read: Arc::default() })
    }

    /// The value of `id`; `None`: it was not given, or its variable is not set.
    ///
    /// # Errors
    /// [`OpError::Secret`] when it cannot be read or is larger than 500 KiB.
    pub fn get(&self, id: &str) -> Result<Option<Arc<Secret>>, OpError> {
        let Some(source) = self.sources.get(id) else { return Ok(None) };
        // Held while reading, so that two steps do not each get half of a pipe.
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = read.get(id) {
            return Ok(known.clone());
        }
        let failed = |source: std::io::Error| OpError::Secret { id: id.to_owned(), source };
        let bytes = match source {
            Source::Env(name) | Source::Either(name) => std::env::var_os(name).map(OsString::into_vec),
            Source::File(path) => {
                let mut bytes = Vec::new();
                let file = File::open(path).map_err(failed)?;
                file.take(MAX_SECRET_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
                Some(bytes)
            }
        };
        if bytes.as_ref().is_some_and(|bytes| bytes.len() as u64 > MAX_SECRET_BYTES) {
            return Err(failed(std::io::Error::other("it is larger than 500 KiB")));
        }
        let secret = bytes.map(|bytes| Arc::new(Secret(bytes)));
        read.insert(id.to_owned(), secret.clone());
        Ok(secret)
    }

    /// The values of all secrets, whether a step has asked for them or not. What can be read only once is left to
    /// the steps, and counts once they have.
    ///
    /// # Errors
    /// [`BuildError::Unreadable`].
    pub(crate) fn all_values(&self) -> Result<Vec<Vec<u8>>, BuildError> {
        let mut values = Vec::new();
        for (id, source) in &self.sources {
            let is_stream =
                matches!(source, Source::File(path) if !std::fs::metadata(path).is_ok_and(|it| it.is_file()));
            let value = if is_stream {
                let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
                read.get(id).cloned().flatten()
            } else {
                self.get(id).map_err(|error| BuildError::Unreadable {
                    path: id.into(),
                    source: std::io::Error::other(error),
                })?
            };
            values.extend(value.map(|secret| secret.bytes().to_vec()));
        }
        Ok(values)
    }

    /// The value of `id` for a step that has a right to it; `None`: it goes on without.
    ///
    /// # Errors
    /// [`OpError::NoSecret`] when it is `required` and not there; as [`SecretStore::get`] otherwise.
    pub(crate) fn for_step(&self, id: &str, required: bool) -> Result<Option<Arc<Secret>>, OpError> {
        match self.get(id)? {
            None if required => Err(OpError::NoSecret { id: id.to_owned() }),
            found => Ok(found),
        }
    }
}

/// Credentials of git and web servers.
impl SecretSource for SecretStore {
    fn secret(&self, name: &str) -> std::io::Result<Option<Vec<u8>>> {
        match self.get(name) {
            Ok(found) => Ok(found.map(|secret| secret.bytes().to_vec())),
            Err(OpError::Secret { source, .. }) => Err(source),
            Err(other) => Err(std::io::Error::other(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> (String, Source) {
        let spec = SecretSpec::parse(text).unwrap();
        (spec.id, spec.source)
    }

    #[test]
    fn specs_are_read_as_buildx_reads_them() {
        let file = |id: &str, path: &str| (id.to_owned(), Source::File(path.into()));
        let env = |id: &str, name: &str| (id.to_owned(), Source::Env(name.to_owned()));
        assert_eq!(source("id=a,src=/etc/a"), file("a", "/etc/a"));
        assert_eq!(source("ID=a,Source=/etc/a,type=file"), file("a", "/etc/a"));
        assert_eq!(source("id=a,env=TOKEN"), env("a", "TOKEN"));
        assert_eq!(source("type=env,id=a,src=TOKEN"), env("a", "TOKEN"));
        assert_eq!(source("id=a,\"src=/with,comma\""), file("a", "/with,comma"));
        assert_eq!(source("id=a").1, Source::Either("a".to_owned()));
    }

    #[test]
    fn a_bad_field_is_named() {
        let fails = |text: &str, parts: &[&str]| {
            let error = SecretSpec::parse(text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        fails("src=/a", &["no id"]);
        fails("id=", &["no id"]);
        fails("id=a,sorce=/a", &["sorce", "did you mean source?"]);
        fails("id=a,file", &["\"file\"", "KEY=VALUE"]);
        fails("id=a,type=vault", &["vault", "file or env"]);
        fails("id=a,src=/a,env=A", &["not from both"]);
        fails("id=a,\"src=/a", &["not closed"]);
    }

    fn store(text: &str) -> SecretStore {
        SecretStore::new([SecretSpec::parse(text).unwrap()]).unwrap()
    }

    #[test]
    fn values_come_from_files_and_variables() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "hunter2\n").unwrap();
        let secrets = store(&format!("id=a,src={}", path.display()));
        assert_eq!(secrets.get("a").unwrap().unwrap().bytes(), b"hunter2\n");
        // Read once: a pipe would have nothing left.
        std::fs::write(&path, "changed").unwrap();
        assert_eq!(secrets.get("a").unwrap().unwrap().bytes(), b"hunter2\n");
        let variable = std::env::var("PATH").unwrap();
        assert_eq!(store("id=p,env=PATH").get("p").unwrap().unwrap().bytes(), variable.as_bytes());
        assert_eq!(store("id=PATH").get("PATH").unwrap().unwrap().bytes(), variable.as_bytes());
    }

    #[test]
    fn what_was_not_given_is_missing_and_an_error_only_where_it_is_required() {
        let secrets = store("id=x,env=KILN_TEST_NO_SUCH_VARIABLE");
        assert!(secrets.for_step("x", false).unwrap().is_none());
        assert!(secrets.for_step("other", false).unwrap().is_none());
        assert!(matches!(secrets.for_step("x", true), Err(OpError::NoSecret { id }) if id == "x"));
        let missing = SecretStore::new([SecretSpec::parse("id=a,src=/no/such/file").unwrap()]);
        assert!(matches!(missing, Err(BuildError::Unreadable { .. })));
    }

    #[test]
    fn a_large_secret_is_refused_and_a_value_is_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big");
        std::fs::write(&path, vec![b'x'; 500 << 10]).unwrap();
        let text = format!("id=a,src={}", path.display());
        let fits = store(&text);
        assert_eq!(fits.get("a").unwrap().unwrap().bytes().len(), 500 << 10);
        assert!(!format!("{fits:?}").contains("xxx"));
        std::fs::write(&path, vec![b'x'; (500 << 10) + 1]).unwrap();
        assert!(matches!(store(&text).get("a"), Err(OpError::Secret { .. })));
    }
}
