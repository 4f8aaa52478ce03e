//! Certificates of authorities that processes trust beside those that their image has: passed when a
//! process starts, and kept nowhere (`docs/adr/0015-extra-certificates.md`).

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use kiln_oci::{FileMount, Mount};
use rustix::fs::{MemfdFlags, memfd_create};

use super::paths::read_small;
use crate::{ExecError, Handles, ProcessSpec};

/// Where processes find all certificates. In `/dev` nothing has to be made in the image for it.
const FILE: &str = "/dev/kiln/ca-certificates.crt";
/// What says where the certificates are: to programs that then look nowhere else.
const INSTEAD: [&str; 7] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
];
/// The same to programs that go on trusting what they have.
const BESIDE: [&str; 2] = ["NODE_EXTRA_CA_CERTS", "DENO_CERT"];
/// Files that distributions keep all certificates in, in the order in which OpenSSL and Go know them.
const PLACES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Of certificates in one file: distributions' take a quarter of a MiB.
const MAX_BYTES: u64 = 8 << 20;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Certificates in PEM form, those of all files together. The default is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Authorities {
    pem: Arc<str>,
}

/// Why a file holds no certificates.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// There is none in it.
    #[error("there is no certificate in PEM form in it")]
    None,
    /// A certificate in it has no end, or is no base64.
    #[error("certificate {number} in it is damaged")]
    Damaged {
        /// From 1 on.
        number: usize,
    },
    /// What nobody should see is in it.
    #[error("there is a private key in it, which no process should get")]
    PrivateKey,
    /// It is no list of certificates.
    #[error("it is larger than 8 MiB")]
    TooLarge,
}

impl Authorities {
    /// Adds the certificates of a file; what is around them is left out.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn add(&mut self, path: &Path) -> Result<(), AuthorityError> {
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut text));
        read.map_err(AuthorityError::Read)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(AuthorityError::TooLarge);
        }
        let found = certificates(&String::from_utf8_lossy(&text))?;
        self.pem = format!("{}{found}", self.pem).into();
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pem.is_empty()
    }

    /// The certificates, one behind the other.
    pub fn pem(&self) -> Arc<str> {
        self.pem.clone()
    }

    /// What is put behind an image's own certificates: the certificates between two lines that say whose
    /// they are.
    pub fn block(&self) -> String {
        format!("\n# kiln: not part of the image\n{}# kiln: end\n", self.pem)
    }

    /// Files in which images have their certificates, as absolute paths.
    pub fn places() -> &'static [&'static str] {
        &PLACES
    }

    /// Gives a process these certificates with those of its image: one file, and the variables that lead
    /// programs to it. Variables that the process has already stay what they are. Reads the image's
    /// certificates; nothing in it is changed.
    ///
    /// # Errors
    /// [`ExecError::Start`] when there is no memory for them.
    pub fn give(&self, process: &mut ProcessSpec, handles: &mut Handles) -> Result<(), ExecError> {
        use std::os::fd::AsFd;
        if self.is_empty() {
            return Ok(());
        }
        let own = bundle(handles.root.as_fd());
        let names = BESIDE.iter().chain(if own.is_some() { &INSTEAD[..] } else { &INSTEAD[..1] });
        for &name in names {
            if process.env.iter().all(|(known, _)| known != name) {
                process.env.push((name.to_owned(), FILE.to_owned()));
            }
        }
        let input = handles.inputs.len();
        handles.inputs.push(self.to_file(&own.unwrap_or_default())?);
        let file = FileMount { input, target: FILE.to_owned(), mode: 0o444, uid: 0, gid: 0 };
        process.mounts.push(Mount::File(file));
        Ok(())
    }

    fn to_file(&self, own: &[u8]) -> Result<OwnedFd, ExecError> {
        let failed = |source| ExecError::Start { step: "certificates".to_owned(), source };
        let memory = memfd_create("kiln-certificates", MemfdFlags::CLOEXEC);
        let mut file = File::from(memory.map_err(ExecError::start("certificates"))?);
        let mut text = own.to_vec();
        let block = self.block();
        // The image's own file may be shown with them already.
        if !own.ends_with(block.as_bytes()) {
            text.extend_from_slice(block.as_bytes());
        }
        file.write_all(&text).and_then(|()| file.rewind()).map_err(failed)?;
        Ok(file.into())
    }
}

/// The certificates that an image has. Files that are none, or that nobody can read, are none.
fn bundle(root: BorrowedFd<'_>) -> Option<Vec<u8>> {
    PLACES.iter().find_map(|place| read_small(root, place, MAX_BYTES).ok().flatten())
}

