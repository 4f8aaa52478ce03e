//! The authorities that this system trusts: read when a server has shown a certificate, and no more of them than
//! it takes to know it.
//!
//! Most systems have them twice: in one file, and one by one in a directory, there under two names each. Servers are
//! known by the file, so the directory, where administrators put more, is read for those that are not.

use std::collections::HashSet;
use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{OtherError, RootCertStore};

use crate::trust::provider;

/// The one file: of Debian, Arch and Alpine; Fedora; openSUSE; older Fedora; OpenSSL's own place.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];
/// Directories that administrators put more into.
const DIRS: [&str; 2] = ["/etc/ssl/certs", "/etc/pki/tls/certs"];
/// Larger files in a directory are no certificates.
const MAX_FILE_BYTES: u64 = 1 << 20;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Knows the servers of some authorities; `None`: there are none.
pub(crate) type Verifier = Option<Arc<WebPkiServerVerifier>>;

/// `SSL_CERT_FILE` names no file that can be read. rustls hands on the text alone, so the cause is part of it.
#[derive(Debug, thiserror::Error)]
#[error("the certificates in {} cannot be read: {why}", path.display())]
struct Unreadable {
    path: PathBuf,
    why: io::Error,
}

/// The authorities of the system's file; of the one that `SSL_CERT_FILE` names, if there is that variable.
pub(crate) fn of_file() -> Result<&'static Verifier, rustls::Error> {
    static FILE: OnceLock<Result<Verifier, rustls::Error>> = OnceLock::new();
    FILE.get_or_init(|| {
        let text = match (variable("SSL_CERT_FILE"), variable("SSL_CERT_DIR")) {
            (Some(file), _) => {
                let path = PathBuf::from(file);
                let unreadable = |why| Unreadable { path: path.clone(), why };
                read(&path).map_err(|error| OtherError(Arc::new(unreadable(error))))?
            }
            (None, Some(_)) => String::new(),
            (None, None) => {
                BUNDLES.iter().find_map(|bundle| read(Path::new(bundle)).ok()).unwrap_or_default()
            }
        };
        Ok(verifier(authorities([text.as_str()])))
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// The authorities of the system's directories; of those that `SSL_CERT_DIR` names, if there is that variable.
pub(crate) fn of_directories() -> &'static Verifier {
    static DIRECTORIES: OnceLock<Verifier> = OnceLock::new();
    DIRECTORIES.get_or_init(|| {
        let dirs = match (variable("SSL_CERT_FILE"), variable("SSL_CERT_DIR")) {
            (_, Some(dirs)) => env::split_paths(&dirs).collect(),
            (Some(_), None) => Vec::new(),
            (None, None) => DIRS.map(PathBuf::from).to_vec(),
        };
        let texts = texts(&dirs);
        verifier(authorities(texts.iter().map(String::as_str)))
    })
}

fn variable(name: &str) -> Option<std::ffi::OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// What knows servers by these authorities.
pub(crate) fn verifier(authorities: RootCertStore) -> Verifier {
    // It is built from any authorities, but not from none.
    WebPkiServerVerifier::builder_with_provider(Arc::new(authorities), provider()).build().ok()
}

/// Between certificates there may be notes in any encoding.
fn read(path: &Path) -> io::Result<String> {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// What is in the files of these directories, each of them once.
fn texts(dirs: &[PathBuf]) -> Vec<String> {
    let mut files = HashSet::new();
    let mut texts = Vec::new();
    for dir in dirs {
        // One that cannot be read is nobody's: the file is what counts.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            // Behind the link that most of them are.
            let Ok(stat) = fs::metadata(entry.path()) else { continue };
            if stat.is_file() && stat.len() <= MAX_FILE_BYTES && files.insert((stat.dev(), stat.ino())) {
                texts.extend(read(&entry.path()));
            }
        }
    }
    texts
}

/// The authorities in `texts`, each once. What no server could be known by is left out.
pub(crate) fn authorities<'a>(texts: impl IntoIterator<Item = &'a str>) -> RootCertStore {
    let (mut known, mut found) = (HashSet::new(), RootCertStore::empty());
    for block in texts.into_iter().flat_map(blocks).filter(|block| known.insert(*block)) {
        if let Ok(der) = CertificateDer::from_pem_slice(block.as_bytes()) {
            let _ = found.add(der);
        }
    }
    found
}

