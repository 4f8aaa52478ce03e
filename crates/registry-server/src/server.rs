//! Connections, from the first to the last.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;

use crate::accounts::{Accounts, AccountsError};
use crate::api::{Held, Registry};
use crate::connection::Patient;
use crate::directory::{Collected, Directory, DirectoryError};
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::pushed::{Pushing, Trouble};
use crate::reports::Reports;
use crate::rights::Rule;
use crate::settings::{Collection, Content, Limits, Settings};
use crate::tls::Tls;

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
    tls: Option<Arc<Tls>>,
    collection: Collection,
}

/// A hold on a server that runs.
#[derive(Clone)]
pub struct Control {
    registry: Arc<Registry>,
    tls: Option<Arc<Tls>>,
}

impl Control {
    /// Removes what nothing refers to, once, as it is removed from time to time. May take long, and pushes go on
    /// meanwhile. Of images that others keep nothing is removed.
    ///
    /// # Errors
    /// [`DirectoryError`].
    pub async fn collect(&self, policy: &Collection) -> Result<Collected, DirectoryError> {
        collect(&self.registry, policy).await
    }

    /// Looks at the files of accounts and certificates now, not when somebody comes. What is wrong with them is
    /// reported, and those from before hold.
    pub fn look_at_files(&self) {
        if let Some(accounts) = &self.registry.accounts {
            accounts.look();
        }
        if let Some(tls) = &self.tls {
            tls.current();
        }
    }

    /// From the next request on these count.
    pub fn set_rights(&self, rights: Vec<Rule>) {
        *self.registry.rights.write().unwrap_or_else(std::sync::PoisonError::into_inner) = rights.into();
    }
}

