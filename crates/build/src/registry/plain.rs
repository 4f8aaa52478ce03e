//! A layer that leaves as it is: its tar is written while it is sent, and kept nowhere.
//!
//! Its digest and size are known before, so that it is looked for and mounted like any other blob. Where a
//! connection breaks, the tar is written anew, and what has arrived of it is left out.

use std::io::{self, BufWriter, PipeReader, Read, Write};
use std::thread::{self, JoinHandle};

use kiln_content::LayerRecord;
use kiln_registry::BlobSource;

use crate::export::{WriteError, write_layer};
use crate::{BuildCancel, BuildError, Engine};

/// As much may wait between the one that writes and the one that sends.
const PIPE_BYTES: usize = 1 << 20;

/// The plain tar of a layer.
pub(super) struct Plain {
    pub(super) engine: Engine,
    pub(super) layer: LayerRecord,
    pub(super) cancel: BuildCancel,
}

impl BlobSource for Plain {
    /// Costs writing all that stands before `offset`, into nothing.
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        let (engine, layer, cancel) = (self.engine.clone(), self.layer.clone(), self.cancel.clone());
        let written = Written::by(self.layer.size_bytes, offset, move |out| {
            write_layer(&engine, &layer, out, cancel.flag())
        });
        Ok(Box::new(written?))
    }
}

/// What a thread writes. Its last bytes come when the thread has ended well, so that nobody takes for whole what
/// turned out to be wrong at its end.
struct Written {
    /// `None`: nothing more is read.
    pipe: Option<PipeReader>,
    left_bytes: u64,
    writer: Option<JoinHandle<Result<(), WriteError>>>,
}

impl Written {
    /// What `write` writes, which is so many bytes, from `offset` on. It fails when its reader is gone.
    fn by(
        size_bytes: u64,
        offset: u64,
        write: impl FnOnce(&mut dyn Write) -> Result<(), WriteError> + Send + 'static,
    ) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        // A user may have no more pipes of this size: then it goes in smaller steps.
        let _ = rustix::pipe::fcntl_setpipe_size(&writer, PIPE_BYTES);
        let thread = thread::Builder::new().name("layer-tar".to_owned());
        let writer = thread.spawn(move || {
            let mut out = BufWriter::with_capacity(256 << 10, Tail { inner: writer, skip_bytes: offset });
            let written = write(&mut out);
            written.and_then(|()| out.flush().map_err(WriteError::Out))
        })?;
        let left_bytes = size_bytes.saturating_sub(offset);
        Ok(Self { pipe: Some(reader), left_bytes, writer: Some(writer) })
    }

    /// Waits for the one that writes; whatever it still has to write is too much.
    fn end(&mut self) -> io::Result<()> {
        // Without a reader, it ends then.
        let is_more = self.pipe.take().is_some_and(|mut pipe| pipe.read_exact(&mut [0]).is_ok());
        let Some(writer) = self.writer.take() else { return Ok(()) };
        match writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
            Err(WriteError::Other(error)) => Err(io::Error::other(error)),
            _ if is_more => Err(io::Error::other("the layer has become larger")),
            Err(WriteError::Out(error)) => Err(error),
            Ok(()) if self.left_bytes > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(()) => Ok(()),
        }
    }
}

impl Read for Written {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(pipe) = &mut self.pipe else { return Ok(0) };
        let most = usize::try_from(self.left_bytes).unwrap_or(usize::MAX).min(buffer.len());
        let count = pipe.read(&mut buffer[..most])?;
        self.left_bytes -= count as u64;
        if self.left_bytes == 0 || (count == 0 && most > 0) {
            self.end()?;
        }
        Ok(count)
    }
}

/// Leaves out the first bytes.
struct Tail<W> {
    inner: W,
    skip_bytes: u64,
}

impl<W: Write> Write for Tail<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.skip_bytes == 0 {
            return self.inner.write(bytes);
        }
        let skipped = usize::try_from(self.skip_bytes).unwrap_or(usize::MAX).min(bytes.len());
        self.skip_bytes -= skipped as u64;
        Ok(skipped)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The error of a layer that turned out to be another one while it was sent, if this is one.
pub(super) fn cause(error: kiln_registry::Error) -> BuildError {
    match error {
        kiln_registry::Error::Local { what, source } => match source.downcast::<BuildError>() {
            Ok(error) => error,
            Err(source) => kiln_registry::Error::Local { what, source }.into(),
        },
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn content() -> Vec<u8> {
        (0..3_000_000_u32).map(|n| (n ^ (n >> 9)) as u8).collect()
    }

    fn read(mut written: Written) -> (io::Result<usize>, Vec<u8>) {
        let mut all = Vec::new();
        (written.read_to_end(&mut all), all)
    }

    fn bug() -> WriteError {
        WriteError::Other(BuildError::Bug { what: "another layer".to_owned() })
    }

    #[test]
    fn it_is_read_from_any_byte_on() {
        let all = content();
        for offset in [0, 1, 999_999, all.len() - 1, all.len()] {
            let bytes = all.clone();
            let write = move |out: &mut dyn Write| out.write_all(&bytes).map_err(WriteError::Out);
            let (end, came) = read(Written::by(all.len() as u64, offset as u64, write).unwrap());
            assert_eq!(end.unwrap(), all.len() - offset);
            assert!(came == all[offset..]);
        }
    }

    #[test]
    fn what_is_wrong_at_its_end_never_becomes_whole() {
        let wrong = move |out: &mut dyn Write| {
            out.write_all(&content()).map_err(WriteError::Out)?;
            Err(bug())
        };
        let (end, came) = read(Written::by(content().len() as u64, 0, wrong).unwrap());
        assert!(end.unwrap_err().to_string().contains("another layer"));
        assert!(came.len() < content().len());
        for (promised, said) in [(content().len() + 1, "unexpected end"), (content().len() - 1, "larger")] {
            let write = |out: &mut dyn Write| out.write_all(&content()).map_err(WriteError::Out);
            let (end, came) = read(Written::by(promised as u64, 0, write).unwrap());
            assert!(end.unwrap_err().to_string().contains(said), "{said}");
            assert!(came.len() < promised);
        }
    }

    #[test]
    fn nobody_writes_what_nobody_reads() {
        let (sender, ended) = mpsc::channel();
        let write = move |out: &mut dyn Write| {
            let wrote = std::iter::repeat_n(content(), 100).try_for_each(|bytes| out.write_all(&bytes));
            sender.send(wrote.is_err()).unwrap();
            wrote.map_err(WriteError::Out)
        };
        let mut written = Written::by(u64::MAX, 0, write).unwrap();
        written.read_exact(&mut [0; 1000]).unwrap();
        drop(written);
        assert!(ended.recv().unwrap(), "it has written all of it");
    }

    #[test]
    fn what_is_wrong_with_a_layer_is_told_as_such() {
        let local = |source| kiln_registry::Error::Local { what: "reading a blob", source };
        assert!(matches!(cause(local(io::Error::other(BuildError::Cancelled))), BuildError::Cancelled));
        assert!(matches!(cause(local(io::Error::other("x"))), BuildError::Registry(_)));
    }
}
