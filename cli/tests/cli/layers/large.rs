//! A layer of very many entries: memory does not grow with it.

use std::fs::File;
use std::io::{BufWriter, Write};

use super::raw::{Member, dir};
use crate::harness::{Context, Place, Store, needs_root, text};

const FILES: usize = 500;

/// Writes the tar straight to a file: what this process holds in memory would count as kiln's.
fn write_tar(path: &std::path::Path, dirs: usize) {
    let mut out = BufWriter::new(File::create(path).expect("ours"));
    let mut write = |bytes: &[u8]| out.write_all(bytes).expect("there is room");
    for nth in 0..dirs {
        write(&dir(&format!("dir-{nth:03}")));
        for file in 0..FILES {
            let name = format!("dir-{nth:03}/a-file-of-a-package-{file:04}");
            let content = if file % 10 == 0 { format!("{nth} {file}") } else { String::new() };
            write(&Member::new(name, b'0').content(content).bytes());
        }
    }
    write(&[0; 1024]);
}

/// [`Store::bounded`] holds each command to 256 MiB of memory at its highest. With KILN_LARGE=all half
/// as many more, and what comes after unpacking and reading.
#[test]
fn more_than_a_hundred_thousand_files_take_no_more_memory_than_a_few() {
    needs_root!();
    // Disks take minutes for so many files, and it is not about them.
    let store = Store::empty_at(Place::Memory);
    let input = store.beside("large.tar");
    let all = std::env::var_os("KILN_LARGE").is_some_and(|what| what == "all");
    write_tar(&input, if all { 300 } else { 204 });
    // Unpacked, and read again for its diff ID.
    store.bounded(store.command(&["import", text(&input), "large:1"])).expect(0);
    if !all {
        return;
    }
    let saved = store.beside("saved.tar");
    store.bounded(store.command(&["save", "-o", text(&saved), "large:1"])).expect(0);
    // Of a plain layer the tree is compared with the bytes that came.
    let other = Store::empty_at(Place::Memory);
    other.bounded(other.command(&["load", "-i", text(&saved)])).expect(0);
    assert_eq!(other.inspect("large:1")["Id"], store.inspect("large:1")["Id"]);
    let context = Context::new(&[("Dockerfile", "FROM large:1\nCOPY --from=large:1 /dir-203 /again\n")]);
    other.build_bounded(&context, &["-t", "more:1"]).expect(0);
}
