//! How patient a client is, and whom it trusts.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::Mirror;

/// How a client behaves. The defaults are for people who wait at a terminal.
#[derive(Debug, Clone)]
pub struct Settings {
    /// To a connection, TLS included.
    pub connect: Duration,
    /// To the first byte of an answer, and the time in which [`Settings::stall_bytes`] have to come.
    pub stall: Duration,
    /// A transfer slower than this many bytes in [`Settings::stall`] is given up and tried again.
    pub stall_bytes: u64,
    /// One manifest, token or list, tries and pauses included.
    pub document_deadline: Duration,
    /// One blob, tries and pauses included.
    pub blob_deadline: Duration,
    /// So often something is tried that brings nothing.
    pub tries: u32,
    /// Before the second try; doubled before each further one, and shortened by chance to between half
    /// and all of it.
    pub first_pause: Duration,
    /// No pause is longer, and a registry that asks for a longer one is given up.
    pub longest_pause: Duration,
    /// Blobs are sent in pieces of so many bytes; `None`: in one.
    pub chunk_bytes: Option<u64>,
    /// Where several connections bring a blob, each brings pieces of so many bytes. A blob that has less than
    /// two of them to come is left to one.
    pub piece_bytes: u64,
    /// A connection that brings so many bytes per second is left alone: several would share the same link.
    pub fast_bytes: u64,
    /// Registries, as `host[:port]`, that may speak plain http, and whose certificates are not checked.
    /// Loopback may speak plain http without being named.
    pub insecure: BTreeSet<String>,
    /// Hosts that may get credentials as a registry's token server, beside those that
    /// go with the registry by their name.
    pub token_hosts: BTreeSet<String>,
    /// Where images of a registry are read before the registry itself is asked, in this order; by the
    /// registry's name in references.
    pub mirrors: BTreeMap<String, Vec<Mirror>>,
    /// Files with certificates in PEM form that are trusted beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Directories with a directory for each `host[:port]`, in which there are certificates to trust
    /// (`*.crt`) and to show (`NAME.cert` with `NAME.key`), as docker has them.
    pub cert_dirs: Vec<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            stall_bytes: 30 << 10,
            document_deadline: Duration::from_secs(180),
            blob_deadline: Duration::from_secs(6 * 3600),
            tries: 5,
            first_pause: Duration::from_millis(400),
            longest_pause: Duration::from_secs(60),
            chunk_bytes: None,
            piece_bytes: 16 << 20,
            fast_bytes: 200_000_000,
            insecure: BTreeSet::new(),
            token_hosts: BTreeSet::new(),
            mirrors: BTreeMap::new(),
            ca_files: Vec::new(),
            cert_dirs: vec!["/etc/docker/certs.d".into(), "/etc/containers/certs.d".into()],
        }
    }
}

impl Settings {
    /// Whether `host[:port]` may speak plain http and show any certificate.
    pub(crate) fn is_insecure(&self, domain: &str) -> bool {
        let mut mirrors = self.mirrors.values().flatten();
        self.insecure.contains(domain) || mirrors.any(|mirror| mirror.insecure && mirror.host == domain)
    }
}

/// Time and chance, which a test replaces. All ask it that end by themselves: pauses, deadlines, and waits for a
/// network on which nothing moves.
pub trait Clock: Send + Sync {
    /// Since a moment that stays the same.
    fn now(&self) -> Duration;

    /// Seconds since 1970.
    fn unix(&self) -> i64;

    /// Ends after so long: nobody has anything to do until then.
    fn pause(&self, how_long: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// Ends after so long, while somebody waits for the network: the end of its patience.
    fn patience(&self, how_long: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// A number from 0 up to 1, another one each time.
    fn chance(&self) -> f64;
}

/// What `work` comes to, if it does within `limit`; `None`: it has not. Costs nothing where it need not wait.
pub(crate) async fn within<T>(
    clock: &dyn Clock,
    limit: Duration,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = pin!(work);
    let mut end = None;
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => {
            let end = end.get_or_insert_with(|| clock.patience(limit));
            end.as_mut().poll(context).map(|()| None)
        }
    })
    .await
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
    random: RandomState,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { start: Instant::now(), random: RandomState::new() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn unix(&self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    }

    fn pause(&self, how_long: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(how_long))
    }

    fn patience(&self, how_long: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(tokio::time::sleep(how_long))
    }

    fn chance(&self) -> f64 {
        let bits = self.random.hash_one(self.start.elapsed().as_nanos()) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }
}