/// The certificates in `pem`, each from its first line to its last.
fn blocks(pem: &str) -> impl Iterator<Item = &str> {
    pem.match_indices(BEGIN).filter_map(|(at, _)| {
        let rest = &pem[at..];
        rest.find(END).map(|end| &rest[..end + END.len()])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // Made with `openssl req -x509 -newkey ec -days 36500`; the keys are gone.
    const ONE: &str = "-----BEGIN CERTIFICATE-----
MIIBgzCCASmgAwIBAgIUEm1Qb08dBSFdUBGzTl3qfka+Nz4wCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLb25lLmV4YW1wbGUwIBcNMjYxMTIyMDU0OTA3WhgPMjEyNjEw
MjkwNTQ5MDdaMBYxFDASBgNVBAMMC29uZS5leGFtcGxlMFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAE2LJYfYwJmzzpe/w0gyk1ZnGX/kIKf5kNVpw9mMNoWl2U5b2l
yrR4/AFk4TUKJ0cJpFHYZ5xNAE/bqiitpqwAF6NTMFEwHQYDVR0OBBYEFB5cqO19
kvgCRJ1/3UJkgTzJER53MB8GA1UdIwQYMBaAFB5cqO19kvgCRJ1/3UJkgTzJER53
MA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZIzj0EAwIDSAAwRQIgRIwn+KWX17n8Kvvf
vGyrMcdujjByIGEuUsnOr0URBU8CIQD24Q1LSYhdrarS538m2uDpJHmqi+lO1zoc
NjEXHXLHKw==
-----END CERTIFICATE-----
";
    const TWO: &str = "-----BEGIN CERTIFICATE-----
MIIBgzCCASmgAwIBAgIUez+h9mkDk1T7tIS193h1FWXusJswCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLdHdvLmV4YW1wbGUwIBcNMjYxMTIyMDU0OTA3WhgPMjEyNjEw
MjkwNTQ5MDdaMBYxFDASBgNVBAMMC3R3by5leGFtcGxlMFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAEZklJyRf6FJwVT0/wH/EkgQu2vdEtGgrPTLcu5mE6X1wpBLcv
140pQNJUo36P/wAoUwtFhGCVQW7PyUQABEQVlKNTMFEwHQYDVR0OBBYEFBxFUoDC
lClguZnZoxDn1k2mbkdZMB8GA1UdIwQYMBaAFBxFUoDClClguZnZoxDn1k2mbkdZ
MA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZIzj0EAwIDSAAwRQIgaeEVowE+J+fmbyk8
Fl5JL+mDbXyAhX+CASHB1LD9VvICIQC//Aik4qVSs7B6MKumSATIIwCy6MsVl6bF
UBd9Jwxxog==
-----END CERTIFICATE-----
";

    #[test]
    fn each_authority_is_taken_once_and_what_is_none_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("one.pem"), ONE).unwrap();
        fs::write(at("two.pem"), format!("# ours\n{TWO}")).unwrap();
        fs::write(at("latin.pem"), [&b"# M\xfcnchen\n"[..], TWO.as_bytes()].concat()).unwrap();
        std::os::unix::fs::symlink("two.pem", at("0123abcd.0")).unwrap();
        std::os::unix::fs::symlink("gone", at("dangling")).unwrap();
        fs::write(at("README"), format!("{BEGIN}\nbm90aGluZw==\n{END}\n{BEGIN}\n")).unwrap();
        fs::create_dir(at("java")).unwrap();
        let texts = texts(&[dir.path().to_owned(), at("absent")]);
        assert_eq!(texts.len(), 4);
        assert_eq!(authorities(texts.iter().map(String::as_str)).len(), 2);
        assert_eq!(authorities([format!("{ONE}{TWO}{ONE}").as_str()]).len(), 2);
        assert!(verifier(authorities([ONE])).is_some() && verifier(authorities([""])).is_none());
    }
}
