//! Power cuts: the machine is killed while kiln works, and started again.
//!
//! What the machine had in its memory is gone, and so is what its disk had in its write cache
//! ([`super::disk`]). After each cut the store has to be sound, what names lead to has to be whole, and
//! the same commands have to make what they always make.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::boot::{Accelerator, Boot};
use super::disk::{Random, Served};
use super::image::{self, Image};
use super::payload::Payload;
use crate::bases::Bases;
use crate::step::{self, Failure};

/// How long a boot and what is looked at after it may take.
const BOOT: Duration = Duration::from_secs(240);
/// The power goes at most so long after the work began.
const WORK_MS: u64 = 6000;

/// Looks at the store, says `ready`, and works until the power goes. Lines that begin with `WRONG` are
/// violations.
const SCRIPT: &str = r#"
work=/var/tmp/work; mkdir -p $work/context/d /store; cd $work
wrong() { echo "WRONG $*"; }
mount -t ext4 /dev/vdc /store || wrong "the file system cannot be mounted"
printf 'FROM base\nARG V\nCOPY . /context/\nRUN --network=none echo $V > /made && touch -d @7 /made\n\
RUN --network=none for n in 1 2 3 4 5 6 7 8; do cp /bin/busybox /b$n; touch -d @7 /b$n; done; touch -d @7 /\n' > context/Dockerfile
seq 1 200000 > context/d/large; echo a > context/a
find context -exec touch -d @5 {} +
# Not imported: that would be an image of another time in each store.
mkdir base && cp "$BASE" base/tree.tar && printf 'FROM scratch\nADD tree.tar /\nENV PATH=/bin\nCMD ["sh"]\n' > base/Dockerfile
touch -d @5 base/tree.tar
base() { kiln build --build-arg SOURCE_DATE_EPOCH=0 -t base base > out 2>&1; }
build() { kiln build --progress plain --build-arg SOURCE_DATE_EPOCH=0 --build-arg V=$1 -t app context > out 2>&1 || { wrong "build $1: $(cat out)"; return; }
  id=$(sed -n 's/^image \([^,]*\).*/\1/p' out); eval "golden=\$golden$1"
  if [ -z "$golden" ]; then eval "golden$1=\$id"; echo "golden $1 $id"; elif [ "$id" != "$golden" ]; then wrong "build $1 made $id, not $golden"; fi; }
sound() { kiln fsck --deep > out 2>&1 || wrong "$1: fsck: $(cat out)"; }

# Most of what is lost should be lost on the way to the disk and in its cache, in any order, not in memory.
echo 20 > /proc/sys/vm/dirty_writeback_centisecs; echo 20 > /proc/sys/vm/dirty_expire_centisecs
# What is right is found out beside the store.
export KILN_ROOT=$work/right
base || wrong "base: $(cat out)"
for v in 0 1; do build $v; done
kiln save -o $work/app.tar app || wrong "save"

export KILN_ROOT=/store/kiln
if [ -e /store/kiln ]; then
  sound "after the cut"
  kiln images --no-trunc > out 2>&1 || wrong "images: $(cat out)"
  awk 'NR > 1 && $1 != "<none>" { print $1 ":" $2, $3 }' out > names
  while read -r name id; do
    case $name in
      base:*) ;;
      *) case " $golden0 $golden1 " in *" $id "*) ;; *) wrong "$name leads to $id" ;; esac ;;
    esac
    kiln run --rm --network none $name true < /dev/null > out 2>&1 || wrong "run $name: $(cat out)"
    kiln save -o /store/saved.tar $name > out 2>&1 || wrong "save $name: $(cat out)"
  done < names
  echo "names $(wc -l < names)"
fi
kiln inspect base > /dev/null 2>&1 || base || wrong "base: $(cat out)"
build 0; sound "after the build"
echo ready
n=$SEED
while :; do
  n=$(( (n * 1103515245 + 12345) % 2147483648 )); pick=$(( n / 65536 % 8 )); v=$(( n / 1048576 % 2 ))
  case $pick in
    0|1|2) build $v; what="build $v" ;;
    3) kiln tag app kept:$v > out 2>&1 || wrong "tag: $(cat out)"; what="tag $v" ;;
    4) kiln save -o /store/saved.tar app > out 2>&1 || wrong "save: $(cat out)"; what=save ;;
    5) kiln load -i $work/app.tar > out 2>&1 || wrong "load: $(cat out)"; what=load ;;
    6) kiln gc --keep-duration 0s > out 2>&1 || wrong "gc: $(cat out)"; what=gc ;;
    7) kiln run --rm --network none base true < /dev/null > out 2>&1 || wrong "run: $(cat out)"; what=run ;;
  esac
  echo "did $what"
done
"#;

