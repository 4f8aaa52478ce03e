//! Whom a connection trusts, and what it shows of itself.
//!
//! A server says who it is in the middle of a handshake. Only then are the system's authorities read
//! (`roots.rs`): connections without encryption, and attempts at it that a server of plain http turns down, need none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WantsClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, Error as TlsError, RootCertStore,
    SignatureScheme,
};

use crate::roots::{self, Verifier};
use crate::{Error, Settings};

/// What is computed with, for all connections.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// How TLS is spoken with `domain`; `None`: with wherever a registry redirects, to which nothing of one registry
/// is shown.
///
/// # Errors
/// [`Error::Certificates`] for a file that somebody has named, or put where the registry's are, and that cannot be
/// used.
pub(crate) fn config(settings: &Settings, domain: Option<&str>) -> Result<ClientConfig, Error> {
    let mut named = RootCertStore::empty();
    for file in &settings.ca_files {
        read_authorities(file, &mut named)?;
    }
    let mut identity = None;
    for dir in settings.cert_dirs.iter().filter_map(|dir| Some(dir.join(domain?))) {
        // The last directory counts, as the most personal one.
        identity = read_dir(&dir, &mut named)?.or(identity);
    }
    let is_anybody = domain.is_some_and(|domain| settings.is_insecure(domain));
    let config = builder(Trust { named: roots::verifier(named), is_anybody, provider: provider() });
    let mut config = match identity {
        Some(Identity { path, chain, key }) => config
            .with_client_auth_cert(chain, key)
            .map_err(|error| unusable(&path, io::Error::other(error)))?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A client of web servers that are no registries. It knows them as one of registries does: by the system's
/// authorities, and by those in `pem`.
pub fn web_client(pem: &str) -> reqwest::ClientBuilder {
    let named = roots::verifier(roots::authorities([pem]));
    let trust = Trust { named, is_anybody: false, provider: provider() };
    let mut config = builder(trust).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    reqwest::Client::builder().tls_backend_preconfigured(config)
}

fn builder(trust: Trust) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider knows TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(trust))
}

