//! What a container costs beside its program: alone, in a row, side by side.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Row, sample, table};
use crate::bases::Bases;
use crate::demo::Kiln;
use crate::packages;
use crate::peers::Peer;
use crate::step::{self, Failure};

const STARTS: usize = 31;
const ROUNDS: usize = 7;
/// Side by side.
const AT_ONCE: usize = 16;

/// Somebody who runs `true` in a container: a row's name, and the command.
struct Runner<'a> {
    name: String,
    command: Box<dyn Fn(usize) -> Command + 'a>,
}

pub(super) fn run(kiln: &Kiln, peers: &[Peer], bases: &Bases, temp: &Path) -> Result<(), Failure> {
    let dir = temp.join("containers");
    fs::create_dir_all(&dir).map_err(Failure::io("create", &dir))?;
    let bundle = Bundle::make(&dir.join("bundle"), bases)?;
    let mut runners = Vec::new();
    let ours = |name: &str, flags: &'static [&'static str]| {
        let command = move |_| kiln.command(&[&["run", "--rm"], flags, &["busybox", "true"]].concat());
        Runner { name: name.to_owned(), command: Box::new(command) }
    };
    runners.push(ours("kiln, no network", &["--network", "none"]));
    runners.push(ours("kiln", &[]));
    runners.push(ours("kiln, 64 MiB of memory", &["--memory", "64m"]));
    // What the kernel takes for the namespaces alone: how slow this machine is.
    let bare = |_| {
        let mut command = Command::new("unshare");
        command.args(["--fork", "--pid", "--mount", "--ipc", "--uts", "--net", "chroot"]);
        command.arg(bundle.rootfs()).arg("/bin/true");
        command
    };
    runners.push(Runner { name: "unshare, chroot, no container".to_owned(), command: Box::new(bare) });
    for runtime in ["crun", "runc"] {
        if let Some(program) = packages::find_program(runtime) {
            runners.push(match runtime {
                "crun" => ours("kiln --runtime crun", &["--runtime", "crun"]),
                _ => ours("kiln --runtime runc", &["--runtime", "runc"]),
            });
            let bundle = &bundle;
            let command = move |nth| bundle.command(&program, nth);
            runners.push(Runner { name: format!("{runtime} alone"), command: Box::new(command) });
        }
    }
    for peer in peers {
        let words = |words: &[&str]| -> Vec<String> { words.iter().map(|word| (*word).to_owned()).collect() };
        if peer.name == "podman" {
            for network in ["none", "host"] {
                let line = words(&["run", "--rm", "--network", network, "busybox", "true"]);
                let name = format!("podman, network {network}");
                runners.push(Runner { name, command: Box::new(move |_| peer.command(&line)) });
            }
        } else {
            // A working container of its own for each that runs at once.
            let mut made = Vec::new();
            for _ in 0..AT_ONCE {
                let from = words(&["from", "--pull-never", "busybox"]);
                made.push(step::read(&mut peer.command(&from))?.trim().to_owned());
            }
            let command = move |nth: usize| {
                let container = &made[nth % AT_ONCE];
                let line = ["run", "--network", "host", "--runtime", "runc", container, "true"];
                peer.command(&line.map(str::to_owned))
            };
            runners.push(Runner { name: "buildah run".to_owned(), command: Box::new(command) });
        }
    }
    step::heading("Containers", "start to exit of `true`, alone and 16 at once");
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for Runner { name, command } in &runners {
        step::note(name);
        // The first one finds nothing ready; and crun refuses some machines.
        if !step::succeeds(&mut command(0)) {
            step::warn(&format!("{name} does not run here and is left out"));
            continue;
        }
        alone.push(Row { builder: name.clone(), times: sample(STARTS, || command(0))? });
        let times = (0..ROUNDS).map(|_| at_once(command)).collect::<Result<_, _>>()?;
        together.push(Row { builder: name.clone(), times });
    }
    drop(runners);
    println!("\n{}", table("Start to exit of `true` on busybox, ms", &alone, 1));
    println!("{}", table("16 containers of `true` at once, ms until the last has ended", &together, 1));
    let stages = stages(kiln, peers, &dir)?;
    println!("{}", table("16 stages of `RUN sleep 1` without a cache, joined, ms", &stages, 1));
    Ok(())
}

