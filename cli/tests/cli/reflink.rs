//! On a file system whose files can share their blocks, a large file is there once, however many
//! trees have it.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::disk::Disk;
use crate::harness::{busybox_tar, needs_root, text};

const LARGE_MIB: usize = 24;

/// Bytes that no file system packs.
fn noise(path: &Path) {
    let mut random = kiln_testkit::random::Random::of(1);
    let mut file = fs::File::create(path).expect("ours to write");
    for _ in 0..LARGE_MIB {
        let part: Vec<u8> = (0..1 << 17).flat_map(|_| random.number().to_ne_bytes()).collect();
        file.write_all(&part).expect("there is room");
    }
}

#[test]
fn large_files_share_their_blocks_where_the_file_system_can() {
    needs_root!();
    let mut looked = 0;
    for make in ["mkfs.btrfs", "mkfs.xfs"] {
        let disk = match Disk::new(make, &["-q"]) {
            Ok(disk) => disk,
            Err(reason) => {
                eprintln!("SKIPPED ALOUD: {make}: {}", reason.trim());
                continue;
            }
        };
        looked += 1;
        let context = disk.at("context");
        fs::create_dir(&context).expect("ours to write");
        noise(&context.join("large"));
        let tar = busybox_tar(&disk.at(""));
        let dockerfile = "FROM busybox AS one\nCOPY large /one\n\
            FROM busybox\nCOPY --from=one /one /two\nRUN --network=none mv /two /three && chmod 600 /three\n";
        fs::write(context.join("Dockerfile"), dockerfile).expect("ours to write");
        disk.kiln(&["import", text(&tar), "busybox", "-c", "CMD [\"sh\"]", "-c", "ENV PATH=/bin"]);
        let build = |target: &[&str]| {
            let taken =
                disk.taken(|| disk.kiln(&[&["build", "-t", "app"], target, &[text(&context)]].concat()));
            println!("{make}: build {target:?} of a file of {LARGE_MIB} MiB takes {taken} MiB");
            taken
        };
        let copied = build(&["--target", "one"]);
        let all = build(&[]);
        let out = disk.at("out");
        let taken_out = disk.taken(|| disk.kiln(&["cp", "app:/three", text(&out)]));
        println!("{make}: cp takes {taken_out} MiB");
        assert_eq!(fs::metadata(&out).expect("it was copied").len(), (LARGE_MIB << 20) as u64);
        let few = LARGE_MIB as u64 / 4;
        assert!(all < few, "COPY --from and a RUN that moves it take {all} MiB");
        // Into overlayfs from beside it, and out of it, the kernel does not share: once is all it takes.
        let once = LARGE_MIB as u64 + few;
        assert!(copied < once, "COPY from the context takes {copied} MiB");
        assert!(taken_out < once, "cp takes {taken_out} MiB");
    }
    if looked == 0 {
        eprintln!("SKIPPED ALOUD: no file system whose files can share their blocks");
    }
}