/// Decides whether a server is who it says it is.
#[derive(Debug)]
struct Trust {
    /// By the authorities that somebody has named.
    named: Verifier,
    /// Whoever it is: it is listed as insecure.
    is_anybody: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Trust {
    /// By the first authorities that know it: a chain of certificates ends at one of them, so that it does not
    /// matter what the others are.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        if self.is_anybody {
            return Ok(ServerCertVerified::assertion());
        }
        let mut why = TlsError::InvalidCertificate(CertificateError::UnknownIssuer);
        for nth in 0..3 {
            // Each is read when those before it were not enough.
            let authorities = match nth {
                0 => &self.named,
                1 => roots::of_file()?,
                _ => roots::of_directories(),
            };
            let Some(authorities) = authorities else { continue };
            match authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
                Ok(verified) => return Ok(verified),
                // That others do not know it says less.
                Err(TlsError::InvalidCertificate(CertificateError::UnknownIssuer)) => {}
                Err(error) => why = error,
            }
        }
        Err(why)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        if self.is_anybody {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        if self.is_anybody {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What a registry is shown that wants to know who asks.
#[derive(Debug)]
struct Identity {
    /// The certificate's file.
    path: PathBuf,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn unusable(path: &Path, source: io::Error) -> Error {
    Error::Certificates { path: path.display().to_string(), source }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = fs::read(path).map_err(|error| unusable(path, error))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|error| unusable(path, invalid(error)))?;
    if found.is_empty() {
        return Err(unusable(path, invalid("there is none in it")));
    }
    Ok(found)
}

fn read_authorities(path: &Path, named: &mut RootCertStore) -> Result<(), Error> {
    for certificate in read_certificates(path)? {
        named.add(certificate).map_err(|error| unusable(path, invalid(error)))?;
    }
    Ok(())
}

/// What is in a directory of docker's layout: authorities go to `named`. Nothing when it is not there.
fn read_dir(dir: &Path, named: &mut RootCertStore) -> Result<Option<Identity>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(unusable(dir, error)),
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in entries {
        files.push(entry.map_err(|error| unusable(dir, error))?.path());
    }
    files.sort();
    let mut identity = None;
    for path in files {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => read_authorities(&path, named)?,
            Some("cert") if identity.is_none() => {
                let key = path.with_extension("key");
                let chain = read_certificates(&path)?;
                let pem = fs::read(&key).map_err(|error| unusable(&key, error))?;
                let key =
                    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| unusable(&key, invalid(error)))?;
                identity = Some(Identity { path, chain, key });
            }
            _ => {}
        }
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CERTIFICATE: &[u8] = include_bytes!("../tests/registry/testdata/certificate.pem");
    const KEY: &[u8] = include_bytes!("../tests/registry/testdata/key.pem");

    /// What a connection to `name` makes of the certificate of the tests' server.
    fn verdict(trust: &Trust, name: &str) -> Result<(), TlsError> {
        let certificate = CertificateDer::from_pem_slice(CERTIFICATE).unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        trust.verify_server_cert(&certificate, &[], &name, &[], UnixTime::now()).map(drop)
    }

    fn trust(named: RootCertStore, is_anybody: bool) -> Trust {
        Trust { named: roots::verifier(named), is_anybody, provider: provider() }
    }

    fn read(dir: &Path) -> Result<(usize, Option<Identity>), Error> {
        let mut named = RootCertStore::empty();
        let identity = read_dir(dir, &mut named)?;
        Ok((named.len(), identity))
    }

    #[test]
    fn a_server_is_known_by_named_authorities_or_not_at_all() {
        let mut named = RootCertStore::empty();
        named.add(CertificateDer::from_pem_slice(CERTIFICATE).unwrap()).unwrap();
        verdict(&trust(named.clone(), false), "127.0.0.1").unwrap();
        // It is known, and another one.
        let error = verdict(&trust(named, false), "other.example").unwrap_err().to_string();
        assert!(error.contains("not valid for name"), "{error}");
        let unknown = verdict(&trust(RootCertStore::empty(), false), "127.0.0.1").unwrap_err();
        assert_eq!(unknown, TlsError::InvalidCertificate(CertificateError::UnknownIssuer));
        verdict(&trust(RootCertStore::empty(), true), "other.example").unwrap();
    }

    #[test]
    fn a_certificate_directory_is_read_or_its_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(matches!(read(&at("absent")), Ok((0, None))));
        fs::write(at("ca.crt"), "no certificate").unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("ca.crt"), "{error}");
        fs::write(at("ca.crt"), CERTIFICATE).unwrap();
        assert!(matches!(read(dir.path()), Ok((1, None))));
        fs::write(at("client.cert"), CERTIFICATE).unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("client.key"), "{error}");
        fs::write(at("client.key"), "no key").unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("client.key"), "{error}");
        fs::write(at("client.key"), KEY).unwrap();
        assert!(matches!(read(dir.path()), Ok((1, Some(_)))));
    }

    #[test]
    fn files_that_somebody_has_named_are_read_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let settings = |file: &str| Settings {
            ca_files: vec![dir.path().join(file)],
            cert_dirs: vec![dir.path().to_owned()],
            ..Settings::default()
        };
        let error = config(&settings("absent.pem"), None).unwrap_err();
        assert!(error.to_string().contains("absent.pem"), "{error}");
        fs::write(dir.path().join("ca.pem"), CERTIFICATE).unwrap();
        assert!(!config(&settings("ca.pem"), None).unwrap().client_auth_cert_resolver.has_certs());
        let host = dir.path().join("h.example:5000");
        fs::create_dir(&host).unwrap();
        fs::write(host.join("client.cert"), CERTIFICATE).unwrap();
        fs::write(host.join("client.key"), KEY).unwrap();
        let shown =
            |domain| config(&settings("ca.pem"), domain).unwrap().client_auth_cert_resolver.has_certs();
        assert!(shown(Some("h.example:5000")));
        assert!(!shown(Some("h.example")) && !shown(None));
    }
}
