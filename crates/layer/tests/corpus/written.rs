//! Archives written header by header: as Go's archive/tar writes them, which wrote most of the layers there
//! are, and in ways that the formats allow and tools of today avoid.

/// The fields of a header.
#[derive(Clone)]
struct Header {
    name: String,
    kind: u8,
    mode: u64,
    id: u64,
    mtime: u64,
    link: &'static str,
    device: (u64, u64),
    prefix: &'static str,
    magic: &'static [u8; 8],
}

const USTAR: &[u8; 8] = b"ustar\x0000";
const GNU: &[u8; 8] = b"ustar  \0";
const V7: &[u8; 8] = &[0; 8];

fn header(kind: u8, name: &str) -> Header {
    let mode = if kind == b'5' { 0o755 } else { 0o644 };
    Header {
        name: name.to_owned(),
        kind,
        mode,
        id: 0,
        mtime: 1_600_000_000,
        link: "",
        device: (0, 0),
        prefix: "",
        magic: USTAR,
    }
}

fn put(field: &mut [u8], text: &[u8]) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
}

/// Zeros in front and a NUL behind, as Go has it.
fn octal(field: &mut [u8], number: u64) {
    let width = field.len() - 1;
    put(field, format!("{number:0width$o}").as_bytes());
}

impl Header {
    fn block(&self, size: usize) -> [u8; 512] {
        let mut block = [0; 512];
        put(&mut block[..100], self.name.as_bytes());
        for (at, length, number) in [
            (100, 8, self.mode),
            (108, 8, self.id),
            (116, 8, self.id),
            (124, 12, size as u64),
            (136, 12, self.mtime),
            (329, 8, self.device.0),
            (337, 8, self.device.1),
        ] {
            octal(&mut block[at..at + length], number);
        }
        block[156] = self.kind;
        put(&mut block[157..257], self.link.as_bytes());
        put(&mut block[257..265], self.magic);
        put(&mut block[345..500], self.prefix.as_bytes());
        block
    }
}

