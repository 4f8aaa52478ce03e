//! Needs root: files get owners.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use rustix::fs::{CWD, RenameFlags, XattrFlags, lsetxattr, renameat_with};
use tempfile::TempDir;

use super::*;
use crate::diff::{Followed, Follower, TreeForm, Written, diff};
use crate::index::{EntryKind, Timestamp};
use crate::{CopyRequest, Earlier, Identity, LookedAt, Part, ScanOptions, TopDir, copy, scan};

/// Between two states.
const INTERVAL_BYTES: u64 = 6000;
const DIRS: [&str; 6] = ["", "a", "a-b", "a/b", "a/b/c", "z"];
/// Files in each directory.
const FILES: usize = 6;

/// A tree to copy, all of whose times are the same.
struct Source(TempDir);

impl Source {
    fn new() -> Self {
        let source = Self(tempfile::tempdir().unwrap());
        for dir in DIRS {
            fs::create_dir_all(source.0.path().join(dir)).unwrap();
        }
        for nth in 0..DIRS.len() * FILES {
            fs::write(source.file(nth), vec![nth as u8; (nth % 4) * 700]).unwrap();
            set_time(&source.file(nth), 1);
        }
        symlink("a/b", source.0.path().join("a/link")).unwrap();
        source.set_dir_times();
        source
    }

    fn dir(&self, nth: usize) -> PathBuf {
        self.0.path().join(DIRS[nth % DIRS.len()])
    }

    fn file(&self, nth: usize) -> PathBuf {
        self.dir(nth / FILES).join(format!("f{}", nth % FILES))
    }

    fn set_dir_times(&self) {
        (0..DIRS.len()).map(|nth| self.dir(nth)).filter(|dir| dir.is_dir()).for_each(|dir| set_time(&dir, 1));
    }
}

fn set_time(path: &Path, secs: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
    File::open(path).unwrap().set_modified(time).unwrap();
}

/// What a copy of a source made.
struct Layer {
    dir: TempDir,
    made: Vec<[u8; 32]>,
    followed: Option<Followed>,
}

impl Layer {
    fn of(source: &Source, earlier: Option<&Layer>) -> Self {
        let states = earlier.and_then(|copy| copy.followed.as_ref()?.states.clone());
        Self::with_states(source, earlier, states)
    }

    fn with_states(source: &Source, earlier: Option<&Layer>, states: Option<HashStates>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(false);
        let (from, to) = (File::open(source.0.path()).unwrap(), File::open(dir.path()).unwrap());
        let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
        let looked_at = LookedAt::now();
        let entries = scan(from.as_fd(), b"", &options).unwrap();
        let known = |copy: &Layer| {
            let dir = File::open(copy.dir.path()).unwrap();
            Earlier::new(dir.into(), copy.made.iter().copied())
        };
        let earlier = earlier.map(known);
        let follower = Follower::start_with(to.try_clone().unwrap().into(), states, INTERVAL_BYTES).unwrap();
        let destination = Vec::new();
        let part = Part { entries: &entries, passed: None, strip: b"", destination, owner: None, mode: None };
        let identities = part.identities();
        copy(&CopyRequest {
            looked_at: Some(looked_at),
            earlier: earlier.as_ref(),
            identities: Some(&identities),
            follower: Some(&follower),
            top: TopDir::Contents,
            ..CopyRequest::tree(from.as_fd(), &entries, to.as_fd(), &cancel)
        })
        .unwrap();
        let made = identities.iter().filter_map(Identity::known).collect();
        Self { dir, made, followed: follower.complete().wait() }
    }

    /// What goes through the finished tree and begins at the beginning.
    fn whole(&self) -> Written {
        let cancel = AtomicBool::new(false);
        let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &cancel };
        diff(File::open(self.dir.path()).unwrap().as_fd(), std::io::sink(), &options).unwrap()
    }

    fn followed(&self) -> &Followed {
        self.followed.as_ref().unwrap()
    }

    /// All that the layer says of its members, told without tar or chain.
    fn members(&self) -> Vec<Entry> {
        let cancel = AtomicBool::new(false);
        let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
        let mut entries = scan(File::open(self.dir.path()).unwrap().as_fd(), b"", &options).unwrap();
        for entry in &mut entries {
            entry.ctime = Timestamp::default();
            if let EntryKind::File { inode, nlink, .. } = &mut entry.kind {
                (*inode, *nlink) = ((0, 0), 0);
            }
        }
        entries.split_off(1)
    }
}

/// Of the members that both layers begin with, how many stand in front of a state.
fn same_members(earlier: &Layer, now: &Layer) -> u64 {
    let (one, other) = (earlier.members(), now.members());
    let same = one.iter().zip(&other).take_while(|(one, other)| one == other).count() as u64;
    let states = earlier.followed().states.as_ref().unwrap();
    let reached = (0..).map_while(|nth| states.get(nth)).take_while(|state| state.entries <= same);
    reached.last().map_or(0, |state| state.entries)
}

