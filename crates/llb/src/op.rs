//! What a vertex does.

use kiln_oci::{Digest, Reference};

/// Position in a vertex's list of inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InputIndex(pub usize);

/// What a vertex does. Each op has one output: a file tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Brings a tree from outside.
    Source(Source),
    /// Runs a process on a tree.
    Exec(Exec),
    /// Changes files of a tree.
    File(File),
}

/// A tree from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An image's merged layers.
    Image(SourceImage),
    /// A directory of the client.
    Local(Local),
}

/// An image by what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceImage {
    /// The name it was asked for by; for messages, outside the digest.
    pub reference: Reference,
    /// Digest of the image config it resolved to.
    pub config: Digest,
}

/// A directory of the client, read lazily: only what a copy asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Which directory: `context`.
    pub name: String,
    /// `.dockerignore` lines as they stand in the file, checked by the frontend.
    pub ignore: Vec<String>,
}

/// Runs a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The tree it runs on; `None`: an empty one.
    pub base: Option<InputIndex>,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Environment in order, later names win.
    pub env: Vec<(String, String)>,
    /// Absolute working directory.
    pub cwd: String,
    /// `user[:group]`, names looked up in the tree; `None`: root.
    pub user: Option<String>,
    /// What network it sees.
    pub network: Network,
}

/// What network a process sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Its own, with address translation to the outside.
    Default,
    /// Loopback only.
    None,
    /// The host's.
    Host,
}

/// Changes files of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// The tree it starts from; `None`: an empty one.
    pub base: Option<InputIndex>,
    /// Done in order, one layer in all.
    pub actions: Vec<FileAction>,
}

/// One change of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileAction {
    /// `COPY` and `ADD`.
    Copy(Copy),
    /// `WORKDIR`.
    Mkdir(Mkdir),
}

/// Copies from an input's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// The tree the files come from.
    pub from: InputIndex,
    /// Paths or patterns below that tree's root (Go's `filepath.Match` per component), clipped
    /// and cleaned: no leading `/`, no `..`; `.` or empty is the root itself.
    pub sources: Vec<String>,
    /// Absolute, cleaned path inside.
    pub destination: String,
    /// Written with a trailing slash, or several sources: files go *into* it.
    pub destination_is_dir: bool,
    /// Owner of what is copied and of directories made on the way.
    pub owner: Owner,
    /// Unpack archives found among the sources (`ADD`).
    pub unpack: bool,
}

/// Who owns what is copied or made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// As in the source tree (`COPY --from`).
    Keep,
    /// 0:0 (files of a build context).
    Root,
    /// `user[:group]`, names looked up in the base tree (`--chown`).
    Named(String),
}

/// Makes a directory and its parents; an existing one is left alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mkdir {
    /// Absolute, cleaned path.
    pub path: String,
    /// Permission bits of directories that are made.
    pub mode: u32,
    /// `user[:group]` of directories that are made; `None`: root.
    pub owner: Option<String>,
}

/// One named part of an op's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// What it is: `args`, `env`, `destination`, …
    pub name: String,
    /// Its value, as bytes for hashing and as text for explanations.
    pub value: String,
}

fn component(name: impl Into<String>, value: impl Into<String>) -> Component {
    Component { name: name.into(), value: value.into() }
}

impl Op {
    /// Everything that identifies this op, inputs apart, in a fixed order.
    ///
    /// Fields are taken apart without `..`, so that a new field does not compile until somebody
    /// decided whether it belongs to the identity.
    pub fn components(&self) -> Vec<Component> {
        match self {
            Op::Source(Source::Image(SourceImage { reference: _, config })) => {
                vec![component("op", "source.image"), component("config", config.to_string())]
            }
            Op::Source(Source::Local(Local { name, ignore })) => {
                let mut out = vec![component("op", "source.local"), component("name", name)];
                out.extend(ignore.iter().map(|line| component("ignore", line)));
                out
            }
            Op::Exec(exec) => exec.components(),
            Op::File(File { base, actions }) => {
                let mut out = vec![component("op", "file"), component("base", slot(*base))];
                for action in actions {
                    match action {
                        FileAction::Copy(copy) => copy.components(&mut out),
                        FileAction::Mkdir(Mkdir { path, mode, owner }) => {
                            out.push(component("mkdir", path));
                            out.push(component("mode", format!("{mode:o}")));
                            out.push(component("owner", owner.as_deref().unwrap_or("")));
                        }
                    }
                }
                out
            }
        }
    }
}

impl Exec {
    fn components(&self) -> Vec<Component> {
        let Exec { base, args, env, cwd, user, network } = self;
        let mut out = vec![component("op", "exec"), component("base", slot(*base))];
        out.extend(args.iter().map(|arg| component("arg", arg)));
        // The name stands in the value: `A=B=C` must not meet `A` `B=C` half-way.
        out.extend(env.iter().map(|(name, value)| component(format!("env {name}"), value)));
        out.push(component("cwd", cwd));
        out.push(component("user", user.as_deref().unwrap_or("")));
        out.push(component(
            "network",
            match network {
                Network::Default => "default",
                Network::None => "none",
                Network::Host => "host",
            },
        ));
        out
    }
}

impl Copy {
    fn components(&self, out: &mut Vec<Component>) {
        let Copy { from, sources, destination, destination_is_dir, owner, unpack } = self;
        out.push(component("copy from", from.0.to_string()));
        // A name matters only where it becomes part of the destination; the digest of what was
        // selected carries names, so identical content elsewhere in the source still matches.
        out.push(component("sources", sources.len().to_string()));
        out.extend(sources.iter().map(|source| component("source", source)));
        out.push(component("destination", destination));
        out.push(component("into", destination_is_dir.to_string()));
        out.push(match owner {
            Owner::Keep => component("owner", "keep"),
            Owner::Root => component("owner", "root"),
            Owner::Named(name) => component("owner named", name),
        });
        out.push(component("unpack", unpack.to_string()));
    }
}

fn slot(index: Option<InputIndex>) -> String {
    index.map_or_else(|| "none".to_owned(), |InputIndex(i)| i.to_string())
}
