//! Who may log in: a file as `htpasswd -B` writes it.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_oci::Digest;
use tokio::sync::Semaphore;

use crate::reports::Reports;
use crate::rights::Who;
use crate::version::Version;

/// Passwords that were right are known again without bcrypt; no more of them.
const MAX_KNOWN: usize = 4096;
/// Work factors beyond this one take minutes for each request.
const MAX_COST: u32 = 14;
/// So many passwords are compared at once: whoever guesses does not take the whole machine.
const AT_ONCE: usize = 2;
/// Longer ones are not looked at.
const MAX_HEADER_BYTES: usize = 4096;

/// Why a file of accounts is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccountsError {
    /// It cannot be read.
    #[error("the accounts of {} cannot be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A line is no account.
    #[error("{}, line {line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: &'static str },
}

/// The accounts, read again when the file changes.
pub(crate) struct Accounts {
    path: PathBuf,
    reports: Arc<Reports>,
    state: Mutex<State>,
    turns: Semaphore,
    /// Another one in each process: what is kept of right passwords is of no use elsewhere.
    salt: [u64; 4],
}

struct State {
    /// Of the file as it was when it was last read, whether it was of use or not.
    read: Option<Version>,
    hashes: Arc<HashMap<String, String>>,
    /// Salted digests of what was shown and was right.
    known: HashMap<Digest, String>,
}

/// What somebody showed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Right(Who),
    Wrong,
}

impl Accounts {
    pub(crate) fn open(path: &Path, reports: Arc<Reports>) -> Result<Self, AccountsError> {
        // Before it is read: what is written meanwhile is another version.
        let version = Version::of(path);
        let hashes = Arc::new(read(path)?);
        let salt = [0u64; 4].map(|zero| RandomState::new().hash_one(zero));
        let state = Mutex::new(State { read: version, hashes, known: HashMap::new() });
        Ok(Self { path: path.to_owned(), reports, state, turns: Semaphore::new(AT_ONCE), salt })
    }

    /// Who shows `Authorization`. Costs a bcrypt, once for each password that is right.
    pub(crate) async fn check(&self, header: Option<&str>) -> Shown {
        let Some(header) = header else { return Shown::Right(Who::Anonymous) };
        let Some((user, password)) = parse(header) else { return Shown::Wrong };
        let mut salted: Vec<u8> = self.salt.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // No colon is in a user's name.
        salted.extend_from_slice(format!("{user}:{password}").as_bytes());
        let key = Digest::of(&salted);
        let hashes = {
            let state = self.current();
            if let Some(user) = state.known.get(&key) {
                return Shown::Right(Who::Account(user.clone()));
            }
            state.hashes.clone()
        };
        let Ok(_turn) = self.turns.acquire().await else { return Shown::Wrong };
        let (name, given) = (user.clone(), hashes.clone());
        let right = tokio::task::spawn_blocking(move || {
            let known = given.get(&name);
            // As long for who is not there: the time would tell who is.
            let any = given.values().next();
            let hash = known.or(any);
            let is_right = hash.is_some_and(|hash| bcrypt::verify(&password, hash).unwrap_or(false));
            is_right && known.is_some()
        });
        if !right.await.unwrap_or(false) {
            return Shown::Wrong;
        }
        let mut state = self.current();
        if Arc::ptr_eq(&state.hashes, &hashes) {
            if state.known.len() >= MAX_KNOWN {
                state.known.clear();
            }
            state.known.insert(key, user.clone());
        }
        Shown::Right(Who::Account(user))
    }

    /// The state, after a look whether the file is the same. One that cannot be read changes nothing: it
    /// may be about to be written.
    fn current(&self) -> std::sync::MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Version::of(&self.path);
        if now != state.read {
            state.read = now;
            match read(&self.path) {
                Ok(hashes) => {
                    *state = State { read: now, hashes: Arc::new(hashes), known: HashMap::new() };
                }
                Err(error) => self.reports.error("the accounts from before stay in use", &error),
            }
        }
        state
    }

    /// Looks at the file now, not with the next request.
    pub(crate) fn look(&self) {
        drop(self.current());
    }
}