/// Cuts the power so often.
///
/// # Errors
/// When something is wrong after a cut, or the machine does not start.
pub(super) fn run(
    image: &Image,
    bases: &Bases,
    scratch: &Path,
    accelerator: Accelerator,
    cuts: u32,
    seed: Option<u64>,
) -> Result<(), Failure> {
    let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(1, |since| u64::from(since.subsec_nanos()));
    let seed = seed.unwrap_or_else(now);
    step::heading("kiln for it", "");
    step::show(step::cargo().args(["build", "-p", "kiln"]))?;
    let kiln = step::target_dir()?.join("debug/kiln");
    let disk = scratch.join("store.raw");
    let empty = scratch.join("empty");
    fs::create_dir(&empty).map_err(Failure::io("create", &empty))?;
    image::file_system(&empty, &disk, "3G")?;
    let mut load = Payload::new(&scratch.join("payload"))?;
    load.bases(bases)?;
    load.kiln(&kiln)?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let program = kiln.parent().map(quoted).unwrap_or_default();
    let script = format!(
        "export BASE={} SEED={}\nPATH={program}:$PATH\n{SCRIPT}",
        quoted(&bases.busybox),
        seed % (1 << 31)
    );
    let payload = scratch.join("payload.raw");
    load.disk(&script, &payload)?;

    step::heading("Power cuts", &format!("{cuts} of them, seed {seed}; --seed repeats their moments"));
    let mut random = Random::of(seed);
    let mut story = Story::default();
    for cut in 0..=cuts {
        let served = Served::start(&disk, &scratch.join("disk.socket"))?;
        let machine =
            Boot { image, payload: &payload, disk: Some(&served.socket), scratch, accelerator }.start()?;
        while !story.read(machine.line(accelerator.patience(BOOT))?) {
            if story.over {
                return Err(machine.failure("the machine went off by itself".to_owned()));
            }
        }
        let ready = machine.uptime();
        // After the last cut it is only looked at.
        let work = if cut < cuts {
            accelerator.patience(Duration::from_millis(random.below(WORK_MS)))
        } else {
            Duration::ZERO
        };
        for line in machine.lines_for(work) {
            story.read(Some(line));
        }
        machine.cut();
        let kept = [0, 0, 50, 90][usize::try_from(random.below(4)).unwrap_or(0)];
        let lost = served.cut(kept, &mut random)?;
        step::note(&format!(
            "boot {}: looked at after {}, worked {}: {}; {lost} unflushed blocks lost",
            cut + 1,
            super::spoken(ready),
            super::spoken(work),
            story.take_done(),
        ));
    }
    if story.wrong.is_empty() {
        step::note(&format!("{cuts} cuts, no violation"));
        return Ok(());
    }
    let kept = step::target_dir()?.join("vm/power.raw");
    fs::rename(&disk, &kept).map_err(Failure::io("keep", &disk))?;
    let wrong = story.wrong.join("\n");
    Err(Failure::Machine { what: format!("seed {seed}; the disk is kept in {}\n{wrong}", kept.display()) })
}

/// What the machine said.
#[derive(Debug, Default)]
struct Story {
    wrong: Vec<String>,
    done: Vec<String>,
    golden: Vec<String>,
    over: bool,
}

impl Story {
    /// Whether this line says that the work begins.
    fn read(&mut self, line: Option<String>) -> bool {
        let Some(line) = line else {
            self.over = true;
            return false;
        };
        if let Some(what) = line.strip_prefix("did ") {
            self.done.push(what.to_owned());
        } else if line.starts_with("golden ") {
            let number = line.rsplit_once(' ').map_or("", |(number, _)| number);
            let known = self.golden.iter().find(|known| known.starts_with(number));
            if let Some(known) = known.filter(|known| **known != line) {
                self.wrong.push(format!("another boot, another image: {line}, not {known}"));
            }
            self.golden.push(line);
        } else if line.starts_with("WRONG ") {
            step::warn(&format!("   {line}"));
            self.wrong.push(line);
        } else if line != "ready" {
            step::note(&line);
        } else {
            return true;
        }
        false
    }

    fn take_done(&mut self) -> String {
        let done = std::mem::take(&mut self.done);
        if done.is_empty() { "nothing ended".to_owned() } else { done.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_between_boots_is_a_violation() {
        let mut story = Story::default();
        let mut say = |line: &str| story.read(Some(line.to_owned()));
        assert!(!say("golden 0 sha256:a") && !say("golden 1 sha256:b") && say("ready"));
        assert!(!say("did gc") && !say("golden 0 sha256:a") && !say("golden 1 sha256:c"));
        assert_eq!(story.wrong, ["another boot, another image: golden 1 sha256:c, not golden 1 sha256:b"]);
        assert_eq!((story.take_done().as_str(), story.over), ("gc", false));
        assert!(!story.read(None) && story.over);
    }
}
