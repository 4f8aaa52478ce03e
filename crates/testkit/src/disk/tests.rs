//! What is synced is there, and what is not may be lost in every way that is feared.

use std::collections::BTreeSet;
use std::process::Command;

use super::*;
use crate::faults::observe;
use crate::recorder::Recorder;

/// What all crashes of a shell script leave of the files `old` and `new`: the contents, `-` for
/// none. `old` is there, holds `old` and is synced before.
fn left(script: &str, ignored: Option<Sync>) -> BTreeSet<String> {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("old"), "old").unwrap();
    let mut recorder = Recorder::new(&root, |_| false).unwrap();
    let begun = recorder.disk().now();
    let mut program = Command::new("/bin/busybox");
    program.args(["sh", "-c", script]).current_dir(&root);
    let traced = observe(&program, &mut recorder).unwrap();
    assert_eq!(traced.code, Some(0), "{}", traced.stderr);
    let mut disk = recorder.finish().unwrap();
    ignored.into_iter().for_each(|sync| disk.ignore(sync));
    let mut random = Random::of(7);
    let mut found = BTreeSet::new();
    for number in 0..1500 {
        let anywhere = begun + random.below(disk.now() + 1 - begun);
        let at = if random.below(3) == 0 { disk.now() } else { anywhere };
        let image = disk.crash(at, &mut random);
        let place = dir.path().join(format!("{number}"));
        image.write_to(&place).unwrap();
        let read = |name: &str| {
            fs::read(place.join(name))
                .map_or("-".to_owned(), |bytes| String::from_utf8_lossy(&bytes).replace('\0', "0"))
        };
        found.insert(format!("{} {}", read("old"), read("new")));
        fs::remove_dir_all(place).unwrap();
    }
    found
}

fn set(texts: &[&str]) -> BTreeSet<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn a_rename_without_a_sync_may_arrive_before_the_bytes() {
    let found = left("echo -n new > new && mv new old", None);
    let expected = ["old -", "old new", "old ", "old 000", "new -", " -", "000 -"];
    assert_eq!(found, set(&expected));
}

#[test]
fn a_sync_before_the_rename_keeps_the_bytes() {
    let found = left("echo -n new > new && sync -d new && mv new old", None);
    assert_eq!(found, set(&["old -", "old new", "old ", "old 000", "new -"]));
    let broken = left("echo -n new > new && sync -d new && mv new old", Some(Sync::File));
    assert!(broken.contains(" -") && broken.contains("000 -"), "{broken:?}");
}

#[test]
fn after_a_sync_of_all_nothing_is_lost() {
    let script = "echo -n new > new && mv new old && sync -f . && echo -n more > new";
    let found = left(script, None);
    assert!(found.contains("new more") && found.contains("new -"), "{found:?}");
    assert!(found.contains("000 -"), "before the sync: {found:?}");
    assert!(!found.contains("old more") && !found.contains("000 more"), "{found:?}");
}

#[test]
fn blocks_arrive_on_their_own() {
    let script = "dd if=/dev/zero bs=4096 count=2 2>/dev/null | tr '\\0' a > new && sync -d new && \
        dd if=new bs=4096 count=2 2>/dev/null | tr a b | dd of=new bs=4096 conv=notrunc 2>/dev/null";
    let short = |text: &String| {
        let new = text.trim_start_matches("old ");
        (new.len() == 8192).then(|| format!("{}{}", &new[..1], &new[8191..]))
    };
    let found: BTreeSet<String> = left(script, None).iter().filter_map(short).collect();
    assert!(["aa", "bb", "ab", "ba"].iter().all(|both| found.contains(*both)), "{found:?}");
}