impl Server {
    /// Opens the directory and listens. Needs a tokio runtime with time and I/O.
    ///
    /// # Errors
    /// [`StartError`]; nothing listens then.
    pub async fn bind(settings: Settings) -> Result<Self, StartError> {
        let reports = Arc::new(Reports::default());
        let tls = settings.tls.as_ref().map(|files| Tls::open(files, reports.clone())).transpose()?;
        let accounts = settings.accounts.as_deref().map(|path| Accounts::open(path, reports.clone()));
        let accounts = accounts.transpose()?;
        let (held, keeps) = match settings.content {
            Content::Directory(path) => {
                (Held::Directory(Arc::new(Directory::open(&path, &settings.limits)?)), true)
            }
            Content::Images(images) => (Held::Images(images), false),
            Content::Pushed { images, directory } if settings.read_only => {
                // Somebody else may take pushes, now or one day.
                let directory = Directory::open_to_come(&directory, &settings.limits)?;
                (Held::Pushed(Arc::new(Pushing::new(images, directory, reports.clone()))), false)
            }
            Content::Pushed { images, directory } => {
                let directory = open_soon(&directory, &settings.limits).await?;
                directory.note_times(settings.collection.grace, settings.limits.upload_life)?;
                (Held::Pushed(Arc::new(Pushing::new(images, directory, reports.clone()))), true)
            }
        };
        let failed = |source| StartError::Listen { address: settings.listen, source };
        let listener = TcpListener::bind(settings.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let registry = Registry {
            held,
            accounts,
            rights: RwLock::new(settings.rights.into()),
            read_only: settings.read_only || settings.mirror.is_some() || !keeps,
            mirror: settings.mirror.map(|behind| Arc::new(Mirror::new(behind))),
            limits: settings.limits,
            metrics: Arc::new(Metrics::default()),
            packing: Arc::new(Semaphore::new(1)),
            verified: Arc::default(),
            reports,
        };
        let registry = Arc::new(registry);
        let tls = tls.map(Arc::new);
        Ok(Self { registry, listener, address, tls, collection: settings.collection })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A hold on it for the time when it runs.
    pub fn control(&self) -> Control {
        Control { registry: self.registry.clone(), tls: self.tls.clone() }
    }

    /// Answers requests until `end` is there. Then nobody is let in any more, and what is being answered has
    /// [`crate::Limits::drain`] to be so. `report` gets what goes wrong without anybody asking.
    pub async fn run(self, end: impl Future<Output = ()>, report: impl Fn(String) + Send + Sync + 'static) {
        let Self { registry, listener, tls, collection, .. } = self;
        let (ending, ended) = watch::channel(false);
        let turns = Arc::new(Semaphore::new(registry.limits.connections));
        registry.reports.set(report);
        let care = tokio::spawn(take_care(registry.clone(), collection));
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
                    registry.reports.error("a connection could not be taken", &error);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (registry, ended) = (registry.clone(), ended.clone());
            let tls = tls.as_ref().map(|tls| tls.current());
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

/// Opens a directory that garbage may be collected in, offline, which takes a moment.
async fn open_soon(path: &Path, limits: &Limits) -> Result<Directory, DirectoryError> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let began = Instant::now();
    loop {
        match Directory::open(path, limits) {
            Err(DirectoryError::Taken { .. }) if began.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            opened => return opened,
        }
    }
}

/// How often there is something to be done: once a minute, and more often where that would be long.
fn pause(limits: &Limits, collection: &Collection) -> Duration {
    let shortest = collection.every.map_or(limits.upload_life, |every| every.min(limits.upload_life));
    (shortest / 4).clamp(Duration::from_millis(50), Duration::from_secs(60))
}

/// What is to be done from time to time.
async fn take_care(registry: Arc<Registry>, collection: Collection) {
    let pause = pause(&registry.limits, &collection);
    let mut since = Duration::ZERO;
    loop {
        tokio::time::sleep(pause).await;
        since += pause;
        let directory = match &registry.held {
            Held::Directory(directory) => directory.clone(),
            Held::Images(images) => {
                let images = images.clone();
                let _ = tokio::task::spawn_blocking(move || images.tidy()).await;
                continue;
            }
            Held::Pushed(pushing) => {
                let images = pushing.images.clone();
                let _ = tokio::task::spawn_blocking(move || images.tidy()).await;
                if registry.read_only {
                    // Another process may own what was pushed.
                    continue;
                }
                follow_names(&registry, pushing).await;
                pushing.directory.clone()
            }
        };
        let expired = tokio::task::spawn_blocking(move || directory.uploads.expire()).await;
        match expired {
            Ok(Ok(count)) => {
                registry.metrics.expired_uploads.fetch_add(count, Ordering::Relaxed);
            }
            Ok(Err(error)) => registry.reports.error("uploads that nobody goes on with", &error),
            Err(_) => {}
        }
        if collection.every.is_some_and(|every| since >= every) {
            since = Duration::ZERO;
            if let Err(error) = collect(&registry, &collection).await {
                registry.reports.error("garbage collection", &error);
            }
        }
    }
}

/// Lets go of what was pushed and has lost its name.
async fn follow_names(registry: &Registry, pushing: &Arc<Pushing>) {
    let pushing = pushing.clone();
    match tokio::task::spawn_blocking(move || pushing.follow_names()).await {
        Ok(Err(Trouble::Directory(error))) => registry.reports.error("what was pushed", &error),
        Ok(Err(Trouble::Images(error))) => registry.reports.error("names of images", &error),
        _ => {}
    }
}

async fn collect(registry: &Registry, policy: &Collection) -> Result<Collected, DirectoryError> {
    let directory = match &registry.held {
        Held::Directory(directory) => directory,
        Held::Pushed(pushing) if !registry.read_only => {
            follow_names(registry, pushing).await;
            &pushing.directory
        }
        Held::Pushed(_) | Held::Images(_) => return Ok(Collected::default()),
    };
    let (directory, policy) = (directory.clone(), policy.clone());
    let done = tokio::task::spawn_blocking(move || directory.collect(&policy, false, &mut |_| {})).await;
    let collected = done.unwrap_or(Ok(Collected::default()))?;
    if collected.damaged > 0 {
        registry.reports.say(format!(
            "repositories that garbage collection took nothing from, for a manifest or a tag of theirs is damaged: {}",
            collected.damaged
        ));
    }
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