/// An archive as it grows.
#[derive(Default)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    fn raw(mut self, mut block: [u8; 512], content: &[u8]) -> Self {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        put(&mut block[148..156], format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&block);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn member(self, header: &Header, content: &[u8]) -> Self {
        let block = header.block(content.len());
        self.raw(block, content)
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.member(&header(b'5', name), b"")
    }

    pub(crate) fn file(self, name: &str, content: &str) -> Self {
        self.member(&header(b'0', name), content.as_bytes())
    }

    pub(crate) fn link(self, kind: u8, name: &str, link: &'static str) -> Self {
        self.member(&Header { link, ..header(kind, name) }, b"")
    }

    /// Extension records, in the order given.
    fn records(self, kind: u8, name: &str, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            // The length counts its own digits.
            let length = (1..).map(|digits| rest + digits).find(|all| all.to_string().len() == all - rest);
            content.extend_from_slice(format!("{} {key}=", length.expect("few digits")).as_bytes());
            content.extend_from_slice(value);
            content.push(b'\n');
        }
        let own = Header { mode: 0, mtime: 0, ..header(kind, name) };
        self.member(&own, &content)
    }

    /// A file with records as Go writes them: sorted, in front of a header with what fits into it.
    fn with_records(self, file: &Header, content: &str, records: &[(&str, &[u8])]) -> Self {
        let mut sorted = records.to_vec();
        sorted.sort();
        let base = file.name.rsplit('/').next().expect("one at least");
        self.records(b'x', &format!("PaxHeaders.0/{base}"), &sorted).member(file, content.as_bytes())
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// An archive.
pub(crate) struct Written {
    pub(crate) name: &'static str,
    pub(crate) bytes: Vec<u8>,
}

const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub(crate) fn written() -> Vec<Written> {
    let mut all = Vec::new();
    let mut add = |name, tar: Tar| all.push(Written { name, bytes: tar.end() });
    go(&mut add);
    by_hand(&mut add);
    all
}

fn go(add: &mut dyn FnMut(&'static str, Tar)) {
    let device = Header { device: (1, 3), ..header(b'3', "dir/null") };
    let everything = Tar::default()
        .dir("dir/")
        .member(&Header { mode: 0o4755, id: 1000, ..header(b'0', "dir/file") }, b"content")
        .link(b'1', "dir/hard", "dir/file")
        .link(b'2', "dir/symbolic", "../nowhere")
        .member(&device, b"")
        .member(&header(b'6', "dir/pipe"), b"")
        .file("empty", "");
    add("Go: every kind", everything);

    let long = format!("{}/{}", "d".repeat(120), "f".repeat(130));
    let cut = Header { name: long[..100].to_owned(), ..header(b'0', "") };
    let dir = format!("{}/", "d".repeat(120));
    let cut_dir = Header { name: dir[..100].to_owned(), ..header(b'5', "") };
    let times = Tar::default()
        .with_records(&cut_dir, "", &[("path", dir.as_bytes())])
        .with_records(&cut, "long", &[("path", long.as_bytes()), ("mtime", b"1700000000.123456789")])
        .with_records(&header(b'0', "precise"), "", &[("mtime", b"1700000000.5"), ("atime", b"1.5")])
        .with_records(&header(b'0', "old"), "", &[("mtime", b"-1.25")]);
    add("Go: long names and times", times);

    let target = "t".repeat(150);
    let cut_link = Header { link: "ttt", ..header(b'2', "symbolic") };
    let names = Tar::default()
        .with_records(&header(b'0', "umlut"), "umlaut", &[("path", "umläut".as_bytes())])
        .with_records(&cut_link, "", &[("linkpath", target.as_bytes())]);
    add("Go: names that are not ASCII", names);

    let attributes = Tar::default().with_records(
        &header(b'0', "file"),
        "x",
        &[
            ("SCHILY.xattr.user.text", b"value"),
            ("SCHILY.xattr.security.capability", &CAPABILITY),
            ("SCHILY.xattr.user.bytes", b"\n=\xff"),
        ],
    );
    add("Go: attributes", attributes);

    let large = Tar::default().with_records(
        &header(b'0', "file"),
        "x",
        &[
            ("uid", b"3000000"),
            ("gid", b"3000001"),
            ("uname", b"nobody-knows"),
            ("gname", "ümläut".as_bytes()),
        ],
    );
    add("Go: owners that fit into no octal field", large);

    let global = Tar::default()
        .records(b'g', "pax_global_header", &[("comment", b"0123456789abcdef")])
        .dir("dir/")
        .file("dir/file", "behind a global header");
    add("Go: a global header", global);

    let long_gnu = "g".repeat(180);
    let mut name = long_gnu.clone().into_bytes();
    name.push(0);
    let gnu = |kind, name: &str| Header { magic: GNU, mtime: 0, mode: 0, ..header(kind, name) };
    let mut owned = Header { magic: GNU, ..header(b'0', "owned") }.block(1);
    for at in [108, 116] {
        // Base 256: the first bit says so.
        owned[at..at + 8].copy_from_slice(&(0x8000_0000_0000_0000_u64 | 3_000_000).to_be_bytes());
    }
    let gnu_tar = Tar::default()
        .member(&gnu(b'L', "././@LongLink"), &name)
        .member(&Header { magic: GNU, name: long_gnu[..100].to_owned(), ..header(b'0', "") }, b"long")
        .raw(owned, b"x");
    add("Go: the GNU format", gnu_tar);
}

fn by_hand(add: &mut dyn FnMut(&'static str, Tar)) {
    let records = Tar::default()
        .records(
            b'x',
            "x",
            &[
                ("path", b"never"),
                ("mtime", b"1"),
                ("VENDOR.something", b"\n\n"),
                ("comment", b""),
                ("mtime", b"1600000001.25"),
                ("path", b"renamed"),
            ],
        )
        .file("original", "x")
        .file("next", "has no records");
    add("records in no order, of which the last counts", records);

    let two = Tar::default()
        .dir("dir/")
        .member(&Header { prefix: "dir", ..header(b'0', "file") }, b"prefixed")
        .file("./dir/dotted", "behind a dot");
    add("a prefix, and a dot in front", two);

    let mut spaces = header(b'0', "spaces").block(5);
    put(&mut spaces[100..108], b"   644 \0");
    put(&mut spaces[108..116], b"     7 \0");
    put(&mut spaces[116..124], b"     6 \0");
    put(&mut spaces[124..136], b"          5 ");
    put(&mut spaces[136..148], b"13737357000 ");
    add("numbers behind spaces", Tar::default().raw(spaces, b"12345"));

    let mut full = header(b'0', "full").block(5);
    put(&mut full[124..136], b"000000000005");
    put(&mut full[136..148], b"013737357000");
    add("numbers without an end", Tar::default().raw(full, b"12345"));

    let old = |name: &str| Header { magic: V7, ..header(0, name) };
    let v7 = Tar::default()
        .member(&Header { mode: 0o700, ..old("dir/") }, b"")
        .member(&old("dir/file"), b"of 1979")
        .member(&Header { link: "dir/file", kind: b'1', ..old("hard") }, b"");
    add("a directory that is one by its slash alone", v7);

    let contiguous = Tar::default().member(&header(b'7', "contiguous"), b"a file like any other");
    add("a contiguous file", contiguous);

    let again = Tar::default()
        .file("file", "first")
        .link(b'1', "hard", "file")
        .file("file", "second")
        .link(b'2', "link", "first")
        .link(b'2', "link", "second");
    add("members that come twice", again);
}

/// Stacks of layers with whiteouts, lowest first.
pub(crate) fn stacks() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let lower = || {
        Tar::default()
            .dir("d/")
            .file("d/a", "a")
            .file("d/b", "b")
            .dir("d/e/")
            .file("d/e/f", "f")
            .link(b'2', "d/link", "a")
            .file("kept", "kept")
            .link(b'1', "hard", "kept")
            .end()
    };
    let file_and_dir =
        Tar::default().dir("d/").file("d/.wh.a", "").file("d/.wh.e", "").file("d/.wh.link", "");
    let one_of_two = Tar::default().file(".wh.kept", "").file("new", "new");
    let first = Tar::default().dir("d/").file("d/.wh..wh..opq", "").file("d/c", "c");
    let last = Tar::default().dir("d/").file("d/c", "c").file("d/.wh..wh..opq", "");
    let other_kind = Tar::default().dir("d/").dir("d/a/").file("d/a/inside", "x").link(b'2', "d/e", "a");
    let back = || Tar::default().dir("d/").file("d/a", "again").end();
    vec![
        ("names that go", vec![lower(), file_and_dir.end()]),
        ("one of two names goes", vec![lower(), one_of_two.end()]),
        ("an opaque directory, said first", vec![lower(), first.end()]),
        ("an opaque directory, said last", vec![lower(), last.end()]),
        ("files become directories and links", vec![lower(), other_kind.end()]),
        ("what went comes back", vec![lower(), Tar::default().dir("d/").file("d/.wh.a", "").end(), back()]),
        ("a whiteout of nothing", vec![lower(), Tar::default().file(".wh.nothing", "").end()]),
    ]
}