/// Something that happens to a source between two copies. What cannot be done is not done.
#[derive(Debug, Clone)]
enum Edit {
    /// Other content of the same size, with the old time.
    Content(usize),
    Append(usize),
    /// Two files change places.
    Swap(usize, usize),
    Mode(usize, u32),
    Owner(usize, u32),
    Attribute(usize, u8),
    Touch(usize, u64),
    Rename(usize),
    Remove(usize),
    Add(usize),
    BecomeLink(usize),
    BecomeDir(usize),
    Relink(u8),
    HardLink(usize),
    DirMode(usize, u32),
    DirAttribute(usize, u8),
}

impl Edit {
    fn make(&self, source: &Source) -> Option<()> {
        let file = |nth: &usize| Some(source.file(*nth)).filter(|path| path.is_file());
        let attribute = |path: &Path, value: u8| lsetxattr(path, "user.a", &[value], XattrFlags::empty());
        match self {
            Self::Content(nth) => {
                let path = file(nth)?;
                let modified = fs::metadata(&path).ok()?.modified().ok()?;
                let open = OpenOptions::new().read(true).write(true).open(path).ok()?;
                let mut byte = [0];
                open.read_exact_at(&mut byte, 0).ok()?;
                open.write_all_at(&[byte[0] ^ 1], 0).ok()?;
                open.set_modified(modified).ok()
            }
            Self::Append(nth) => {
                let path = file(nth)?;
                fs::write(&path, [&fs::read(&path).ok()?[..], b"more"].concat()).ok()
            }
            Self::Swap(one, other) => {
                let (one, other) = (file(one)?, file(other)?);
                renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).ok()
            }
            Self::Mode(nth, mode) => fs::set_permissions(file(nth)?, fs::Permissions::from_mode(*mode)).ok(),
            Self::Owner(nth, uid) => chown(file(nth)?, Some(*uid), None).ok(),
            Self::Attribute(nth, value) => attribute(&file(nth)?, *value).ok(),
            Self::Touch(nth, secs) => {
                set_time(&file(nth)?, *secs);
                Some(())
            }
            Self::Rename(nth) => {
                let path = file(nth)?;
                fs::rename(&path, path.with_extension("renamed")).ok()
            }
            Self::Remove(nth) => fs::remove_file(file(nth)?).ok(),
            Self::Add(nth) => fs::write(source.dir(*nth).join(format!("f{nth}.new")), "new").ok(),
            Self::BecomeLink(nth) => {
                let path = file(nth)?;
                fs::remove_file(&path).ok()?;
                symlink("f0", path).ok()
            }
            Self::BecomeDir(nth) => {
                let path = file(nth)?;
                fs::remove_file(&path).ok()?;
                fs::create_dir(path).ok()
            }
            Self::Relink(to) => {
                let path = source.0.path().join("a/link");
                fs::remove_file(&path).ok()?;
                symlink(to.to_string(), path).ok()
            }
            Self::HardLink(nth) => fs::hard_link(file(nth)?, source.0.path().join("linked")).ok(),
            Self::DirMode(nth, mode) => {
                fs::set_permissions(source.dir(*nth), fs::Permissions::from_mode(*mode)).ok()
            }
            Self::DirAttribute(nth, value) => attribute(&source.dir(*nth), *value).ok(),
        }
    }
}

fn edit() -> impl Strategy<Value = Edit> {
    use Edit::*;
    // Behind others there is more to go on from.
    let file = || prop_oneof![0..DIRS.len() * FILES, DIRS.len() * FILES / 2..DIRS.len() * FILES];
    let mode = || prop_oneof![Just(0o600), Just(0o755), Just(0o4711)];
    prop_oneof![
        file().prop_map(Content),
        file().prop_map(Append),
        (file(), file()).prop_map(|(one, other)| Swap(one, other)),
        (file(), mode()).prop_map(|(nth, mode)| Mode(nth, mode)),
        (file(), 0..3_u32).prop_map(|(nth, uid)| Owner(nth, uid)),
        (file(), any::<u8>()).prop_map(|(nth, value)| Attribute(nth, value)),
        (file(), 0..3_u64).prop_map(|(nth, secs)| Touch(nth, secs)),
        file().prop_map(Rename),
        file().prop_map(Remove),
        (0..DIRS.len()).prop_map(Add),
        file().prop_map(BecomeLink),
        file().prop_map(BecomeDir),
        any::<u8>().prop_map(Relink),
        file().prop_map(HardLink),
        (0..DIRS.len(), mode()).prop_map(|(nth, mode)| DirMode(nth, mode)),
        (0..DIRS.len(), any::<u8>()).prop_map(|(nth, value)| DirAttribute(nth, value)),
    ]
}

