//! Devices of the host, to be shown inside.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use kiln_executor::Device;

/// The device at `host` as `inside`; of a directory all the devices in it.
///
/// # Errors
/// When it cannot be read, or is neither.
pub fn at(host: &Path, inside: &str) -> io::Result<Vec<Device>> {
    let metadata = fs::metadata(host)?;
    if let Some(device) = device(&metadata, inside) {
        return Ok(vec![device]);
    }
    if !metadata.is_dir() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is no device"));
    }
    let mut found = Vec::new();
    walk(host, inside.trim_end_matches('/'), &mut found)?;
    Ok(found)
}

/// All of them, but what each container has of its own.
pub fn of_host() -> Vec<Device> {
    const OWN: [&str; 12] =
        ["console", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "tty", "urandom", "zero"];
    let mut found = Vec::new();
    for entry in fs::read_dir("/dev").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !OWN.contains(&name.as_str()) {
            // One that is gone meanwhile is no device any more.
            let _ = add(&entry, "/dev", &mut found);
        }
    }
    found
}

fn walk(dir: &Path, inside: &str, found: &mut Vec<Device>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        add(&entry?, inside, found)?;
    }
    Ok(())
}

fn add(entry: &fs::DirEntry, inside: &str, found: &mut Vec<Device>) -> io::Result<()> {
    // Links are not followed: they may lead in circles.
    let metadata = entry.metadata()?;
    let inside = format!("{inside}/{}", entry.file_name().to_string_lossy());
    if metadata.is_dir() {
        return walk(&entry.path(), &inside, found);
    }
    found.extend(device(&metadata, &inside));
    Ok(())
}

fn device(metadata: &fs::Metadata, inside: &str) -> Option<Device> {
    let block = metadata.file_type().is_block_device();
    (block || metadata.file_type().is_char_device()).then(|| Device {
        path: inside.to_owned(),
        block,
        number: (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())),
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
    })
}
