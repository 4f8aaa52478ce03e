//! The certificates that this system trusts, read once for all connections.
//!
//! Most systems have them twice: in one file, and one by one in a directory, there under two names each. Whoever
//! reads all of that decodes each certificate three times, which takes longer than a push with nothing to send.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use reqwest::Certificate;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// The one file: of Debian, Arch and Alpine; Fedora; openSUSE; older Fedora.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
];
/// Directories that administrators put more into.
const DIRS: [&str; 2] = ["/etc/ssl/certs", "/etc/pki/tls/certs"];
/// Larger files are no certificates.
const MAX_FILE_BYTES: u64 = 1 << 20;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// What the system trusts; `None`: it keeps that elsewhere, or its environment says where (`SSL_CERT_FILE`,
/// `SSL_CERT_DIR`), and whoever connects has to look for it.
pub(crate) fn roots() -> Option<&'static [Certificate]> {
    static ROOTS: OnceLock<Option<Vec<Certificate>>> = OnceLock::new();
    let read = || {
        if ["SSL_CERT_FILE", "SSL_CERT_DIR"].iter().any(|name| std::env::var_os(name).is_some()) {
            return None;
        }
        let bundle = BUNDLES.iter().find_map(|bundle| fs::read_to_string(bundle).ok())?;
        Some(certificates(&bundle, DIRS.map(Path::new).as_slice())).filter(|found| !found.is_empty())
    };
    ROOTS.get_or_init(read).as_deref()
}

/// Those of `bundle`, and those in `dirs` that it does not have.
fn certificates(bundle: &str, dirs: &[&Path]) -> Vec<Certificate> {
    let mut files = HashSet::new();
    let mut texts = Vec::new();
    for dir in dirs {
        // One that cannot be read is nobody's: the bundle is what counts.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            // Behind the link that most of them are.
            let Ok(stat) = fs::metadata(entry.path()) else { continue };
            if stat.is_file() && stat.len() <= MAX_FILE_BYTES && files.insert((stat.dev(), stat.ino())) {
                texts.extend(fs::read_to_string(entry.path()));
            }
        }
    }
    let mut known = HashSet::new();
    let all = [bundle].into_iter().chain(texts.iter().map(String::as_str)).flat_map(blocks);
    all.filter(|block| known.insert(*block)).filter_map(certificate).collect()
}

/// The certificates in `pem`, each from its first line to its last.
fn blocks(pem: &str) -> impl Iterator<Item = &str> {
    pem.match_indices(BEGIN).filter_map(|(at, _)| {
        let rest = &pem[at..];
        rest.find(END).map(|end| &rest[..end + END.len()])
    })
}

/// `None`: it is none that anything could be verified with.
fn certificate(block: &str) -> Option<Certificate> {
    let der = CertificateDer::from_pem_slice(block.as_bytes()).ok()?;
    let made = Certificate::from_der(&der).ok();
    RootCertStore::empty().add(der).ok().and(made)
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
    fn each_certificate_is_taken_once_and_what_is_none_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("one.pem"), ONE).unwrap();
        fs::write(at("two.pem"), format!("# ours\n{TWO}")).unwrap();
        std::os::unix::fs::symlink("two.pem", at("0123abcd.0")).unwrap();
        std::os::unix::fs::symlink("gone", at("dangling")).unwrap();
        fs::write(at("README"), format!("{BEGIN}\nbm90aGluZw==\n{END}\n{BEGIN}\n")).unwrap();
        fs::create_dir(at("java")).unwrap();
        assert_eq!(certificates(ONE, &[dir.path(), &at("absent")]).len(), 2);
        assert_eq!(certificates(&format!("{ONE}{TWO}{ONE}"), &[dir.path()]).len(), 2);
        assert_eq!(certificates("", &[]).len(), 0);
    }
}
