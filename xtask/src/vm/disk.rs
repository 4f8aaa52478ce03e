//! A disk with a write cache that a power cut empties, served to qemu over the NBD protocol.
//!
//! As a real disk, it answers a write when it has it in its cache, and keeps it for good with the next
//! flush. When the power goes, of what was not flushed some blocks are kept and others are lost, in
//! whatever order they were written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::step::Failure;

const SECTOR: usize = 512;
/// Sectors that are written as one, or not at all.
const BLOCK: u64 = 8;

/// Numbers that look random and can be had again. (Marsaglia's xorshift.)
pub(super) struct Random(u64);

impl Random {
    pub(super) fn of(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// The disk: a file, and what is only in the cache.
struct Disk {
    file: File,
    cached: BTreeMap<u64, [u8; SECTOR]>,
}

impl Disk {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)?;
        let first = offset / SECTOR as u64;
        for (sector, content) in self.cached.range(first..first + (bytes.len() / SECTOR) as u64) {
            let at = usize::try_from(sector - first).unwrap_or(0) * SECTOR;
            bytes[at..at + SECTOR].copy_from_slice(content);
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
        let first = offset / SECTOR as u64;
        let (sectors, _) = bytes.as_chunks::<SECTOR>();
        for (sector, content) in (first..).zip(sectors) {
            if durable {
                self.cached.remove(&sector);
            } else {
                self.cached.insert(sector, *content);
            }
        }
        if durable { self.file.write_all_at(bytes, offset) } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        for (sector, content) in std::mem::take(&mut self.cached) {
            self.file.write_all_at(&content, sector * SECTOR as u64)?;
        }
        Ok(())
    }

    /// The power goes: of 100 blocks in the cache, some `kept` are written. How many were lost.
    fn cut(&mut self, kept: u64, random: &mut Random) -> io::Result<usize> {
        let (mut block, mut keeps, mut lost) = (None, false, 0);
        for (sector, content) in std::mem::take(&mut self.cached) {
            if block.replace(sector / BLOCK) != Some(sector / BLOCK) {
                keeps = random.below(100) < kept;
                lost += usize::from(!keeps);
            }
            if keeps {
                self.file.write_all_at(&content, sector * SECTOR as u64)?;
            }
        }
        Ok(lost)
    }
}

/// The disk at its socket.
pub(super) struct Served {
    disk: Arc<Mutex<Disk>>,
    pub(super) socket: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl Served {
    /// Serves the disk in `file` to the one machine that is started next.
    pub(super) fn start(file: &Path, socket: &Path) -> Result<Self, Failure> {
        let _ = std::fs::remove_file(socket);
        let opened = File::options().read(true).write(true).open(file).map_err(Failure::io("open", file))?;
        let size = opened.metadata().map_err(Failure::io("look at", file))?.len();
        let listener = UnixListener::bind(socket).map_err(Failure::io("listen at", socket))?;
        let disk = Arc::new(Mutex::new(Disk { file: opened, cached: BTreeMap::new() }));
        let shared = Arc::clone(&disk);
        let server = thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                // Ends with an error when qemu is killed, which is how it ends here.
                let _ = serve(stream, &shared, size);
            }
        });
        Ok(Self { disk, socket: socket.to_owned(), server: Some(server) })
    }

    /// The power goes; qemu must be gone. How many blocks were in the cache and are lost.
    pub(super) fn cut(mut self, kept: u64, random: &mut Random) -> Result<usize, Failure> {
        // A machine that never came for its disk leaves a server that waits.
        let _ = UnixStream::connect(&self.socket);
        self.server.take().map(JoinHandle::join);
        locked(&self.disk).cut(kept, random).map_err(Failure::io("write", &self.socket))
    }
}

fn locked(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Flags are there, flushes are understood, and writes that are to be kept at once.
const CAN: u16 = 1 | 4 | 8;
const INVALID: u32 = 22;
const FAILED: u32 = 5;
/// More than qemu asks for at once.
const LONGEST: u32 = 64 << 20;

fn take<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).map(|()| bytes)
}

fn take_many(stream: &mut UnixStream, length: u32) -> io::Result<Vec<u8>> {
    if length > LONGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes).map(|()| bytes)
}

