//! The certificate and its key, read again when they change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::reports::Reports;
use crate::server::StartError;
use crate::settings::TlsFiles;
use crate::version::Version;

/// How TLS is spoken with those who come.
pub(crate) struct Tls {
    files: TlsFiles,
    reports: Arc<Reports>,
    state: Mutex<State>,
}

struct State {
    /// Of the files as they were when they were last read, whether they were of use or not.
    read: Versions,
    acceptor: TlsAcceptor,
}

type Versions = [Option<Version>; 2];

impl Tls {
    pub(crate) fn open(files: &TlsFiles, reports: Arc<Reports>) -> Result<Self, StartError> {
        // Before they are read: what is written meanwhile is another version.
        let read = versions(files);
        let state = Mutex::new(State { read, acceptor: acceptor(files)? });
        Ok(Self { files: files.clone(), reports, state })
    }

    /// With the files as they are now. When they are of no use, as when only one of them was replaced so far, the old
    /// ones hold; who is connected stays so in any case. Costs two system calls when nothing has changed.
    pub(crate) fn current(&self) -> TlsAcceptor {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = versions(&self.files);
        if now != state.read {
            state.read = now;
            match acceptor(&self.files) {
                Ok(acceptor) => state.acceptor = acceptor,
                Err(error) => self.reports.error("the certificate from before stays in use", &error),
            }
        }
        state.acceptor.clone()
    }
}

fn versions(files: &TlsFiles) -> Versions {
    [&files.certificates, &files.key].map(|path| Version::of(path))
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, StartError> {
    let pem = |path: &Path, what| {
        let path = path.to_owned();
        move |source| StartError::Pem { path, what, source }
    };
    let certificates = CertificateDer::pem_file_iter(&files.certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .and_then(|all| if all.is_empty() { Err(PemError::NoItemsFound) } else { Ok(all) })
        .map_err(pem(&files.certificates, "certificates"))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(pem(&files.key, "private key"))?;
    let path: PathBuf = files.certificates.clone();
    let unusable = |source| StartError::Tls { path: path.clone(), source };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