fn read(path: &Path) -> Result<HashMap<String, String>, AccountsError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| AccountsError::Read { path: path.to_owned(), source })?;
    let mut hashes = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let problem = |problem| AccountsError::Line { path: path.to_owned(), line: number + 1, problem };
        let (user, hash) = line.split_once(':').ok_or_else(|| problem("there is no colon"))?;
        if user.is_empty() || user == "anonymous" || user == "*" {
            return Err(problem("no account can be called so"));
        }
        let parsed = hash.parse::<bcrypt::HashParts>();
        let parts = parsed.map_err(|_| problem("the password is not one of `htpasswd -B` (bcrypt)"))?;
        if parts.get_cost() > MAX_COST {
            return Err(problem("the work factor of the password is more than 14"));
        }
        if hashes.insert(user.to_owned(), hash.to_owned()).is_some() {
            return Err(problem("the account is there twice"));
        }
    }
    Ok(hashes)
}

/// `Basic BASE64(USER:PASSWORD)`
fn parse(header: &str) -> Option<(String, String)> {
    if header.len() > MAX_HEADER_BYTES {
        return None;
    }
    let (scheme, encoded) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let bytes = STANDARD.decode(encoded.trim()).ok()?;
    let (user, password) = std::str::from_utf8(&bytes).ok()?.split_once(':')?;
    // Never right, and bcrypt's word for it is another.
    (!user.is_empty() && !password.contains('\0')).then(|| (user.to_owned(), password.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// bcrypt of `right-horse`.
    const HASH: &str = "$2b$04$om4aILnRDyIuTYtbc2RffejFJCYYpvVe9w3cNIv8pY1PXJ5jh3Qc6";

    fn basic(text: &str) -> String {
        format!("Basic {}", STANDARD.encode(text))
    }

    #[tokio::test]
    async fn a_password_is_right_for_its_account_while_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("htpasswd");
        std::fs::write(&path, format!("# people\nann:{HASH}\n")).unwrap();
        let reports = Arc::new(Reports::default());
        let said = Arc::new(Mutex::new(Vec::new()));
        let to = said.clone();
        reports.set(move |text| to.lock().unwrap().push(text));
        let accounts = Accounts::open(&path, reports).unwrap();
        let ann = Shown::Right(Who::Account("ann".to_owned()));
        for _ in 0..2 {
            assert_eq!(accounts.check(Some(&basic("ann:right-horse"))).await, ann);
        }
        assert_eq!(accounts.check(None).await, Shown::Right(Who::Anonymous));
        for wrong in ["ann:wrong", "bob:right-horse", ":right-horse", "ann", "ann:right-horse\0", ""] {
            assert_eq!(accounts.check(Some(&basic(wrong))).await, Shown::Wrong, "{wrong}");
        }
        for wrong in ["Bearer abc", "Basic ?", "Basic", ""] {
            assert_eq!(accounts.check(Some(wrong)).await, Shown::Wrong, "{wrong}");
        }
        // Half a file is not the end of who is logged in, and is told; the whole one without her is.
        assert!(said.lock().unwrap().is_empty());
        for bad in ["ann:", "ann"] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(accounts.check(Some(&basic("ann:right-horse"))).await, ann);
            assert_eq!(accounts.check(Some(&basic("ann:right-horse"))).await, ann);
        }
        let heard = std::mem::take(&mut *said.lock().unwrap());
        assert!(heard.len() == 2 && heard[0].contains("line 1: the password"), "{heard:?}");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(accounts.check(Some(&basic("ann:right-horse"))).await, ann);
        assert!(said.lock().unwrap()[0].contains("cannot be read"), "{said:?}");
        std::fs::write(&path, format!("robert:{HASH}\n")).unwrap();
        assert_eq!(accounts.check(Some(&basic("ann:right-horse"))).await, Shown::Wrong);
    }

    #[test]
    fn a_file_that_is_none_is_said_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("htpasswd");
        for (text, said) in [
            ("ann", "line 1: there is no colon"),
            ("\nann:{SHA}abc", "line 2: the password"),
            (&format!("anonymous:{HASH}"), "no account"),
            (&format!("a:{HASH}\na:{HASH}"), "line 2: the account is there twice"),
            (&format!("a:{}", HASH.replace("$04$", "$31$")), "more than 14"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Accounts::open(&path, Arc::default()).err().unwrap().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        let none = Accounts::open(&dir.path().join("none"), Arc::default());
        assert!(matches!(none, Err(AccountsError::Read { .. })));
    }
}
