//! What a registry counts, as Prometheus reads it (text format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper ends of the buckets that answers are counted in by how long they took, as text and in milliseconds.
const BUCKETS: [(&str, u64); 9] = [
    ("0.005", 5),
    ("0.025", 25),
    ("0.1", 100),
    ("0.5", 500),
    ("1", 1_000),
    ("2.5", 2_500),
    ("10", 10_000),
    ("30", 30_000),
    ("120", 120_000),
];

/// How long answers took until their head was ready.
#[derive(Default)]
struct Took {
    /// Each beyond the bucket before it, and up to its own end; the last: beyond all.
    counts: [u64; BUCKETS.len() + 1],
    sum: Duration,
}

impl Took {
    fn add(&mut self, took: Duration) {
        let bucket = BUCKETS.iter().position(|(_, end)| took <= Duration::from_millis(*end));
        self.counts[bucket.unwrap_or(BUCKETS.len())] += 1;
        self.sum += took;
    }

    /// Its lines: a bucket counts what is in those before it, too.
    fn write(&self, text: &mut String, name: &str, kind: &str) {
        let mut count = 0;
        let ends = BUCKETS.iter().map(|(end, _)| *end).chain(["+Inf"]);
        for (end, more) in ends.zip(self.counts) {
            count += more;
            let _ = writeln!(text, "{name}_bucket{{route=\"{kind}\",le=\"{end}\"}} {count}");
        }
        let _ = writeln!(text, "{name}_sum{{route=\"{kind}\"}} {}", self.sum.as_secs_f64());
        let _ = writeln!(text, "{name}_count{{route=\"{kind}\"}} {count}");
    }
}

/// Counters since the start.
#[derive(Default)]
pub(crate) struct Metrics {
    /// By method, kind of route and status: words of ours, so that no client makes it long.
    requests: Mutex<BTreeMap<(&'static str, &'static str, u16), u64>>,
    /// By kind of route.
    took: Mutex<BTreeMap<&'static str, Took>>,
    received: AtomicU64,
    sent: AtomicU64,
    stalled: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) refused_accounts: AtomicU64,
    pub(crate) mirrored: AtomicU64,
    pub(crate) made_ready: AtomicU64,
    pub(crate) expired_uploads: AtomicU64,
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

    pub(crate) fn answered(&self, method: &hyper::Method, kind: &'static str, status: u16, took: Duration) {
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
        drop(requests);
        self.took.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default().add(took);
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
        let name = "kiln_registry_request_duration_seconds";
        let _ = writeln!(text, "# HELP {name} Time from a request's head to that of its answer.");
        let _ = writeln!(text, "# TYPE {name} histogram");
        for (kind, took) in &*self.took.lock().unwrap_or_else(PoisonError::into_inner) {
            took.write(&mut text, name, kind);
        }
        let counters = [
            ("received_bytes_total", "Bytes that came, TLS left out.", read(&self.received)),
            ("sent_bytes_total", "Bytes that went, TLS left out.", read(&self.sent)),
            ("stalled_connections_total", "Connections ended because nobody read.", read(&self.stalled)),
            ("refused_logins_total", "Requests with a wrong password.", read(&self.refused_accounts)),
            ("mirrored_total", "Manifests and blobs fetched from the registry behind.", read(&self.mirrored)),
            ("made_ready_total", "Images that were packed for a request.", read(&self.made_ready)),
            ("expired_uploads_total", "Uploads that nobody went on with.", read(&self.expired_uploads)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bucket_counts_what_is_in_those_before_it() {
        let metrics = Metrics::default();
        for (kind, milliseconds) in [("blob", 5), ("blob", 6), ("blob", 130_000), ("base", 0)] {
            metrics.answered(&hyper::Method::GET, kind, 200, Duration::from_millis(milliseconds));
        }
        let text = metrics.text(0);
        for line in [
            "# TYPE kiln_registry_request_duration_seconds histogram",
            "kiln_registry_request_duration_seconds_bucket{route=\"blob\",le=\"0.005\"} 1",
            "kiln_registry_request_duration_seconds_bucket{route=\"blob\",le=\"0.025\"} 2",
            "kiln_registry_request_duration_seconds_bucket{route=\"blob\",le=\"120\"} 2",
            "kiln_registry_request_duration_seconds_bucket{route=\"blob\",le=\"+Inf\"} 3",
            "kiln_registry_request_duration_seconds_sum{route=\"blob\"} 130.011",
            "kiln_registry_request_duration_seconds_count{route=\"blob\"} 3",
            "kiln_registry_request_duration_seconds_bucket{route=\"base\",le=\"0.005\"} 1",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}: {text}");
        }
    }

    #[test]
    fn no_client_makes_the_text_long() {
        let metrics = Metrics::default();
        for number in 0..1000 {
            let method = hyper::Method::from_bytes(format!("M{number}").as_bytes()).unwrap();
            metrics.answered(&method, "none", 405, Duration::ZERO);
        }
        let line = "kiln_registry_requests_total{method=\"other\",route=\"none\",status=\"405\"} 1000";
        let text = metrics.text(0);
        assert!(text.lines().any(|known| known == line) && text.lines().count() < 80, "{text}");
    }
}
