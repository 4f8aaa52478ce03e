//! Connections, from the first to the last.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::accounts::{Accounts, AccountsError};
use crate::api::Registry;
use crate::connection::Patient;
use crate::directory::{Collected, Directory, DirectoryError};
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::settings::{Collection, Settings, TlsFiles};

/// Heads are at most so long, and have at most so many headers.
const MAX_HEAD_BYTES: usize = 64 << 10;
const MAX_HEADERS: usize = 64;

/// Why a registry does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Its directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Its accounts.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// Somebody else listens there, or the address is not this machine's.
    #[error("nobody can listen at {address}")]
    Listen { address: SocketAddr, source: io::Error },
    /// A file is no certificate, or no key.
    #[error("{} has no {what} as PEM", path.display())]
    Pem { path: PathBuf, what: &'static str, source: rustls::pki_types::pem::Error },
    /// The certificate and the key do not go together.
    #[error("{} cannot be used with its key", path.display())]
    Tls { path: PathBuf, source: rustls::Error },
}

/// A registry that listens.
pub struct Server {
    registry: Arc<Registry>,
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<TlsAcceptor>,
    collection: Collection,
}

/// Removes what nothing refers to, beside a server that runs.
pub struct Collector(Arc<Registry>);

impl Collector {
    /// As [`Server::collect`].
    ///
    /// # Errors
    /// [`DirectoryError`].
    pub async fn collect(&self, policy: &Collection) -> Result<Collected, DirectoryError> {
        collect(&self.0, policy).await
    }
}

impl Server {
    /// Opens the directory and listens. Needs a tokio runtime with time and I/O.
    ///
    /// # Errors
    /// [`StartError`]; nothing listens then.
    pub async fn bind(settings: Settings) -> Result<Self, StartError> {
        let tls = settings.tls.as_ref().map(acceptor).transpose()?;
        let accounts = settings.accounts.as_deref().map(Accounts::open).transpose()?;
        let directory = Arc::new(Directory::open(&settings.directory, &settings.limits)?);
        let failed = |source| StartError::Listen { address: settings.listen, source };
        let listener = TcpListener::bind(settings.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let registry = Registry {
            directory,
            accounts,
            rights: settings.rights,
            read_only: settings.read_only || settings.mirror.is_some(),
            mirror: settings.mirror.map(|behind| Arc::new(Mirror::new(behind))),
            limits: settings.limits,
            metrics: Arc::new(Metrics::default()),
        };
        let registry = Arc::new(registry);
        Ok(Self { registry, listener, address, tls, collection: settings.collection })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Removes what nothing refers to, once, as it is removed from time to time. May take long, and pushes go on
    /// meanwhile.
    ///
    /// # Errors
    /// [`DirectoryError`].
    pub async fn collect(&self, policy: &Collection) -> Result<Collected, DirectoryError> {
        self.collector().collect(policy).await
    }

    /// What does that while the server runs.
    pub fn collector(&self) -> Collector {
        Collector(self.registry.clone())
    }

    /// Answers requests until `end` is there. Then nobody is let in any more, and what is being answered has
    /// [`crate::Limits::drain`] to be so. `report` gets what goes wrong without anybody asking.
    pub async fn run(self, end: impl Future<Output = ()>, report: impl Fn(String) + Send + Sync + 'static) {
        let Self { registry, listener, tls, collection, .. } = self;
        let (ending, ended) = watch::channel(false);
        let turns = Arc::new(Semaphore::new(registry.limits.connections));
        let report = Arc::new(report);
        let care = tokio::spawn(take_care(registry.clone(), collection, report.clone()));
        let mut end = pin!(end);
        loop {
            let turn = tokio::select! {
                () = &mut end => break,
                turn = turns.clone().acquire_owned() => turn,
            };
            let Ok(turn) = turn else { break };
            let accepted = tokio::select! {
                () = &mut end => break,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // No descriptors, no memory: both come back when somebody else ends.
                    report(format!("a connection could not be taken: {error}"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (registry, tls, ended) = (registry.clone(), tls.clone(), ended.clone());
            tokio::spawn(async move {
                registry.metrics.connections.fetch_add(1, Ordering::Relaxed);
                serve(&registry, stream, tls, ended).await;
                registry.metrics.connections.fetch_sub(1, Ordering::Relaxed);
                drop(turn);
            });
        }
        drop(listener);
        ending.send_replace(true);
        care.abort();
        let all = u32::try_from(registry.limits.connections).unwrap_or(u32::MAX);
        let _ = tokio::time::timeout(registry.limits.drain, turns.acquire_many(all)).await;
    }
}

/// What is to be done from time to time.
async fn take_care(
    registry: Arc<Registry>,
    collection: Collection,
    report: Arc<impl Fn(String) + Send + Sync + 'static>,
) {
    let minute = Duration::from_secs(60);
    let mut since = Duration::ZERO;
    loop {
        tokio::time::sleep(minute).await;
        since += minute;
        let directory = registry.directory.clone();
        let expired = tokio::task::spawn_blocking(move || directory.uploads.expire()).await;
        if let Ok(Err(error)) = expired {
            report(format!("uploads that nobody goes on with: {error}"));
        }
        if collection.every.is_some_and(|every| since >= every) {
            since = Duration::ZERO;
            if let Err(error) = collect(&registry, &collection).await {
                report(format!("garbage collection: {error}"));
            }
        }
    }
}

async fn collect(registry: &Registry, policy: &Collection) -> Result<Collected, DirectoryError> {
    let (directory, policy) = (registry.directory.clone(), policy.clone());
    let done = tokio::task::spawn_blocking(move || directory.collect(&policy)).await;
    let collected = done.unwrap_or(Ok(Collected::default()))?;
    let metrics = &registry.metrics;
    metrics.collections.fetch_add(1, Ordering::Relaxed);
    metrics.collected_blobs.fetch_add(collected.blobs, Ordering::Relaxed);
    metrics.collected_bytes.fetch_add(collected.bytes, Ordering::Relaxed);
    Ok(collected)
}

async fn serve(
    registry: &Arc<Registry>,
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    ended: watch::Receiver<bool>,
) {
    // Answers are written whole; there is nothing to wait for.
    let _ = stream.set_nodelay(true);
    match tls {
        None => answer(registry, stream, ended).await,
        Some(tls) => {
            let shaken = tokio::time::timeout(registry.limits.head, tls.accept(stream)).await;
            if let Ok(Ok(stream)) = shaken {
                answer(registry, stream, ended).await;
            }
        }
    }
}

async fn answer<T>(registry: &Arc<Registry>, stream: T, mut ended: watch::Receiver<bool>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = Patient::new(stream, registry.limits.clone(), registry.metrics.clone());
    let service = service_fn(|request| {
        let registry = registry.clone();
        async move { Ok::<_, Infallible>(registry.handle(request).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(registry.limits.head)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .half_close(false);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    // How it ended is the client's business.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = ended.wait_for(|ended| *ended) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, StartError> {
    let pem = |path: &PathBuf, what| {
        let path = path.clone();
        move |source| StartError::Pem { path, what, source }
    };
    let certificates = CertificateDer::pem_file_iter(&files.certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .and_then(
            |all| if all.is_empty() { Err(rustls::pki_types::pem::Error::NoItemsFound) } else { Ok(all) },
        )
        .map_err(pem(&files.certificates, "certificates"))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(pem(&files.key, "private key"))?;
    let unusable = |source| StartError::Tls { path: files.certificates.clone(), source };
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
