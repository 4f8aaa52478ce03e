//! Tars of which most is read by another thread.

use std::io::{Cursor, Error};

use super::*;

/// Sets a flag when it is read.
struct Sets<'a>(&'a AtomicBool);

impl Read for Sets<'_> {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        self.0.store(true, Ordering::Relaxed);
        Ok(0)
    }
}

/// Fails when it is read.
struct Fails;

impl Read for Fails {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(Error::other("the disk is gone"))
    }
}

fn large(name: &[u8]) -> Vec<u8> {
    let content: Vec<u8> = (0..3 << 20).map(|at: u32| (at ^ (at >> 11)) as u8).collect();
    raw(name, b'0', b"", &content)
}

fn unpack_both(
    tar: impl Fn() -> Box<dyn Read + Send>,
    cancel: &AtomicBool,
) -> [(TempDir, Result<Applied, ApplyError>); 2] {
    [Reading::InPlace, Reading::Ahead].map(|reading| {
        cancel.store(false, Ordering::Relaxed);
        let root = tempfile::tempdir().unwrap();
        let options = ApplyOptions {
            whiteouts: Whiteouts::Overlay,
            keep_owner: true,
            limits: Limits::default(),
            reading,
            cancel,
        };
        let applied = apply(tar(), File::open(root.path()).unwrap().as_fd(), &options);
        (root, applied)
    })
}

#[test]
fn who_reads_makes_no_difference() {
    let cancel = AtomicBool::new(false);
    let tar = archive(&[large(b"one"), raw(b"small", b'0', b"", b"small"), large(b"two")]);
    let [first, second] = unpack_both(|| Box::new(Cursor::new(tar.clone())), &cancel);
    let applied = first.1.unwrap();
    assert_eq!(applied.diff_id, DiffId(Digest::of(&tar)));
    assert_eq!(applied, second.1.unwrap());
    for name in ["one", "small", "two"] {
        let content = |root: &TempDir| fs::read(root.path().join(name)).unwrap();
        assert!(content(&first.0) == content(&second.0), "{name}");
    }
}

#[test]
fn errors_are_those_of_their_place() {
    let cancel = AtomicBool::new(false);
    let hostile = archive(&[large(b"one"), raw(b"../out", b'0', b"", b"x"), large(b"two")]);
    for (_, applied) in unpack_both(|| Box::new(Cursor::new(hostile.clone()).chain(Fails)), &cancel) {
        assert!(matches!(applied, Err(ApplyError::Refused { refusal: Refusal::Escapes, .. })), "{applied:?}");
    }
    let begun = large(b"one");
    for (root, applied) in unpack_both(|| Box::new(Cursor::new(begun.clone()).chain(Fails)), &cancel) {
        assert!(matches!(&applied, Err(ApplyError::Input(error)) if error.to_string().contains("disk")));
        // All that came before the error is there.
        assert_eq!(fs::metadata(root.path().join("one")).unwrap().len(), 3 << 20);
    }
    for (_, applied) in unpack_both(|| Box::new(Cursor::new(begun.clone())), &cancel) {
        assert!(applied.is_ok(), "a tar may end without its zero blocks: {applied:?}");
    }
}

#[test]
fn somebody_may_stop_it() {
    static CANCEL: AtomicBool = AtomicBool::new(false);
    let (one, two) = (large(b"one"), archive(&[large(b"two"), large(b"three")]));
    let tar = || -> Box<dyn Read + Send> {
        Box::new(Cursor::new(one.clone()).chain(Sets(&CANCEL)).chain(Cursor::new(two.clone())))
    };
    for (_, applied) in unpack_both(tar, &CANCEL) {
        assert!(matches!(applied, Err(ApplyError::Cancelled)), "{applied:?}");
    }
}
