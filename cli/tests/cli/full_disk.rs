//! A store on a file system that is too small: whatever does not fit is said with exit code 8, nothing
//! is named that is not whole, and with more room the same command does its work.

use std::path::PathBuf;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use crate::harness::{Context, Outcome, Store, needs_root, text};

/// A tmpfs where the store is, unmounted with this value.
struct Small {
    store: Store,
    place: PathBuf,
}

impl Small {
    fn new(options: &str) -> Self {
        let store = Store::empty();
        let place = store.root();
        std::fs::create_dir(&place).expect("ours to write");
        let options = std::ffi::CString::new(options).expect("no NUL");
        mount("tmpfs", &place, "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .expect("root may mount");
        Self { store, place }
    }

    fn grow(&self) {
        let options = c"size=256m,nr_inodes=100000";
        mount_remount(&self.place, MountFlags::empty(), options).expect("root may mount");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // The store's mounts are detached and go with their processes.
        let _ = unmount(&self.place, UnmountFlags::DETACH);
    }
}

/// Base, build and archive: the commands that write most.
fn commands(small: &Small, tar: &str, context: &Context) -> Vec<Outcome> {
    let out = small.store.beside("out.tar");
    let lines: [&[&str]; 3] = [
        &["import", tar, "busybox", "-c", "CMD [\"sh\"]"],
        &["build", "--progress", "plain", "-t", "made", context.path()],
        &["save", "-o", text(&out), "made"],
    ];
    let mut outcomes = Vec::new();
    for line in lines {
        let outcome = small.store.kiln(line);
        let code = outcome.code;
        outcomes.push(outcome);
        if code != Some(0) {
            break;
        }
    }
    outcomes
}

/// What the kernel says of a full disk, or SQLite, or kiln where a step's own command failed on one.
fn is_full(stderr: &str) -> bool {
    ["No space left", "disk is full", "the file system of the store is full"]
        .iter()
        .any(|said| stderr.contains(said))
}

/// How many sizes were too small.
fn sweep(sizes: impl Iterator<Item = String>) -> usize {
    let base = Store::empty();
    let tar = crate::harness::busybox_tar(base.beside("").as_path());
    let run = "FROM busybox\nCOPY . /all/\nRUN --network=none head -c 3000000 /dev/urandom > /made\n";
    let data = "x".repeat(2_000_000);
    let context = Context::new(&[("Dockerfile", run), ("data", &data), ("d/a", "a"), ("d/b", "b")]);
    let (mut refused, mut wrong) = (0, Vec::new());
    for size in sizes {
        let small = Small::new(&size);
        let outcomes = commands(&small, text(&tar), &context);
        let last = outcomes.last().expect("at least one command ran");
        let mut complain = |what: &str, outcome: &Outcome| {
            wrong.push(format!("{size}: {what}: {:?}\n{}", outcome.code, outcome.stderr));
        };
        if last.stderr.contains("panicked at") {
            complain("it panics", last);
        }
        match last.code {
            Some(0) => continue,
            // The step's own command may be the one that finds the disk full, and say what it likes.
            Some(1) if last.stderr.contains("process exited with code") => refused += 1,
            Some(8) if is_full(&last.stderr) => refused += 1,
            _ => complain("neither done nor refused for want of space", last),
        }
        if small.store.kiln(&["images"]).stdout.contains("made") {
            complain("an image has its name without being there", last);
        }
        small.grow();
        for outcome in commands(&small, text(&tar), &context) {
            if outcome.code != Some(0) {
                complain("with room enough", &outcome);
            }
        }
        if let Err(what) = small.store.sound() {
            wrong.push(format!("{size}: {what}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    refused
}

#[test]
fn a_store_on_a_small_disk_says_so_and_goes_on_with_more_room() {
    needs_root!();
    let refused = sweep((1..=16).map(|mib| format!("size={mib}m")));
    println!("16 sizes, {refused} too small");
    assert!((2..16).contains(&refused), "{refused} of 16 sizes were too small");
}

#[test]
fn a_store_without_inodes_says_so_and_goes_on_with_more() {
    needs_root!();
    let refused = sweep((1..=16).map(|tens| format!("size=256m,nr_inodes={}", tens * 40)));
    println!("16 numbers of inodes, {refused} too small");
    assert!((2..16).contains(&refused), "{refused} of 16 numbers of inodes were too small");
}

#[test]
fn a_file_that_does_not_fit_leaves_nothing_and_what_was_there_stays() {
    needs_root!();
    let small = Small::new("size=400k");
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\n")]);
    let out = small.place.join("out");
    std::fs::write(&out, "before").expect("ours to write");
    let (oci, tar) = (format!("type=oci,dest={}", text(&out)), format!("type=tar,dest={}", text(&out)));
    let lines: [&[&str]; 4] = [
        &["save", "-o", text(&out), "busybox"],
        &["export", "-o", text(&out), "busybox"],
        &["build", "-o", &oci, context.path()],
        &["build", "-o", &tar, context.path()],
    ];
    for line in lines {
        let full = store.kiln(line).expect(8);
        assert!(is_full(&full.stderr), "{line:?}: {}", full.stderr);
        let left = std::fs::read_dir(&small.place).expect("ours to read").count();
        assert_eq!((left, std::fs::read(&out).expect("ours to read")), (1, b"before".to_vec()), "{line:?}");
    }
}

#[test]
fn a14_a_step_that_uses_up_all_inodes_gives_them_back() {
    needs_root!();
    let small = Small::new("size=256m,nr_inodes=4000");
    let base = Store::empty();
    let tar = crate::harness::busybox_tar(base.beside("").as_path());
    small.store.ok(&["import", text(&tar), "busybox", "-c", "CMD [\"sh\"]"]);
    let free = || rustix::fs::statvfs(&small.place).expect("it is mounted").f_ffree;
    let before = free();
    let step = |run: &str| {
        let dockerfile = format!("FROM busybox\nRUN --network=none {run}\n");
        small.store.build(&Context::new(&[("Dockerfile", &dockerfile)]), &["--no-cache"])
    };
    let greedy =
        "mkdir /d; i=0; while true > /d/$i; do i=$((i+1)); done 2>/d/0; tail -n 1 /d/0; echo made $i; exit 9";
    let told = ["No space left", "exited with code 9, and the file system of the store is full", "made 3"];
    let full = step(greedy).expect(8).says(&told);
    assert!(!full.stderr.contains("panicked"), "{}", full.stderr);
    // One that does not care finds out from kiln, or has nothing to say and changes nothing.
    let code = step(&greedy.replace("exit 9", "true")).code;
    assert!(matches!(code, Some(0 | 8)), "{code:?}");
    small.store.kiln(&["gc", "--max-store", "1"]);
    // And then as if nothing had been, without more room.
    step("true").expect(0);
    small.store.sound().expect("sound");
    assert!(before - free() < 500, "{} inodes are still taken", before - free());
}

/// What a cache in a directory without room says; what is in it is whole, and with more room it has the rest.
#[test]
fn a_cache_on_a_full_disk_is_a_warning_and_what_it_has_is_whole() {
    needs_root!();
    let store = Store::with_busybox();
    let run = "FROM busybox\nCOPY a /a\nRUN --network=none head -c 600000 /dev/urandom > /b\nCOPY a /c\n";
    let context = Context::new(&[("Dockerfile", run), ("a", "a\n")]);
    store.build(&context, &["-t", "app"]).expect(0);
    for room in ["size=64k", "size=1m", "size=64m,nr_inodes=7"] {
        let small = Small::new(room);
        let dir = small.place.join("cache");
        let to = format!("type=local,dest={},mode=max", text(&dir));
        let from = format!("type=local,src={}", text(&dir));
        let told = ["warning: the cache is not exported to directory", "No space left"];
        store.build(&context, &["--cache-to", &to]).expect(0).says(&told);
        let left = std::fs::read_dir(dir.join("incoming")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "{room}: files that are on their way in");
        let warned = |stderr: &str| stderr.contains("warning: ");
        let other = Store::with_busybox();
        let built = other.build(&context, &["-t", "app", "--cache-from", &from]).expect(0);
        assert!(!warned(&built.stderr), "{room}: {}", built.stderr);
        other.sound().expect("sound");
        small.grow();
        let whole = store.build(&context, &["--cache-to", &to]).expect(0);
        assert!(!warned(&whole.stderr), "{room}: {}", whole.stderr);
        let built = Store::with_busybox().build(&context, &["--cache-from", &from]).expect(0);
        assert_eq!((built.ran(), warned(&built.stderr)), (vec![], false), "{room}: {}", built.stderr);
    }
}
