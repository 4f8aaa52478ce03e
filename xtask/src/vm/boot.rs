//! One boot: qemu with the machine's disk, a disk with what to do, and a line back.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::image::Image;
use crate::packages;
use crate::step::{self, Failure};

/// The word before the exit code of the job.
pub(super) const END: &str = "kiln-machine-exit ";

const MEMORY_MIB: u32 = 4096;

/// What the machine gets beside its own disk.
pub(super) struct Boot<'a> {
    pub(super) image: &'a Image,
    /// A raw disk with `job`, a shell script, at `/payload`; never written to.
    pub(super) payload: &'a Path,
    /// A disk behind a socket that speaks NBD: `/dev/vdc`.
    pub(super) disk: Option<&'a Path>,
    pub(super) accelerator: Accelerator,
    /// For the console's log and what qemu writes for itself.
    pub(super) scratch: &'a Path,
}

/// A machine that runs. It ends with this value, or with this process, whatever ends that.
pub(super) struct Machine {
    child: Child,
    lines: Receiver<String>,
    console: PathBuf,
    started: Instant,
}

/// Who runs the machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor.
    Kvm,
    /// qemu, some ten to twenty times slower.
    Tcg,
}

impl Accelerator {
    /// What works here. There are hosts, virtual machines themselves, whose `/dev/kvm` opens and runs an
    /// ordinary kernel slower than an emulator does: it has to say something within seconds.
    pub(super) fn find(image: &Image, scratch: &Path) -> Result<Self, Failure> {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            step::warn("NO /dev/kvm: the machine is emulated, some ten times slower");
            return Ok(Accelerator::Tcg);
        }
        let trial = Boot { image, payload: &image.disk, disk: None, scratch, accelerator: Accelerator::Kvm };
        let machine = trial.start()?;
        while machine.uptime() < TRIAL {
            if fs::metadata(&machine.console).is_ok_and(|file| file.len() > 1000) {
                return Ok(Accelerator::Kvm);
            }
            if let Ok(line) = machine.lines.recv_timeout(Duration::from_millis(50)) {
                step::note(&line);
            }
        }
        step::warn(
            "/dev/kvm IS THERE AND DOES NOT RUN A KERNEL: the machine is emulated, some ten times slower",
        );
        Ok(Accelerator::Tcg)
    }

    fn arguments(self) -> [&'static str; 3] {
        match self {
            // Inside another machine, this one register may be refused, and ends qemu.
            Accelerator::Kvm => ["kvm", "-cpu", "host,-arch-capabilities"],
            Accelerator::Tcg => ["tcg,thread=multi,tb-size=256", "-cpu", "max"],
        }
    }

    /// A limit of time for a machine of this kind.
    pub(super) fn patience(self, limit: Duration) -> Duration {
        if self == Accelerator::Kvm { limit } else { limit * 4 }
    }
}

/// In which a kernel says its first words, many times over.
const TRIAL: Duration = Duration::from_secs(8);

impl Boot<'_> {
    /// Starts the machine.
    pub(super) fn start(&self) -> Result<Machine, Failure> {
        let console = self.scratch.join("console.log");
        // That of an earlier boot says nothing about this one.
        let _ = fs::remove_file(&console);
        // The kernel kills qemu when we die; a signal from the terminal reaches both.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-display", "none"]);
        command.args(["-no-reboot", "-sandbox", "on", "-accel"]).args(self.accelerator.arguments());
        command.args(["-machine", "q35", "-smp", "2", "-m", &MEMORY_MIB.to_string()]);
        command.arg("-kernel").arg(&self.image.kernel).arg("-initrd").arg(&self.image.initrd);
        // Nobody needs the protections of a processor that it shares with itself.
        let line = "root=/dev/vda rw console=ttyS0 earlyprintk=ttyS0 net.ifnames=0 mitigations=off panic=-1 loglevel=5 \
                    systemd.show_status=0 systemd.mask=systemd-networkd-wait-online.service";
        command.args(["-append", line]);
        for disk in [&self.image.disk, self.payload] {
            let file = format!("file={},format=raw,if=virtio,snapshot=on,cache=unsafe", escaped(disk));
            command.args(["-drive", &file]);
        }
        if let Some(socket) = self.disk {
            let file = format!("file=nbd:unix:{},format=raw,if=virtio,discard=ignore", escaped(socket));
            command.args(["-drive", &file]);
        }
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial"]);
        // Not `stdio`: with nothing to read there, the machine would find nobody listening.
        command.args(["-chardev", "file,id=back,path=/dev/fd/1"]);
        command.args(["-device", "virtserialport,chardev=back,name=back"]);
        // Where qemu keeps what the machine writes to disks that must not change.
        command.env("TMPDIR", self.scratch);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(step::spawn_failure(&command))?;
        let (sender, lines) = channel();
        let pipes: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|pipe| Box::new(pipe) as _),
            child.stderr.take().map(|pipe| Box::new(pipe) as _),
        ];
        for pipe in pipes.into_iter().flatten() {
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Machine { child, lines, console, started: Instant::now() })
    }
}

/// A comma ends an option of qemu's, unless there are two.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Machine {
    /// The next line; `None` when the machine is off.
    ///
    /// # Errors
    /// [`Failure::Machine`] when there is none until `limit` after the start.
    pub(super) fn line(&self, limit: Duration) -> Result<Option<String>, Failure> {
        let left = limit.saturating_sub(self.started.elapsed());
        match self.lines.recv_timeout(left) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                Err(self.failure(format!("the machine was not done within {} s", limit.as_secs())))
            }
        }
    }

    /// All lines that come within `time`.
    pub(super) fn lines_for(&self, time: Duration) -> Vec<String> {
        let until = Instant::now() + time;
        let next = || self.lines.recv_timeout(until.saturating_duration_since(Instant::now())).ok();
        std::iter::from_fn(next).collect()
    }

    /// How long it has been on.
    pub(super) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// A failure with the end of what the console said.
    pub(super) fn failure(&self, what: String) -> Failure {
        let text = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let last = lines[lines.len().saturating_sub(15)..].join("\n");
        Failure::Machine { what: format!("{what}; its console ended with:\n{last}") }
    }

    /// Takes the power away.
    pub(super) fn cut(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Fails, naming who can help, unless a machine can be started here.
pub(super) fn check_host() -> Result<(), Failure> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Failure::Machine { what: "the machine is an x86-64 one, and this is none".to_owned() });
    }
    packages::ensure(&[packages::DEMO, packages::MACHINE])
}
