//! Bodies of requests: read with a limit, and not waited for longer than they are worth.

use bytes::Bytes;
use http_body::Body as _;
use hyper::body::Incoming;
use std::pin::Pin;
use tokio::time::Instant;

use crate::refusal::Refusal;
use crate::settings::Limits;

/// A request's body on its way here.
pub(crate) struct Arriving {
    body: Incoming,
    limits: Limits,
    /// The time in which [`Limits::stall_bytes`] have to come, and how many came of them.
    window: (Instant, u64),
}

impl Arriving {
    pub(crate) fn new(body: Incoming, limits: Limits) -> Self {
        Self { body, limits, window: (Instant::now(), 0) }
    }

    /// The length that the head announced.
    pub(crate) fn announced(&self) -> Option<u64> {
        self.body.size_hint().exact()
    }

    /// What came next; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Refusal> {
        loop {
            let until = self.window.0 + self.limits.stall;
            let frame = std::future::poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx));
            let Ok(frame) = tokio::time::timeout_at(until, frame).await else {
                return Err(Refusal::new(408, "BLOB_UPLOAD_INVALID", "the body came too slowly"));
            };
            let Some(frame) = frame else { return Ok(None) };
            let broken = |_| Refusal::new(400, "SIZE_INVALID", "the body broke off");
            let Ok(piece) = frame.map_err(broken)?.into_data() else { continue };
            self.window.1 += piece.len() as u64;
            if self.window.1 >= self.limits.stall_bytes {
                self.window = (Instant::now(), 0);
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }

    /// All of it.
    pub(crate) async fn whole(&mut self, limit: u64, what: &'static str) -> Result<Vec<u8>, Refusal> {
        let too_large = || Refusal::new(413, "SIZE_INVALID", format!("{what} have at most {limit} bytes"));
        if self.announced().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        while let Some(piece) = self.next().await? {
            if bytes.len() as u64 + piece.len() as u64 > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}