/// The certificates in a text, each with a line feed.
fn certificates(text: &str) -> Result<String, AuthorityError> {
    if text.contains("PRIVATE KEY-----") {
        return Err(AuthorityError::PrivateKey);
    }
    let mut found = String::new();
    let (mut rest, mut number) = (text, 0);
    while let Some((_, after)) = rest.split_once(BEGIN) {
        number += 1;
        let damaged = || AuthorityError::Damaged { number };
        let (body, after) = after.split_once(END).ok_or_else(damaged)?;
        let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=\r\n \t".contains(&byte);
        if body.trim().is_empty() || !body.bytes().all(is_base64) {
            return Err(damaged());
        }
        found.push_str(&format!("{BEGIN}\n"));
        for line in body.split_whitespace() {
            found.push_str(&format!("{line}\n"));
        }
        found.push_str(&format!("{END}\n"));
        rest = after;
    }
    if found.is_empty() { Err(AuthorityError::None) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn pem(body: &str) -> String {
        format!("{BEGIN}\n{body}\n{END}\n")
    }

    fn of(files: &[&str]) -> Result<Authorities, AuthorityError> {
        let dir = tempfile::tempdir().unwrap();
        let mut all = Authorities::default();
        for (number, text) in files.iter().enumerate() {
            let path = dir.path().join(number.to_string());
            std::fs::write(&path, text).unwrap();
            all.add(&path)?;
        }
        Ok(all)
    }

    #[test]
    fn certificates_are_taken_and_what_is_around_them_is_not() {
        let one = format!("subject=corp\r\n{}trailing\n", pem("AAAA\r\n  BBBB").replace('\n', "\r\n"));
        let all = of(&[&one, &pem("CCCC")]).unwrap();
        assert_eq!(&*all.pem, format!("{}{}", pem("AAAA\nBBBB"), pem("CCCC")));
        assert!(Authorities::default().is_empty() && !all.is_empty());
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let key = format!("{}-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", pem("AAAA"));
        assert!(matches!(of(&[&key]), Err(AuthorityError::PrivateKey)));
        for text in ["", "nothing", "\0\u{1}", END] {
            assert!(matches!(of(&[text]), Err(AuthorityError::None)), "{text:?}");
        }
        let damaged =
            [format!("{}{BEGIN}\nAAAA\n", pem("AAAA")), pem("AAAA") + &pem("?"), pem("AA") + &pem("")];
        for text in &damaged {
            assert!(matches!(of(&[text]), Err(AuthorityError::Damaged { number: 2 })), "{text:?}");
        }
        let missing = Authorities::default().add(Path::new("/no/such/file"));
        assert!(matches!(missing, Err(AuthorityError::Read(_))));
        assert!(matches!(of(&[&"x".repeat(9 << 20)]), Err(AuthorityError::TooLarge)));
    }

    fn given(image: Option<&str>, env: &[(&str, &str)]) -> (ProcessSpec, String) {
        let dir = tempfile::tempdir().unwrap();
        if let Some(own) = image {
            let certs = dir.path().join("etc/ssl/certs");
            std::fs::create_dir_all(&certs).unwrap();
            // Some have it behind a link that is absolute in the image.
            std::fs::write(dir.path().join("etc/ssl/all"), own).unwrap();
            std::os::unix::fs::symlink("/etc/ssl/all", certs.join("ca-certificates.crt")).unwrap();
        }
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut process = ProcessSpec { env, ..ProcessSpec::default() };
        let mut handles = Handles::from(OwnedFd::from(File::open(dir.path()).unwrap()));
        of(&[&pem("AAAA")]).unwrap().give(&mut process, &mut handles).unwrap();
        let mut text = String::new();
        let [file] = <[OwnedFd; 1]>::try_from(handles.inputs).unwrap();
        File::from(file).read_to_string(&mut text).unwrap();
        assert!(matches!(&process.mounts[..], [Mount::File(FileMount { input: 0, mode: 0o444, .. })]));
        (process, text)
    }

    fn value<'a>(process: &'a ProcessSpec, name: &str) -> Option<&'a str> {
        process.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    #[test]
    fn a_process_gets_one_file_with_its_images_certificates_and_these() {
        let (process, text) = given(Some(&pem("IMAGE")), &[("PIP_CERT", "/mine")]);
        assert_eq!(text.matches(BEGIN).count(), 2);
        assert!(text.starts_with(&pem("IMAGE")) && text.contains(&pem("AAAA")));
        assert_eq!(value(&process, "SSL_CERT_FILE"), Some(FILE));
        assert_eq!(value(&process, "NODE_EXTRA_CA_CERTS"), Some(FILE));
        assert_eq!(value(&process, "PIP_CERT"), Some("/mine"));
    }

    #[test]
    fn programs_with_certificates_of_their_own_keep_them_where_the_image_has_none() {
        let (process, text) = given(None, &[]);
        assert_eq!(text.matches(BEGIN).count(), 1);
        assert_eq!(value(&process, "SSL_CERT_FILE"), Some(FILE));
        assert_eq!(value(&process, "REQUESTS_CA_BUNDLE"), None);
    }

    #[test]
    fn nothing_is_given_when_there_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = ProcessSpec::default();
        let mut handles = Handles::from(OwnedFd::from(File::open(dir.path()).unwrap()));
        Authorities::default().give(&mut process, &mut handles).unwrap();
        assert_eq!((process, handles.inputs.len()), (ProcessSpec::default(), 0));
    }

    #[test]
    fn a_bundle_that_is_no_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("etc/ssl/certs/ca-certificates.crt")).unwrap();
        std::fs::create_dir_all(dir.path().join("etc/ssl")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("etc/ssl/cert.pem")).unwrap();
        assert_eq!(bundle(File::open(dir.path()).unwrap().as_fd()), None);
    }
}
