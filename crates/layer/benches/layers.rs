//! What applying a layer and writing one costs, beside GNU tar and umoci: `cargo bench -p kiln-layer`.
//!
//! Two layers: 50,000 files of 8 KiB, and one file of 1 GiB. Everything is on one file system, that of
//! the target directory or of `KILN_BENCH_DIR`, with a warm page cache; what is unpacked is removed
//! between two samples, and removal is not timed. Peers are whole processes.
//!
//! An ext4 file system makes files up to twenty times slower just after it has removed many: figures
//! that mean something come from a fresh one.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kiln_layer::{
    ApplyOptions, DiffOptions, Limits, Reading, TreeForm, Whiteouts, apply, bounded_decoder, diff,
};

const SAMPLES: usize = 3;

fn main() {
    // `cargo test --benches` builds this; only `cargo bench` wants figures.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let place = std::env::var_os("KILN_BENCH_DIR").map(PathBuf::from);
    let place = place.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR"))).join("layers");
    let _ = fs::remove_dir_all(&place);
    fs::create_dir_all(&place).expect("the target directory can be written");
    println!("| layer | work | by | median s | least s | most s |\n|---|---|---|--:|--:|--:|");
    for (name, fill) in
        [("50,000 files of 8 KiB", files as fn(&Path)), ("one file of 1 GiB", large as fn(&Path))]
    {
        measure(name, &place, fill);
    }
    let _ = fs::remove_dir_all(&place);
}

fn files(dir: &Path) {
    let mut content = vec![0; 8 << 10];
    let mut noise = Noise(1);
    for nth in 0..50_000 {
        let parent = dir.join(format!("dir{}", nth / 100));
        if nth % 100 == 0 {
            fs::create_dir(&parent).expect("ours");
        }
        noise.fill(&mut content[..2048]);
        fs::write(parent.join(format!("file{nth}")), &content).expect("ours");
    }
}

fn large(dir: &Path) {
    let mut file = File::create(dir.join("large")).expect("ours");
    let mut noise = Noise(2);
    let mut piece = vec![0; 1 << 20];
    for _ in 0..1024 {
        noise.fill(&mut piece[..256 << 10]);
        file.write_all(&piece).expect("ours");
    }
}

/// Bytes that do not compress (xorshift, G. Marsaglia 2003).
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
    }
}

fn measure(name: &str, place: &Path, fill: fn(&Path)) {
    let tree = place.join("tree");
    fs::create_dir(&tree).expect("ours");
    fill(&tree);
    let (tar, out) = (place.join("layer.tar"), place.join("out"));
    let row = |work: &str, by: &str, sample: &mut dyn FnMut()| {
        let mut times: Vec<Duration> = (0..SAMPLES)
            .map(|_| {
                let _ = fs::remove_dir_all(&out);
                fs::create_dir(&out).expect("ours");
                let start = Instant::now();
                sample();
                start.elapsed()
            })
            .collect();
        times.sort();
        let [least, middle, most] =
            [0, SAMPLES / 2, SAMPLES - 1].map(|nth| format!("{:.2}", times[nth].as_secs_f64()));
        println!("| {name} | {work} | {by} | {middle} | {least} | {most} |");
    };
    let never = AtomicBool::new(false);
    let write = |to: &mut dyn Write| {
        let options = DiffOptions { form: TreeForm::Plain, root_entry: false, cancel: &never };
        diff(File::open(&tree).expect("ours").as_fd(), to, &options).expect("it is a tree");
    };
    let unpack = |from: &Path| {
        let (whiteouts, limits) = (Whiteouts::Overlay, Limits::default());
        let options =
            ApplyOptions { whiteouts, keep_owner: true, limits, reading: Reading::Ahead, cancel: &never };
        let reader = BufReader::with_capacity(256 << 10, File::open(from).expect("ours"));
        let (_, plain) = bounded_decoder(reader, &Limits::default()).expect("it can be read");
        apply(plain, File::open(&out).expect("ours").as_fd(), &options).expect("it is a layer");
    };
    write(&mut File::create(&tar).expect("ours"));
    row("diff ID", "kiln", &mut || write(&mut io::sink()));
    row("diff ID", "GNU tar and sha256sum", &mut || {
        shell(&format!("tar --sort=name -C {} -cf - . | sha256sum", tree.display()));
    });
    row("write", "kiln", &mut || write(&mut File::create(out.join("layer.tar")).expect("ours")));
    row("write", "GNU tar", &mut || {
        shell(&format!("tar --sort=name -C {} -cf {}/layer.tar .", tree.display(), out.display()));
    });
    row("apply", "kiln", &mut || unpack(&tar));
    row("apply", "GNU tar", &mut || shell(&format!("tar -C {} -xpf {}", out.display(), tar.display())));
    row("apply", "GNU tar and sha256sum", &mut || {
        shell(&format!("tee >(sha256sum >&2) < {} | tar -C {} -xpf -", tar.display(), out.display()));
    });
    for (program, suffix) in [("gzip -1", "gz"), ("zstd -3 -q", "zst")] {
        let packed = place.join(format!("layer.tar.{suffix}"));
        shell(&format!("{program} -c {} > {}", tar.display(), packed.display()));
        row(&format!("apply {suffix}"), "kiln", &mut || unpack(&packed));
        row(&format!("apply {suffix}"), "GNU tar", &mut || {
            shell(&format!("tar -C {} -xpf {}", out.display(), packed.display()));
        });
    }
    if let Some(layout) = oci_layout(place, &tar) {
        row("apply", "umoci", &mut || {
            shell(&format!("umoci raw unpack --image {}:1 {}/bundle", layout.display(), out.display()));
        });
    }
    for left in [&tree, &out] {
        fs::remove_dir_all(left).expect("ours");
    }
}

/// An OCI layout of one image of this layer, as umoci wants it; `None` without umoci.
fn oci_layout(place: &Path, tar: &Path) -> Option<PathBuf> {
    if !Command::new("umoci").arg("--version").output().is_ok_and(|output| output.status.success()) {
        println!("| | | umoci is not installed | | | |");
        return None;
    }
    let layout = place.join("layout");
    let _ = fs::remove_dir_all(&layout);
    let (layout_name, tar) = (layout.display(), tar.display());
    shell(&format!(
        "umoci init --layout {layout_name} && umoci new --image {layout_name}:1 && \
         umoci raw add-layer --image {layout_name}:1 {tar}"
    ));
    Some(layout)
}

fn shell(line: &str) {
    let mut command = Command::new("bash");
    let output = command.args(["-ec", line]).output().expect("bash runs");
    let mut told = String::new();
    let _ = output.stderr.as_slice().read_to_string(&mut told);
    assert!(output.status.success(), "{line}: {told}");
}
