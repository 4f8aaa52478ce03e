//! Where a file system keeps whole seconds, a file that changes twice in one of them has the same times again.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::harness::{Store, needs_root, text};

/// Changes that are looked for; most of those that are made meet in one stamp.
const CHANGES: usize = 8;
/// Changes that are made for that at most.
const ATTEMPTS: usize = 100;

#[test]
fn a_change_within_one_stamp_of_the_file_system_is_seen() {
    needs_root!();
    let disks: [(&str, &[&str]); 3] = [
        // Inodes of 128 bytes have no room for nanoseconds: one second.
        ("mkfs.ext4", &["-q", "-I", "128"]),
        ("mkfs.ext3", &["-q", "-I", "128"]),
        // Two seconds.
        ("mkfs.vfat", &[]),
    ];
    let mut looked = 0;
    for (make, flags) in disks {
        match Disk::new(make, flags) {
            Ok(disk) => check(make, &disk),
            Err(reason) => {
                eprintln!("SKIPPED ALOUD: {make}: {}", reason.trim());
                continue;
            }
        }
        looked += 1;
    }
    if looked == 0 {
        eprintln!("SKIPPED ALOUD: no file system with coarse stamps can be mounted");
    }
}

#[track_caller]
fn check(make: &str, disk: &Disk) {
    // FAT has no owners, and could not hold a store.
    let (context, store) = (disk.at("context"), Store::empty());
    let out = store.beside("out");
    fs::create_dir(&context).expect("ours to write");
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY file /file\n").expect("ours to write");
    let file = context.join("file");
    let build = || {
        store.ok(&["build", "-q", "-o", text(&out), text(&context)]);
        fs::read_to_string(out.join("file")).expect("it was copied")
    };
    // Its inode and its times after a change.
    let state = |content: usize| {
        // Written in place, and all of one length: nothing but the times could tell.
        let mut open =
            fs::File::options().create(true).write(true).truncate(false).open(&file).expect("ours");
        open.write_all(format!("{content:08}").as_bytes()).expect("there is room");
        let stat = fs::metadata(&file).expect("just written");
        let stamp = |secs: i64, nanos: i64| i128::from(secs) * 1_000_000_000 + i128::from(nanos);
        (stat.ino(), stamp(stat.mtime(), stat.mtime_nsec()), stamp(stat.ctime(), stat.ctime_nsec()))
    };
    let (mut met, mut quick) = (0, 0);
    for attempt in 0..ATTEMPTS {
        let (begun, before) = (Instant::now(), state(2 * attempt));
        assert_eq!(build(), format!("{:08}", 2 * attempt), "{make}");
        let after = state(2 * attempt + 1);
        quick += usize::from(begun.elapsed() < Duration::from_millis(500));
        assert_eq!(build(), format!("{:08}", 2 * attempt + 1), "{make}: {before:?} {after:?}");
        met += usize::from(before == after);
        if met == CHANGES {
            break;
        }
    }
    // A build that takes longer than a stamp is wide never meets one.
    assert!(met > 0 || quick < 20, "{make} has finer stamps than that");
    if met == 0 {
        eprintln!("SKIPPED ALOUD: {make}: this machine is too busy to change a file twice in a second");
    }
    println!("{make}: {met} changes kept the times of the file");
}