/// Starts all at once; how long until the last one has ended.
fn at_once(command: &dyn Fn(usize) -> Command) -> Result<Duration, Failure> {
    let begun = Instant::now();
    let mut running: Vec<(Command, Child)> = Vec::with_capacity(AT_ONCE);
    for nth in 0..AT_ONCE {
        let mut command = command(nth);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(step::spawn_failure(&command))?;
        running.push((command, child));
    }
    let mut failed = None;
    for (command, mut child) in running {
        if !child.wait().is_ok_and(|status| status.success()) {
            failed.get_or_insert(command);
        }
    }
    match failed {
        // Once more, alone, for what it says.
        Some(mut command) => step::read(&mut command).map(|_| begun.elapsed()),
        None => Ok(begun.elapsed()),
    }
}

/// A build of 16 stages that need nothing of each other, and one that needs them all.
pub(super) fn stages(kiln: &Kiln, peers: &[Peer], dir: &Path) -> Result<Vec<Row>, Failure> {
    step::heading("Stages", "16 stages of `RUN sleep 1`, joined: as long as one of them, and no longer");
    let context = dir.join("stages");
    fs::create_dir_all(&context).map_err(Failure::io("create", &context))?;
    let stage = |nth: usize| format!("FROM busybox AS s{nth}\nRUN sleep 1 && echo {nth} > /s{nth}\n");
    let join = |nth: usize| format!("COPY --from=s{nth} /s{nth} /\n");
    let text: String = (0..AT_ONCE).map(stage).chain(["FROM busybox\n".to_owned()]).collect();
    let text = text + &(0..AT_ONCE).map(join).collect::<String>();
    let dockerfile = context.join("Dockerfile");
    fs::write(&dockerfile, text).map_err(Failure::io("write", &dockerfile))?;
    let path = context.to_string_lossy();
    let tag = "kiln-bench-stages";
    let ours = || kiln.command(&["build", "--progress", "quiet", "--no-cache", "-t", tag, &path]);
    let mut rows = vec![Row { builder: "kiln".into(), times: sample(3, ours)? }];
    step::read(&mut kiln.command(&["rmi", "-f", tag]))?;
    for peer in peers {
        let build = || peer.build_with(&context, tag, &["--no-cache", "--jobs", "16"]);
        rows.push(Row { builder: format!("{} --jobs 16", peer.name), times: sample(3, build)? });
    }
    Ok(rows)
}

/// A bundle for runtimes alone: what `spec` of theirs makes, with `true` and no terminal.
struct Bundle {
    dir: PathBuf,
    hides_groups: bool,
}

/// Where a machine with both versions of control groups has the second.
const SECOND_VERSION: &str = "/sys/fs/cgroup/unified";

impl Bundle {
    fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    fn make(dir: &Path, bases: &Bases) -> Result<Self, Failure> {
        let made = Self { dir: dir.to_owned(), hides_groups: Path::new(SECOND_VERSION).exists() };
        let rootfs = made.rootfs();
        fs::create_dir_all(&rootfs).map_err(Failure::io("create", &rootfs))?;
        step::read(Command::new("tar").arg("-C").arg(&rootfs).arg("-xf").arg(&bases.busybox))?;
        let Some(runc) = packages::find_program("runc") else { return Ok(made) };
        step::read(Command::new(runc).arg("spec").arg("--bundle").arg(dir))?;
        let config = dir.join("config.json");
        let text = fs::read_to_string(&config).map_err(Failure::io("read", &config))?;
        // Both print it with a blank behind each colon.
        let text = text.replace("\"terminal\": true", "\"terminal\": false").replace("\"sh\"", "\"true\"");
        // Limits above those of this process need CAP_SYS_RESOURCE, and none are wanted.
        let text = match (text.find("\"rlimits\": ["), text.find("\"noNewPrivileges\"")) {
            (Some(from), Some(to)) if from < to => format!("{}{}", &text[..from], &text[to..]),
            _ => text,
        };
        fs::write(&config, text).map_err(Failure::io("write", &config))?;
        Ok(made)
    }

    fn command(&self, runtime: &Path, nth: usize) -> Command {
        let mut command = if self.hides_groups {
            // crun refuses both versions of control groups side by side: here it finds one.
            let mut wrapped = Command::new("unshare");
            let script = format!("umount -l {SECOND_VERSION}; exec \"$@\"");
            wrapped.args(["--mount", "sh", "-c", &script, "sh"]).arg(runtime);
            wrapped
        } else {
            Command::new(runtime)
        };
        command.arg("--root").arg(self.dir.join("state")).args(["run", "--bundle"]).arg(&self.dir);
        command.arg(format!("kiln-bench-{}-{nth}", std::process::id()));
        command
    }
}
