//! Hosts that have failed again and again are left alone for a while.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Client, Error, Fault, Repository};

/// So many requests in a row, each with all its tries, and a registry is not asked any more.
const REGISTRY_FAILURES: u32 = 3;
/// So long.
const REST: Duration = Duration::from_secs(30);
/// So many different notes are kept.
const MAX_NOTES: usize = 32;

/// What is known of the health of hosts.
#[derive(Default)]
pub(crate) struct Breakers {
    hosts: Mutex<HashMap<String, Breaker>>,
    notes: Mutex<BTreeSet<String>>,
}

#[derive(Default)]
struct Breaker {
    /// Requests that were given up, without one between them that was not.
    failures: u32,
    /// As the client's clock has it. Past it, one more request tells.
    open_until: Option<Duration>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Breakers {
    /// Remembers something that deserves a look and is no error.
    pub(crate) fn note(&self, text: String) {
        let mut notes = lock(&self.notes);
        if notes.len() < MAX_NOTES {
            notes.insert(text);
        }
    }
}

impl Client {
    /// What deserved a look since this was asked last, such as mirrors that were passed over.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.inner.breakers.notes)).into_iter().collect()
    }

    /// A request to `host` has got an answer.
    pub(crate) fn is_well(&self, host: &str) {
        lock(&self.inner.breakers.hosts).remove(host);
    }

    /// A request to `host` was given up after all its tries. `at_once`: one is enough.
    pub(crate) fn is_ill(&self, host: &str, at_once: bool) {
        let mut hosts = lock(&self.inner.breakers.hosts);
        let breaker = hosts.entry(host.to_owned()).or_default();
        breaker.failures = breaker.failures.saturating_add(1);
        if at_once || breaker.failures >= REGISTRY_FAILURES {
            breaker.open_until = Some(self.inner.clock.now() + REST);
        }
    }
}

impl Repository {
    /// Whether its host may be asked.
    ///
    /// # Errors
    /// [`Error::Tripped`] when it has failed too often, a moment ago.
    pub(crate) fn check_breaker(&self) -> Result<(), Error> {
        let hosts = lock(&self.client.inner.breakers.hosts);
        let Some(breaker) = hosts.get(&self.domain) else { return Ok(()) };
        let wait = breaker.open_until.map(|until| until.saturating_sub(self.client.inner.clock.now()));
        match wait {
            Some(wait) if !wait.is_zero() => {
                let (host, failures) = (self.domain.clone(), breaker.failures);
                Err(Error::Tripped { host, failures, wait })
            }
            _ => Ok(()),
        }
    }

    /// Notes down how a request to its host has ended.
    pub(crate) fn heard<T>(&self, outcome: Result<T, Error>) -> Result<T, Error> {
        match &outcome {
            Err(error) if error.is_host_ill() => self.client.is_ill(&self.domain, self.is_mirror),
            Err(error) if error.fault() == Fault::Configuration || error.fault() == Fault::Store => {}
            _ => self.client.is_well(&self.domain),
        }
        outcome
    }

    /// Leaves a mirror alone that gave something else than was promised: it would again.
    pub(crate) fn believed<T>(&self, outcome: Result<T, Error>) -> Result<T, Error> {
        if self.is_mirror && outcome.as_ref().is_err_and(|error| error.fault() == Fault::Integrity) {
            self.client.is_ill(&self.domain, true);
        }
        outcome
    }
}