/// Speaks with one client until it goes.
fn serve(mut stream: UnixStream, disk: &Mutex<Disk>, size: u64) -> io::Result<()> {
    // Newstyle, and no padding after the export.
    stream.write_all(&[&b"NBDMAGIC"[..], &OPTION.to_be_bytes(), &3_u16.to_be_bytes()].concat())?;
    take::<4>(&mut stream)?;
    loop {
        if u64::from_be_bytes(take(&mut stream)?) != OPTION {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let option = u32::from_be_bytes(take(&mut stream)?);
        let length = u32::from_be_bytes(take(&mut stream)?);
        take_many(&mut stream, length)?;
        let reply = |kind: u32, data: &[u8]| {
            let length = u32::try_from(data.len()).unwrap_or(0);
            let head = [OPTION_REPLY.to_be_bytes().to_vec(), option.to_be_bytes().to_vec()].concat();
            [&head[..], &kind.to_be_bytes(), &length.to_be_bytes(), data].concat()
        };
        let export = [&size.to_be_bytes()[..], &CAN.to_be_bytes()].concat();
        match option {
            1 => {
                stream.write_all(&export)?;
                break;
            }
            6 | 7 => {
                stream.write_all(&reply(3, &[&[0, 0], &export[..]].concat()))?;
                stream.write_all(&reply(1, &[]))?;
                if option == 7 {
                    break;
                }
            }
            2 => return stream.write_all(&reply(1, &[])),
            _ => stream.write_all(&reply(0x8000_0001, &[]))?,
        }
    }
    transmit(&mut stream, disk, size)
}

fn transmit(stream: &mut UnixStream, disk: &Mutex<Disk>, size: u64) -> io::Result<()> {
    loop {
        if u32::from_be_bytes(take(stream)?) != REQUEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let flags = u16::from_be_bytes(take(stream)?);
        let kind = u16::from_be_bytes(take(stream)?);
        let cookie: [u8; 8] = take(stream)?;
        let offset = u64::from_be_bytes(take(stream)?);
        let length = u32::from_be_bytes(take(stream)?);
        let written = if kind == 1 { take_many(stream, length)? } else { Vec::new() };
        let sector = SECTOR as u64;
        let fits = offset.checked_add(length.into()).is_some_and(|end| end <= size) && length <= LONGEST;
        let whole = offset.is_multiple_of(sector) && u64::from(length).is_multiple_of(sector);
        let mut read = Vec::new();
        let done = match kind {
            0 if fits && whole => {
                read = vec![0; length as usize];
                locked(disk).read(offset, &mut read)
            }
            1 if fits && whole => locked(disk).write(offset, &written, flags & 1 != 0),
            2 => return Ok(()),
            3 => locked(disk).flush(),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        let code = match done {
            Ok(()) => 0,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => INVALID,
            Err(_) => FAILED,
        };
        if code != 0 {
            read.clear();
        }
        stream.write_all(&[&REPLY.to_be_bytes()[..], &code.to_be_bytes(), &cookie, &read].concat())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 64 KiB in a directory of its own.
    fn disk(name: &str) -> (PathBuf, PathBuf) {
        let dir = std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("temp dir is writable");
        let file = dir.join("disk");
        std::fs::write(&file, vec![0; 64 << 10]).expect("temp dir is writable");
        (dir, file)
    }

    fn blocks(file: &Path) -> Vec<u8> {
        std::fs::read(file).expect("ours").chunks(4096).map(|block| block[0]).collect()
    }

    #[test]
    fn what_was_not_flushed_goes_with_the_power() {
        let (dir, path) = disk("cut");
        let open = || File::options().read(true).write(true).open(&path).expect("ours");
        let mut disk = Disk { file: open(), cached: BTreeMap::new() };
        let mut random = Random::of(1);
        disk.write(0, &[1; 4096], false).expect("fits");
        disk.flush().expect("fits");
        disk.write(0, &[2; 4096], false).expect("fits");
        disk.write(4096, &[3; 4096], false).expect("fits");
        disk.write(8192, &[4; 4096], true).expect("fits");
        let mut seen = [0; 4096];
        disk.read(0, &mut seen).expect("fits");
        assert_eq!(seen[0], 2, "the machine sees what it wrote");
        assert_eq!(disk.cut(0, &mut random).expect("fits"), 2);
        assert_eq!(blocks(&path)[..4], [1, 0, 4, 0]);
        // Some of many, whatever their order.
        for block in 0..16 {
            disk.write(block * 4096, &[9; 4096], false).expect("fits");
        }
        let lost = disk.cut(50, &mut random).expect("fits");
        assert!(lost > 0 && lost < 16);
        assert_eq!(blocks(&path).iter().filter(|byte| **byte == 9).count(), 16 - lost);
        std::fs::remove_dir_all(dir).expect("ours");
    }

    #[test]
    fn a_client_reads_what_it_wrote() {
        let (dir, path) = disk("nbd");
        let served = Served::start(&path, &dir.join("socket")).expect("ours to make");
        let mut client = UnixStream::connect(&served.socket).expect("it listens");
        assert_eq!(&take::<16>(&mut client).expect("a greeting"), b"NBDMAGICIHAVEOPT");
        take::<2>(&mut client).expect("flags");
        let go = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &7_u32.to_be_bytes(), &6_u32.to_be_bytes(), &[0; 6]];
        client.write_all(&go.concat()).expect("it reads");
        let info: [u8; 32] = take(&mut client).expect("an export");
        assert_eq!(info[22..30], (64_u64 << 10).to_be_bytes());
        take::<20>(&mut client).expect("its end");
        let mut ask = |kind: u16, offset: u64, data: &[u8], length: u32| {
            let head = [&REQUEST.to_be_bytes()[..], &[0, 0], &kind.to_be_bytes(), b"12345678"].concat();
            let ask = [&head[..], &offset.to_be_bytes(), &length.to_be_bytes(), data].concat();
            client.write_all(&ask).expect("it reads");
            let reply: [u8; 16] = take(&mut client).expect("it answers");
            assert_eq!(&reply[8..], b"12345678");
            let error = u32::from_be_bytes(reply[4..8].try_into().expect("four bytes"));
            let length = if kind == 0 && error == 0 { length } else { 0 };
            (error, take_many(&mut client, length).expect("what was asked for"))
        };
        assert_eq!(ask(1, 4096, &[7; 1024], 1024).0, 0);
        assert_eq!(ask(0, 4096, &[], 1024), (0, vec![7; 1024]));
        assert_eq!(ask(0, 64 << 10, &[], 512).0, INVALID);
        assert_eq!(ask(9, 0, &[], 0).0, INVALID);
        assert_eq!(blocks(&path)[1], 0);
        assert_eq!(ask(3, 0, &[], 0).0, 0);
        assert_eq!(blocks(&path)[1], 7);
        drop(client);
        assert_eq!(served.cut(0, &mut Random::of(2)).expect("nothing is left"), 0);
        std::fs::remove_dir_all(dir).expect("ours");
    }
}
