//! What each step of the Dockerfile reads, and so which ones have to run. Shares no code with kiln.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// All that is below a directory, by path.
pub(super) type Listing = BTreeMap<String, Node>;

/// What stands at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    /// Equal for hard links of one file.
    inode: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Dir,
    File(Vec<u8>),
    Link(Vec<u8>),
}

/// Reads everything below `top`; `top` itself is the empty path.
pub(super) fn list(top: &Path) -> Listing {
    let mut found = Listing::new();
    let mut open = vec![String::new()];
    while let Some(path) = open.pop() {
        let at = top.join(&path);
        let stat = fs::symlink_metadata(&at).unwrap_or_else(|error| panic!("{}: {error}", at.display()));
        let kind = if stat.is_dir() {
            let names = fs::read_dir(&at).expect("a directory");
            let names =
                names.map(|entry| entry.expect("it is there").file_name().into_string().expect("text"));
            open.extend(names.map(|name| if path.is_empty() { name } else { format!("{path}/{name}") }));
            Kind::Dir
        } else if stat.is_symlink() {
            Kind::Link(fs::read_link(&at).expect("a link").as_os_str().as_bytes().to_vec())
        } else {
            Kind::File(fs::read(&at).expect("a file"))
        };
        let owner = (stat.uid(), stat.gid());
        found.insert(path, Node { kind, mode: stat.mode() & 0o7777, owner, inode: stat.ino() });
    }
    found
}

/// Steps of the final stage, but for the first ones of each stage: any order is a Dockerfile.
pub(super) const COPIES: [&str; 7] = [
    "COPY src/*.txt /texts/",
    "COPY --exclude=*.md lib /lib",
    "COPY --from=run /sum* /",
    "COPY --parents lib/*/keep.txt /p/",
    "COPY . /all",
    LINKED,
    "COPY --from=made /s/sub /from/",
];
const LINKED: &str = "COPY --link lib /linked/";
/// Shows names, modes and content of files in front, and the directory's own mode; what is deeper it mounts
/// and does not look at.
const SUM: &str = "RUN --network=none --mount=type=bind,source=bound,target=/b [\"/bin/busybox\", \"sh\", \"-c\", \
     \"cd /b && for f in *; do if ! busybox test -L $f && busybox test -f $f; then busybox stat -c '%n %a' $f; busybox cat $f; fi; done > /sum; \
     busybox stat -c %a . >> /sum\"]";
const AGAIN: &str = "RUN --network=none [\"/bin/busybox\", \"cp\", \"/sum\", \"/sum2\"]";

pub(super) fn dockerfile(order: &[&str]) -> String {
    let last = order.join("\n");
    format!(
        "FROM scratch AS made\nCOPY src /s\nFROM scratch AS run\nCOPY tools/busybox /bin/busybox\n\
         {SUM}\n{AGAIN}\nFROM scratch\n{last}\n"
    )
}

/// What the context's `.dockerignore` says; [`is_ignored`] says the same.
pub(super) const IGNORE: &str = "ignored\n*.log\n";

fn is_ignored(path: &str) -> bool {
    let top = path.split('/').next().unwrap_or_default();
    top == "ignored" || top.ends_with(".log")
}

/// Everything that a store has seen.
#[derive(Default)]
pub(super) struct Model {
    seen: HashSet<String>,
    /// What a command made when it was run last on what it stands on, and the name of that.
    last: HashMap<String, (String, String)>,
    /// Results of commands by what they were made from.
    made: HashMap<String, (String, String)>,
}

