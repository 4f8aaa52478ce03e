//! A client, and a clock that does not wait.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_oci::Reference;
use kiln_registry::{Client, Clock, Credential, CredentialSource, NoCredentials, Repository, Settings};

use crate::server::Server;

/// Pauses end at once and are noted down.
#[derive(Default)]
pub(crate) struct Pauses {
    now: Mutex<Duration>,
    pub(crate) taken: Mutex<Vec<Duration>>,
}

impl Clock for Pauses {
    fn now(&self) -> Duration {
        *self.now.lock().unwrap()
    }

    fn unix(&self) -> i64 {
        1_000_000_000 + self.now().as_secs() as i64
    }

    fn pause(&self, how_long: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        *self.now.lock().unwrap() += how_long;
        self.taken.lock().unwrap().push(how_long);
        Box::pin(std::future::ready(()))
    }

    fn chance(&self) -> f64 {
        0.5
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

    /// Gives up soon on what stands still.
    pub(crate) fn impatient() -> Self {
        let stall = Duration::from_millis(300);
        Self::with(Settings { stall, tries: 2, ..Settings::default() }, Arc::new(NoCredentials))
    }

    pub(crate) fn repository(&self, server: &Server) -> Repository {
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
