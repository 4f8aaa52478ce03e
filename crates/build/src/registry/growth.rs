//! A blob of the store that is sent while it is packed.
//!
//! The packer writes the blob's file and says how far it is; whoever sends reads the same file behind it. So
//! the packer never waits for the network, and nothing waits in memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_oci::image::Descriptor;
use kiln_registry::{BlobSource, Error, Growing, Grown};
use tokio::sync::watch;

/// How far a blob is.
#[derive(Debug, Default)]
struct Far {
    bytes: u64,
    /// What it has become.
    whole: Option<Descriptor>,
}

/// The packer's side. Dropped before [`Growth::end`], it says that there will be no blob.
pub(crate) struct Growth {
    far: watch::Sender<Far>,
    /// Packing ends with the first of them.
    refused: Option<Trouble>,
}

/// The sender's side.
pub(super) struct Packed {
    file: Arc<File>,
    state: State,
}

/// Whether it makes sense to go on.
#[derive(Clone)]
struct State {
    far: watch::Receiver<Far>,
    given_up: Arc<AtomicBool>,
}

/// The first error of whatever is on its way to a registry.
#[derive(Clone, Default)]
pub(super) struct Trouble(Arc<Mutex<Option<Error>>>);

impl Trouble {
    pub(super) fn note(&self, error: Error) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    pub(super) fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_there(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// Both sides of what grows in `file`. `given_up`: whoever sends it shall end. `refused`: whoever packs it shall,
/// when there is an error; `None`: not for that.
pub(super) fn growth(file: File, given_up: Arc<AtomicBool>, refused: Option<Trouble>) -> (Growth, Packed) {
    let (sender, far) = watch::channel(Far::default());
    (Growth { far: sender, refused }, Packed { file: Arc::new(file), state: State { far, given_up } })
}

impl Growth {
    /// So many more bytes are in the file.
    ///
    /// # Errors
    /// When they are of no use any more.
    pub(crate) fn add(&self, bytes: usize) -> io::Result<()> {
        if self.refused.as_ref().is_some_and(Trouble::is_there) {
            return Err(io::Error::other("the registry does not take it"));
        }
        self.far.send_modify(|far| far.bytes += bytes as u64);
        Ok(())
    }

    /// That is all, and part of the store.
    pub(crate) fn end(self, blob: Descriptor) {
        self.far.send_modify(|far| far.whole = Some(blob));
    }
}

impl State {
    fn check(&self) -> io::Result<()> {
        // Without a packer there is either a blob, or there will be none.
        let has_failed = self.far.has_changed().is_err() && self.far.borrow().whole.is_none();
        if has_failed || self.given_up.load(Ordering::Relaxed) { Err(given_up()) } else { Ok(()) }
    }
}

fn given_up() -> io::Error {
    io::Error::other("it has been given up")
}

impl BlobSource for Packed {
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(Reader { file: self.file.clone(), at: offset, state: self.state.clone() }))
    }
}

impl Growing for Packed {
    fn grown(&self, wanted_bytes: u64) -> Pin<Box<dyn Future<Output = io::Result<Grown>> + Send + '_>> {
        Box::pin(async move {
            let mut far = self.state.far.clone();
            let reached = far.wait_for(|far| far.whole.is_some() || far.bytes >= wanted_bytes).await;
            let grown = match reached {
                Ok(far) => far.whole.clone().map_or(Grown::Part(far.bytes), Grown::Whole),
                Err(_) => return Err(given_up()),
            };
            self.state.check().map(|()| grown)
        })
    }
}

/// Reads what is there of a blob, as long as there will be one. Others read and write the file meanwhile.
struct Reader {
    file: Arc<File>,
    at: u64,
    state: State,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.state.check()?;
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use kiln_oci::Digest;

    use super::*;

    fn begin() -> (std::fs::File, Growth, Packed) {
        let file = tempfile::tempfile().unwrap();
        let (growth, packed) = growth(file.try_clone().unwrap(), Arc::default(), None);
        (file, growth, packed)
    }

    fn wait<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn read(packed: &Packed, offset: u64) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        packed.open(offset)?.read_to_end(&mut all).map(|_| all)
    }

    #[test]
    fn what_is_packed_is_read_behind_the_packer() {
        let (mut file, growth, packed) = begin();
        file.write_all(b"abc").unwrap();
        growth.add(3).unwrap();
        assert_eq!(wait(packed.grown(2)).unwrap(), Grown::Part(3));
        assert_eq!(read(&packed, 1).unwrap(), b"bc");
        let packer = std::thread::spawn(move || {
            file.write_all(b"def").unwrap();
            growth.add(3).unwrap();
            growth.end(Descriptor::new("x", Digest::of(b"abcdef"), 6));
        });
        // More than there will ever be: the end answers.
        let whole = wait(packed.grown(100)).unwrap();
        assert_eq!(whole, Grown::Whole(Descriptor::new("x", Digest::of(b"abcdef"), 6)));
        packer.join().unwrap();
        assert_eq!(read(&packed, 0).unwrap(), b"abcdef");
    }

    #[test]
    fn what_is_not_packed_to_its_end_is_no_blob() {
        let (mut file, growth, packed) = begin();
        file.write_all(b"abc").unwrap();
        growth.add(3).unwrap();
        drop(growth);
        assert!(wait(packed.grown(1)).is_err() && read(&packed, 0).is_err());
        // Whole, but not wanted.
        let (_file, growth, packed) = begin();
        growth.end(Descriptor::new("x", Digest::of(b""), 0));
        packed.state.given_up.store(true, Ordering::Relaxed);
        assert!(wait(packed.grown(1)).is_err() && read(&packed, 0).is_err());
    }

    #[test]
    fn a_packer_that_works_for_the_registry_alone_ends_with_its_refusal() {
        let trouble = Trouble::default();
        let new = |refused| growth(tempfile::tempfile().unwrap(), Arc::default(), refused).0;
        let (alone, also) = (new(Some(trouble.clone())), new(None));
        assert!(alone.add(1).is_ok());
        trouble.note(Error::Host { host: "first".to_owned() });
        trouble.note(Error::Host { host: "second".to_owned() });
        assert!(alone.add(1).is_err() && also.add(1).is_ok());
        assert!(trouble.take().unwrap().to_string().contains("first"));
    }
}
