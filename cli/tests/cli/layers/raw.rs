//! Tar members as raw headers: whatever a test wants them to say, checked by nobody.

/// One header to be, POSIX unless it is made GNU's.
pub(crate) struct Member {
    header: [u8; 512],
    content: Vec<u8>,
}

impl Member {
    /// A header of this type; mode 0644, or 0755 for a directory; time 1; owner 0.
    pub(crate) fn new(name: impl AsRef<[u8]>, flag: u8) -> Member {
        let mut member = Member { header: [0; 512], content: Vec::new() };
        member.header[257..265].copy_from_slice(b"ustar\x0000");
        let mode = if flag == b'5' { 0o755 } else { 0o644 };
        let member = member.field(0, 100, name.as_ref()).flag(flag).octal(100, 8, mode);
        member.octal(108, 8, 0).octal(116, 8, 0).octal(124, 12, 0).octal(136, 12, 1)
    }

    /// Sets a field of so many bytes.
    pub(crate) fn field(mut self, at: usize, width: usize, bytes: &[u8]) -> Member {
        self.header[at..at + width].fill(0);
        self.header[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Sets a number, in octal.
    pub(crate) fn octal(self, at: usize, width: usize, number: u64) -> Member {
        let digits = format!("{number:0width$o}", width = width - 1);
        self.field(at, width, digits.as_bytes())
    }

    /// Sets a number the way GNU writes those that octal cannot hold.
    pub(crate) fn binary(mut self, at: usize, width: usize, number: i128) -> Member {
        let bytes = number.to_be_bytes();
        self.header[at..at + width].copy_from_slice(&bytes[16 - width..]);
        self.header[at] = self.header[at] & 0x7f | 0x80;
        self
    }

    fn flag(self, flag: u8) -> Member {
        self.field(156, 1, &[flag])
    }

    /// The target of a link.
    pub(crate) fn link(self, target: &str) -> Member {
        self.field(157, 100, target.as_bytes())
    }

    /// Major and minor number of a device.
    pub(crate) fn device(self, major: u64, minor: u64) -> Member {
        self.octal(329, 8, major).octal(337, 8, minor)
    }

    /// Permissions.
    pub(crate) fn mode(self, mode: u64) -> Member {
        self.octal(100, 8, mode)
    }

    /// The content, and the size that goes with it.
    pub(crate) fn content(mut self, content: impl AsRef<[u8]>) -> Member {
        self.content = content.as_ref().to_vec();
        let size = self.content.len() as u64;
        self.octal(124, 12, size)
    }

    /// The content behind a header that says another size.
    pub(crate) fn lying_content(mut self, content: &[u8]) -> Member {
        self.content = content.to_vec();
        self
    }

    /// Header with its checksum, content, padding.
    pub(crate) fn bytes(mut self) -> Vec<u8> {
        self.header[148..156].fill(b' ');
        let sum: u64 = self.header.iter().map(|&byte| u64::from(byte)).sum();
        let mut bytes = self.field(148, 7, format!("{sum:06o}").as_bytes()).into_parts();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn into_parts(self) -> Vec<u8> {
        [self.header.as_slice(), &self.content].concat()
    }
}

pub(crate) fn file(name: &str, content: &str) -> Vec<u8> {
    Member::new(name, b'0').content(content).bytes()
}

pub(crate) fn dir(name: &str) -> Vec<u8> {
    Member::new(name, b'5').bytes()
}

pub(crate) fn symlink(name: &str, target: &str) -> Vec<u8> {
    Member::new(name, b'2').link(target).bytes()
}

pub(crate) fn hard_link(name: &str, target: &str) -> Vec<u8> {
    Member::new(name, b'1').link(target).bytes()
}

/// A PAX member of these records, which speak of the next member.
pub(crate) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    Member::new("PaxHeaders/x", b'x').content(pax_records(records)).bytes()
}

/// `length key=value\n`, the length counting its own digits.
pub(crate) fn pax_records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while rest + length.to_string().len() != length {
            length = rest + length.to_string().len();
        }
        text.extend_from_slice(format!("{length} {key}=").as_bytes());
        text.extend_from_slice(value);
        text.push(b'\n');
    }
    text
}

/// GNU's long name (`L`) or long link (`K`).
pub(crate) fn gnu_long(flag: u8, name: &[u8]) -> Vec<u8> {
    Member::new("././@LongLink", flag).content([name, b"\0"].concat()).bytes()
}

/// Members and the two blocks that end a tar.
pub(crate) fn tar(members: &[Vec<u8>]) -> Vec<u8> {
    [members.concat(), vec![0; 1024]].concat()
}

/// One gzip member.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory takes it")
}

/// A zstd frame that stores its bytes as they are. `dictionary` is one it says to need; the window
/// is a power of two.
pub(crate) fn zstd(bytes: &[u8], window_log: u8, dictionary: Option<u8>) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, u8::from(dictionary.is_some()), (window_log - 10) << 3];
    frame.extend(dictionary);
    let blocks: Vec<&[u8]> = bytes.chunks(64 << 10).collect();
    for (nth, block) in blocks.iter().enumerate() {
        let header = (block.len() as u32) << 3 | u32::from(nth + 1 == blocks.len());
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.extend_from_slice(block);
    }
    frame
}

/// A frame of zstd that readers skip.
pub(crate) fn zstd_skippable(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a short one").to_le_bytes();
    [&[0x53, 0x2a, 0x4d, 0x18][..], &length, bytes].concat()
}
