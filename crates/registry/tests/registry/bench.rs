//! A client, and a clock that does not wait.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use kiln_oci::Reference;
use kiln_registry::{Client, Clock, Credential, CredentialSource, NoCredentials, Repository, Settings};

use crate::server::{Server, Time};

/// So long a server that stands still looks for somebody who waits for it.
const LOOK: Duration = Duration::from_millis(20);

/// Pauses end at once and are noted down. Patience ends when the server says so for which somebody waits.
#[derive(Default)]
pub(crate) struct Pauses {
    times: Mutex<Times>,
    waits: Condvar,
    pub(crate) taken: Mutex<Vec<Duration>>,
}

#[derive(Default)]
struct Times {
    now: Duration,
    /// So many have waited so far.
    number: u64,
    /// So many had when a slow server took its last step.
    stepped: u64,
    waiting: BTreeMap<u64, Waiting>,
}

/// Somebody who waits for the network.
struct Waiting {
    until: Duration,
    /// `None`: not yet.
    waker: Option<Waker>,
}

impl Clock for Pauses {
    fn now(&self) -> Duration {
        self.times.lock().unwrap().now
    }

    fn unix(&self) -> i64 {
        1_000_000_000 + self.now().as_secs() as i64
    }

    fn pause(&self, how_long: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut times = self.times.lock().unwrap();
        times.now += how_long;
        // Nobody loses his patience over the pause of somebody else.
        times.waiting.values_mut().for_each(|waiting| waiting.until += how_long);
        self.taken.lock().unwrap().push(how_long);
        Box::pin(std::future::ready(()))
    }

    fn patience(&self, how_long: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut times = self.times.lock().unwrap();
        times.number += 1;
        let (number, until) = (times.number, times.now.saturating_add(how_long));
        times.waiting.insert(number, Waiting { until, waker: None });
        Box::pin(Patience { clock: self, number })
    }

    fn chance(&self) -> f64 {
        0.5
    }
}

struct Patience<'c> {
    clock: &'c Pauses,
    number: u64,
}

impl Future for Patience<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut times = self.clock.times.lock().unwrap();
        let now = times.now;
        let waiting = times.waiting.get_mut(&self.number).unwrap();
        if waiting.until <= now {
            return Poll::Ready(());
        }
        waiting.waker = Some(context.waker().clone());
        self.clock.waits.notify_all();
        Poll::Pending
    }
}

impl Drop for Patience<'_> {
    fn drop(&mut self) {
        self.clock.times.lock().unwrap().waiting.remove(&self.number);
    }
}

impl Times {
    /// When the first patience ends that has not; `None`: nobody waits, or somebody has still to do something about
    /// the end of his.
    fn next(&self) -> Option<Duration> {
        if self.waiting.values().any(|waiting| waiting.until <= self.now) {
            return None;
        }
        let waiting = self.waiting.values().filter(|waiting| waiting.waker.is_some());
        waiting.map(|waiting| waiting.until).min()
    }
}

impl Time for Pauses {
    fn pass(&self, how_long: Option<Duration>) -> bool {
        let is_step = how_long.is_some();
        let times = self.times.lock().unwrap();
        // Whoever took the last step's byte waits anew: so a slow server does not run ahead of its client.
        let too_soon =
            |times: &mut Times| times.next().is_none() || (is_step && times.number == times.stepped);
        let (mut times, _) = self.waits.wait_timeout_while(times, LOOK, too_soon).unwrap();
        let Some(next) = times.next() else { return false };
        if is_step {
            times.stepped = times.number;
        }
        times.now = how_long.map_or(next, |how_long| times.now + how_long);
        let now = times.now;
        let ended = times.waiting.values_mut().filter(|waiting| waiting.until <= now);
        ended.filter_map(|waiting| waiting.waker.take()).for_each(Waker::wake);
        true
    }
}

/// A client of a server and how long it paused.
pub(crate) struct Bench {
    pub(crate) client: Client,
    pub(crate) pauses: Arc<Pauses>,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(Settings::default(), Arc::new(NoCredentials))
    }

    /// With these settings, but for the directories of this machine.
    pub(crate) fn with(settings: Settings, credentials: Arc<dyn CredentialSource>) -> Self {
        let pauses = Arc::new(Pauses::default());
        let settings = Settings { cert_dirs: Vec::new(), ..settings };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { client: Client::with_clock(settings, credentials, pauses.clone()), pauses, runtime }
    }

    pub(crate) fn with_password() -> Self {
        Self::with(Settings::default(), Arc::new(password()))
    }

    /// Tries everything twice.
    pub(crate) fn impatient() -> Self {
        Self::with(Settings { tries: 2, ..Settings::default() }, Arc::new(NoCredentials))
    }

    /// The repository of a server, on which time passes as on the client's clock.
    pub(crate) fn repository(&self, server: &Server) -> Repository {
        server.keep_time(self.pauses.clone());
        let name = format!("{}/team/app", server.domain());
        self.client.repository(&name.parse::<Reference>().unwrap())
    }

    pub(crate) fn run<T>(&self, future: impl Future<Output = T> + Send) -> T {
        self.runtime.block_on(future)
    }

    pub(crate) fn pauses_ms(&self) -> Vec<u128> {
        self.pauses.taken.lock().unwrap().iter().map(Duration::as_millis).collect()
    }
}

pub(crate) fn password() -> Credential {
    Credential::Password { user: "user".to_owned(), password: "canary-password".to_owned() }
}

/// The error and its causes.
pub(crate) fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
