//! A connection that does not wait for ever for who does not read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::metrics::Metrics;
use crate::settings::Limits;

/// Fails with [`io::ErrorKind::TimedOut`] when a write has waited for so long and fewer than
/// [`Limits::stall_bytes`] were taken meanwhile. Whoever is slow to send is looked after where bodies and heads are read.
pub(crate) struct Patient<T> {
    inner: T,
    limits: Limits,
    metrics: Arc<Metrics>,
    /// Since when a write waits, and what was taken since.
    waiting: Option<(Pin<Box<Sleep>>, u64)>,
}

impl<T> Patient<T> {
    pub(crate) fn new(inner: T, limits: Limits, metrics: Arc<Metrics>) -> Self {
        Self { inner, limits, metrics, waiting: None }
    }

    fn judge<R>(
        &mut self,
        cx: &mut Context<'_>,
        wrote: Poll<io::Result<R>>,
        count: u64,
    ) -> Poll<io::Result<R>> {
        if wrote.is_ready() {
            self.metrics.sent(count);
            // One that takes a little each time is no better than one that takes nothing.
            if let Some((_, taken)) = &mut self.waiting {
                *taken += count;
                if *taken >= self.limits.stall_bytes {
                    self.waiting = None;
                }
            }
            return wrote;
        }
        let stall = self.limits.stall;
        let (sleep, _) = self.waiting.get_or_insert_with(|| (Box::pin(tokio::time::sleep(stall)), 0));
        match sleep.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                self.metrics.stalled();
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }

    /// Nothing is waited for any more.
    fn rest(&mut self) {
        if let Some((sleep, _)) = &self.waiting
            && sleep.deadline() > Instant::now()
        {
            self.waiting = None;
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Patient<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.metrics.received((buf.filled().len() - before) as u64);
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Patient<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.inner).poll_write(cx, buf);
        let count = if let Poll::Ready(Ok(count)) = &wrote { *count as u64 } else { 0 };
        self.judge(cx, wrote, count)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        let count = if let Poll::Ready(Ok(count)) = &wrote { *count as u64 } else { 0 };
        self.judge(cx, wrote, count)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        if flushed.is_ready() {
            self.rest();
        }
        // TLS has bytes left then that the other side does not take.
        self.judge(cx, flushed, 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.judge(cx, shut, 0)
    }
}