/// Copies a source again and again, with edits in between: whatever they are, the layer is what it is when
/// it is hashed from its beginning, and what can be passed over is.
fn check(rounds: &[(Vec<Edit>, bool)]) {
    let source = Source::new();
    let mut earlier = Layer::of(&source, None);
    for (edits, keep_dir_times) in rounds {
        for edit in edits {
            edit.make(&source);
        }
        if !keep_dir_times {
            source.set_dir_times();
        }
        let now = Layer::of(&source, Some(&earlier));
        if let Some(followed) = &now.followed {
            assert_eq!(followed.written, now.whole(), "{edits:?}");
            let states = followed.states.as_ref().expect("a scan knows all content");
            assert_eq!(HashStates::from_bytes(&states.to_bytes()).as_ref(), Some(states));
            let has_states = earlier.followed.is_some();
            let expected = if has_states { same_members(&earlier, &now) } else { 0 };
            assert_eq!(followed.same_entries, expected, "{edits:?}");
        } else {
            assert!(rounds.iter().flat_map(|(edits, _)| edits).any(|edit| matches!(edit, Edit::HardLink(_))));
        }
        earlier = now;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_any_edits_the_diff_id_is_that_of_the_whole_tar(
        rounds in proptest::collection::vec(
            (proptest::collection::vec(edit(), 0..4), any::<bool>()),
            1..4,
        ),
    ) {
        check(&rounds);
    }
}

#[test]
fn each_edit_is_noticed_and_what_stands_in_front_of_it_is_not_read_again() {
    use Edit::*;
    // In `z`, behind all others.
    let at = 5 * FILES + 3;
    for edit in [
        Content(at),
        Append(at),
        Swap(at, at - 1),
        Mode(at, 0o4711),
        Owner(at, 2),
        Attribute(at, 1),
        Touch(at, 7),
        Rename(at),
        Remove(at),
        Add(5),
        BecomeLink(at),
        BecomeDir(at),
        DirMode(5, 0o700),
        DirAttribute(5, 1),
    ] {
        let source = Source::new();
        let earlier = Layer::of(&source, None);
        assert_eq!(earlier.followed().same_entries, 0);
        edit.make(&source).unwrap();
        let now = Layer::of(&source, Some(&earlier));
        let followed = now.followed();
        assert_eq!(followed.written, now.whole(), "{edit:?}");
        assert_ne!(followed.written.diff_id, earlier.followed().written.diff_id, "{edit:?}");
        assert_eq!(followed.same_entries, same_members(&earlier, &now), "{edit:?}");
        assert!(followed.same_entries > 25, "{edit:?}: {}", followed.same_entries);
    }
}

#[test]
fn a_copy_of_the_same_is_read_nowhere() {
    let source = Source::new();
    let earlier = Layer::of(&source, None);
    let now = Layer::of(&source, Some(&earlier));
    let followed = now.followed();
    assert_eq!(followed.same_entries, followed.written.entries);
    assert_eq!((followed.written, &followed.states), (now.whole(), &earlier.followed().states));
}

#[test]
fn a_tar_that_became_longer_or_shorter_at_its_end_goes_on_from_there() {
    let source = Source::new();
    let short = Layer::of(&source, None);
    fs::write(source.0.path().join("zz"), "more").unwrap();
    source.set_dir_times();
    let long = Layer::of(&source, Some(&short));
    assert_eq!(
        (long.followed().written, long.followed().same_entries),
        (long.whole(), short.whole().entries)
    );
    fs::remove_file(source.0.path().join("zz")).unwrap();
    source.set_dir_times();
    let again = Layer::of(&source, Some(&long));
    assert_eq!(
        (again.followed().written, again.followed().same_entries),
        (short.whole(), short.whole().entries)
    );
}

/// Whoever reads it sees what it has become.
fn rot(copy: &Layer, path: &str) {
    let path = copy.dir.path().join(path);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"rotten", 0).unwrap();
    file.set_modified(modified).unwrap();
}

#[test]
fn what_is_passed_over_is_not_even_opened_and_what_is_made_is_read() {
    let source = Source::new();
    let earlier = Layer::of(&source, None);
    let late = 5 * FILES + 3;
    Edit::Content(late).make(&source).unwrap();
    let right = Layer::of(&source, None).followed().written;
    // The file that both layers have.
    rot(&earlier, "a/f3");
    let now = Layer::of(&source, Some(&earlier));
    assert_eq!(now.followed().written, right);
    assert_ne!(now.whole(), right);
    // Where nothing was linked, everything is read, whatever the states say.
    let states = earlier.followed().states.clone();
    let made = Layer::with_states(&source, None, states);
    assert_eq!((made.followed().same_entries, made.followed().written), (0, right));
}

#[test]
fn states_of_another_tree_are_not_taken_for_those_of_this() {
    let (source, other) = (Source::new(), Source::new());
    // The first file with content: no state is in front of it.
    Edit::Content(4 * FILES + 1).make(&other).unwrap();
    let (earlier, of_other) = (Layer::of(&source, None), Layer::of(&other, None));
    // The same paths, sizes and times, and as many members.
    let states = of_other.followed().states.clone();
    assert_eq!(of_other.followed().written.entries, earlier.followed().written.entries);
    let now = Layer::with_states(&source, Some(&earlier), states);
    assert_eq!((now.followed().same_entries, now.followed().written), (0, earlier.whole()));
}