impl Model {
    /// The steps that a build of this context runs, by their titles.
    pub(super) fn build(&mut self, order: &[&str], context: &Listing) -> Vec<String> {
        let mut ran = Vec::new();
        let seen: Listing = context
            .iter()
            .filter(|(path, _)| !is_ignored(path))
            .map(|(p, n)| (p.clone(), n.clone()))
            .collect();
        self.copy(&mut ran, "COPY src /s", "", &below(&seen, "src", |_| true));
        let busybox = self.copy(&mut ran, "COPY tools/busybox /bin/busybox", "", "always the same");
        let bound = format!("{:o} {}", seen["bound"].mode, below(&seen, "bound", |_| true));
        let shown = sum(&seen);
        let summed = self.run(&mut ran, "/sum", SUM, &busybox, &bound, &shown);
        self.run(&mut ran, "/sum2", AGAIN, &summed, "", &shown);
        let mut on = String::new();
        for step in order {
            on = match *step {
                "COPY src/*.txt /texts/" => {
                    let names = seen.keys().filter_map(|path| path.strip_prefix("src/"));
                    let texts = names.filter(|name| !name.contains('/') && name.ends_with(".txt"));
                    // Each match is copied by itself.
                    let read: Vec<String> =
                        texts.map(|name| below(&seen, "src", |path| path == name)).collect();
                    self.copy(&mut ran, step, &on, &read.join("|"))
                }
                "COPY --exclude=*.md lib /lib" => {
                    let is_in = |path: &str| !path.split('/').next().unwrap_or_default().ends_with(".md");
                    self.copy(&mut ran, step, &on, &below(&seen, "lib", is_in))
                }
                "COPY --from=run /sum* /" => self.copy(&mut ran, step, &on, &shown),
                "COPY --parents lib/*/keep.txt /p/" => {
                    let kept = |path: &str| {
                        let parts: Vec<&str> = path.split('/').collect();
                        matches!(parts.as_slice(), ["lib", _, "keep.txt"])
                    };
                    let taken: Vec<&str> =
                        seen.keys().map(String::as_str).filter(|path| kept(path)).collect();
                    let is_in = |path: &str| {
                        let above = format!("{path}/");
                        taken.iter().any(|taken| *taken == path || taken.starts_with(&above))
                    };
                    self.copy(&mut ran, step, &on, &below(&seen, "", is_in))
                }
                "COPY . /all" => self.copy(&mut ran, step, &on, &below(&seen, "", |_| true)),
                LINKED => {
                    let linked = self.copy(&mut ran, step, "", &below(&seen, "lib", |_| true));
                    // On nothing it is the whole tree already.
                    let title = format!("{step} (link)");
                    if on.is_empty() { linked } else { self.copy(&mut ran, &title, &on, &linked) }
                }
                "COPY --from=made /s/sub /from/" => {
                    self.copy(&mut ran, step, &on, &below(&seen, "src/sub", |_| true))
                }
                other => panic!("{other} has no model"),
            };
        }
        ran
    }

    /// A copy's result is named by what it was made from.
    fn copy(&mut self, ran: &mut Vec<String>, title: &str, on: &str, reads: &str) -> String {
        let name = hash(&[title, on, reads]);
        if self.seen.insert(name.clone()) {
            ran.push(title.to_owned());
        }
        name
    }

    /// A command that makes again what it made the last time on the same files made the same result.
    fn run(
        &mut self,
        ran: &mut Vec<String>,
        at: &str,
        title: &str,
        on: &str,
        reads: &str,
        makes: &str,
    ) -> String {
        let key = hash(&[title, on, reads]);
        if let Some((_, name)) = self.made.get(&key) {
            return name.clone();
        }
        ran.push(title.to_owned());
        let place = hash(&[at, on]);
        let name = match self.last.get(&place) {
            Some((made, name)) if made == makes => name.clone(),
            _ => key.clone(),
        };
        self.last.insert(place, (makes.to_owned(), name.clone()));
        self.made.insert(key, (makes.to_owned(), name.clone()));
        name
    }
}

/// What [`SUM`] writes, as far as it can differ.
fn sum(seen: &Listing) -> String {
    let files = seen.iter().filter_map(|(path, node)| {
        let name = path.strip_prefix("bound/").filter(|name| !name.contains('/'))?;
        matches!(node.kind, Kind::File(_)).then(|| format!("{name} {:o} {:?}", node.mode, node.kind))
    });
    format!("{:o} {}", seen["bound"].mode, files.collect::<Vec<_>>().join("\n"))
}

/// What a copy of the directory `top` takes: all that `is_in` says, which sees paths below it.
fn below(seen: &Listing, top: &str, is_in: impl Fn(&str) -> bool) -> String {
    let prefix = if top.is_empty() { String::new() } else { format!("{top}/") };
    let taken = seen.iter().filter_map(|(path, node)| {
        let relative = path.strip_prefix(&prefix).filter(|relative| !relative.is_empty())?;
        is_in(relative).then_some((relative, node))
    });
    describe(taken, false)
}

/// One line for each, with hard links told by the first path.
pub(super) fn describe<'n>(nodes: impl Iterator<Item = (&'n str, &'n Node)>, owners: bool) -> String {
    let mut first: HashMap<u64, &str> = HashMap::new();
    let mut text = String::new();
    for (path, node) in nodes {
        let line = match &node.kind {
            Kind::Dir => format!("{:o} directory", node.mode),
            Kind::Link(target) => format!("-> {}", target.escape_ascii()),
            Kind::File(content) => match first.insert(node.inode, path) {
                Some(earlier) => {
                    first.insert(node.inode, earlier);
                    format!("= {earlier}")
                }
                None => format!(
                    "{:o} {} {}",
                    node.mode,
                    content.len(),
                    hash(&[&content.escape_ascii().to_string()])
                ),
            },
        };
        let owner = if owners { format!("{:?}", node.owner) } else { String::new() };
        text.push_str(&format!("{path} {line} {owner}\n"));
    }
    text
}

fn hash(parts: &[&str]) -> String {
    let framed: String = parts.iter().map(|part| format!("{}:{part}", part.len())).collect();
    kiln_oci::Digest::of(framed.as_bytes()).to_string()
}
