//! What a registry counts, as Prometheus reads it (text format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Counters since the start.
#[derive(Default)]
pub(crate) struct Metrics {
    /// By method, kind of route and status: words of ours, so that no client makes it long.
    requests: Mutex<BTreeMap<(&'static str, &'static str, u16), u64>>,
    received: AtomicU64,
    sent: AtomicU64,
    stalled: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) refused_accounts: AtomicU64,
    pub(crate) mirrored: AtomicU64,
    pub(crate) collections: AtomicU64,
    pub(crate) collected_blobs: AtomicU64,
    pub(crate) collected_bytes: AtomicU64,
}

impl Metrics {
    pub(crate) fn received(&self, count: u64) {
        self.received.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn sent(&self, count: u64) {
        self.sent.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn stalled(&self) {
        self.stalled.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn answered(&self, method: &hyper::Method, kind: &'static str, status: u16) {
        let method = match method.as_str() {
            "GET" => "GET",
            "HEAD" => "HEAD",
            "POST" => "POST",
            "PUT" => "PUT",
            "PATCH" => "PATCH",
            "DELETE" => "DELETE",
            _ => "other",
        };
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((method, kind, status)).or_default() += 1;
    }

    /// The text, with what is under way now.
    pub(crate) fn text(&self, uploads: usize) -> String {
        let mut text = String::new();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        text.push_str("# HELP kiln_registry_requests_total Requests that were answered.\n");
        text.push_str("# TYPE kiln_registry_requests_total counter\n");
        for ((method, kind, status), count) in &*self.requests.lock().unwrap_or_else(PoisonError::into_inner)
        {
            let _ = writeln!(
                text,
                "kiln_registry_requests_total{{method=\"{method}\",route=\"{kind}\",status=\"{status}\"}} {count}"
            );
        }
        let counters = [
            ("received_bytes_total", "Bytes that came, TLS left out.", read(&self.received)),
            ("sent_bytes_total", "Bytes that went, TLS left out.", read(&self.sent)),
            ("stalled_connections_total", "Connections ended because nobody read.", read(&self.stalled)),
            ("refused_logins_total", "Requests with a wrong password.", read(&self.refused_accounts)),
            ("mirrored_total", "Manifests and blobs fetched from the registry behind.", read(&self.mirrored)),
            ("collections_total", "Garbage collections that ended.", read(&self.collections)),
            ("collected_blobs_total", "Blobs that they removed.", read(&self.collected_blobs)),
            ("collected_bytes_total", "Bytes that they removed.", read(&self.collected_bytes)),
        ];
        for (name, help, value) in counters {
            let name = format!("kiln_registry_{name}");
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n");
        }
        let gauges = [
            ("connections", "Connections that are open.", read(&self.connections)),
            ("uploads", "Uploads that were begun and not ended.", uploads as u64),
        ];
        for (name, help, value) in gauges {
            let name = format!("kiln_registry_{name}");
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n");
        }
        text
    }
}
