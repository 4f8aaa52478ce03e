//! What a vertex does.

use std::time::Duration;

use kiln_oci::image::{ImageConfig, RootFs};
use kiln_oci::{ChainId, Digest, Platform, Reference};

use crate::Mode;

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
    /// Stacks one tree's files on another tree.
    Merge(Merge),
}

impl Op {
    /// The input whose tree it changes; `None`: it starts from nothing.
    pub fn base(&self) -> Option<InputIndex> {
        match self {
            Op::Source(_) => None,
            Op::Exec(exec) => exec.base,
            Op::File(file) => file.base,
            Op::Merge(merge) => merge.base,
        }
    }
}

/// A tree from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An image's merged layers.
    Image(SourceImage),
    /// A directory of the client.
    Local(Local),
    /// A file from a web server.
    Http(Http),
    /// A checkout of a git repository.
    Git(Git),
}

/// An image by what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceImage {
    /// The name it was asked for by; for messages, outside the digest.
    pub reference: Reference,
    /// Digest of the image config it resolved to; to find it by, outside the digest: what else the config
    /// says is in the ops that it matters to.
    pub config: Digest,
    /// What its files are, and for which machines: [`SourceImage::rootfs`].
    pub rootfs: Digest,
}

impl SourceImage {
    /// What tells the files of images apart: the layers, and the platform that says what runs there.
    ///
    /// Fields are taken apart without `..`, as in [`Op::components`].
    pub fn rootfs(config: &ImageConfig) -> Digest {
        let ImageConfig {
            architecture,
            variant,
            os,
            rootfs: RootFs { kind: _, diff_ids },
            extra,
            author: _,
            created: _,
            config: _,
            history: _,
        } = config;
        let chain = ChainId::of(diff_ids).map(|chain| chain.to_string()).unwrap_or_default();
        let variant = variant.as_deref().unwrap_or_default();
        let mut text = format!("{os}/{architecture}/{variant} {chain}");
        // Next to no image has these.
        for name in ["os.version", "os.features"] {
            let value = extra.get(name).map(ToString::to_string).unwrap_or_default();
            if !["", "null", "\"\"", "[]"].contains(&value.as_str()) {
                text.push_str(&format!(" {name} {value}"));
            }
        }
        Digest::of(text.as_bytes())
    }
}

/// A directory of the client, read lazily: only what a copy asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Which directory: `context`, or a named context's name.
    pub name: String,
    /// `.dockerignore` lines as they stand in the file, checked by the frontend.
    pub ignore: Vec<String>,
}

/// One file from a web server: the tree holds it under `filename`, owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// `http://` or `https://`.
    pub url: String,
    /// Its name in the tree; one path component.
    pub filename: String,
    /// What its bytes must hash to.
    pub checksum: Option<Digest>,
    /// Its permission bits.
    pub mode: u32,
}

/// A checkout of a git repository; files are 0644 or 0755, owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Git {
    /// Where from, without fragment and query: `https://…`, `ssh://…`, `git://…`, `user@host:path`.
    pub remote: String,
    /// Branch, tag, `refs/…` or commit; empty: the remote's HEAD.
    pub reference: String,
    /// The commit, or its first digits, that `reference` must be.
    pub checksum: Option<String>,
    /// The tree is this directory of the repository; empty: its root.
    pub subdir: String,
    /// Keep `.git`.
    pub keep_git_dir: bool,
    /// Check out submodules as well.
    pub submodules: bool,
    /// Files' times.
    pub mtime: GitMtime,
    /// Fetch `checksum` itself, not `reference`.
    pub fetch_by_commit: bool,
}

/// What times the files of a checkout have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GitMtime {
    /// When they were checked out.
    #[default]
    Checkout,
    /// The commit's time.
    Commit,
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
    /// Environment at run time that is no part of the result: proxies.
    pub unkeyed_env: Vec<(String, String)>,
    /// Absolute working directory.
    pub cwd: String,
    /// `user[:group]`, names looked up in the tree; `None`: root.
    pub user: Option<String>,
    /// Host name inside.
    pub hostname: String,
    /// Lines for `/etc/hosts`: name and address, or `host-gateway`.
    pub extra_hosts: Vec<(String, String)>,
    /// What network it sees.
    pub network: Network,
    /// How much it is held back.
    pub security: Security,
    /// Mounts below the root, in order.
    pub mounts: Vec<Mount>,
    /// Secrets as environment variables.
    pub secret_env: Vec<SecretEnv>,
    /// How long a result counts; `None`: for ever. No part of the key.
    pub cache_ttl: Option<Duration>,
    /// The platform that its programs are for, when the machine that builds needs an emulator for them. `None`:
    /// it starts them by itself, and what they are for is known by the tree.
    pub foreign: Option<Platform>,
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

/// How much a process is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// The default profile.
    Sandbox,
    /// All capabilities, no filters.
    Insecure,
}

/// `RUN --mount`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Absolute, cleaned path inside.
    pub target: String,
    /// What is mounted.
    pub kind: MountKind,
}

/// What a mount shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// Files of another tree; writes are refused or thrown away.
    Bind(BindMount),
    /// A directory that outlives the build.
    Cache(CacheMount),
    /// An empty file system in memory.
    Tmpfs {
        /// Upper bound in bytes; `None`: the kernel's default.
        size_bytes: Option<u64>,
    },
    /// A secret as a file.
    Secret(SecretMount),
    /// An ssh agent's socket.
    Ssh(SecretMount),
}

/// Files of another tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// Which tree; `None`: an empty one.
    pub from: Option<InputIndex>,
    /// Path in it, cleaned, without a leading `/`; empty: its root.
    pub source: String,
    /// Writes are allowed, and thrown away after the step.
    pub writable: bool,
}

/// A directory that outlives the build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheMount {
    /// Which cache; steps with the same one share it.
    pub id: String,
    /// What happens when two steps want it at once.
    pub sharing: Sharing,
    /// What a new cache starts from; `None`: an empty directory.
    pub from: Option<InputIndex>,
    /// Path in `from`, as in [`BindMount::source`].
    pub source: String,
    /// Permission bits of a new, empty cache's root.
    pub mode: u32,
    /// Owner of a new, empty cache's root.
    pub uid: u32,
    /// Group of a new, empty cache's root.
    pub gid: u32,
    /// Writes are refused.
    pub read_only: bool,
}

/// What happens when two steps want one cache at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Both write to it.
    Shared,
    /// The second gets one of its own.
    Private,
    /// The second waits.
    Locked,
}

/// A secret's file, or an agent's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretMount {
    /// Which one the client is asked for.
    pub id: String,
    /// Permission bits of the file.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Without it the step fails; otherwise nothing is mounted then.
    pub required: bool,
}

/// A secret as an environment variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretEnv {
    /// The variable.
    pub name: String,
    /// Which secret.
    pub id: String,
    /// Without it the step fails; otherwise the variable is not set then.
    pub required: bool,
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
    /// A heredoc.
    Mkfile(Mkfile),
}

/// Copies from an input's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// The tree the files come from.
    pub from: InputIndex,
    /// Paths or patterns below that tree's root (Go's `filepath.Match` per component, and `**`
    /// where `parents` is set), clipped and cleaned: no leading `/`, no `..`; `.` or empty is the
    /// root itself. With `parents`, `a/./b` keeps only what stands behind the `.`.
    pub sources: Vec<String>,
    /// Absolute, cleaned path inside.
    pub destination: String,
    /// Written with a trailing slash, or several sources: files go *into* it.
    pub destination_is_dir: bool,
    /// Owner of what is copied and of directories made on the way.
    pub owner: Owner,
    /// Permission bits of what is copied; `None`: as in the source.
    pub mode: Option<Mode>,
    /// Keep the sources' parent directories below the destination.
    pub parents: bool,
    /// Patterns as in `.dockerignore`, relative to each source: what they match is left out.
    pub exclude: Vec<String>,
    /// What happens to archives among the sources.
    pub unpack: Unpack,
}

/// What happens to archives among the sources of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unpack {
    /// They are files like others.
    Never,
    /// What is an archive by its content is unpacked into the destination; the rest is copied.
    Archives,
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
    /// Modification time of directories that are made, in seconds since 1970; `None`: now.
    pub created: Option<i64>,
}

/// Writes a file, owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mkfile {
    /// Absolute, cleaned path; its parents are there.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Its content.
    pub data: String,
}

/// Stacks the files of one tree on another, as image layers are stacked (`COPY --link`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merge {
    /// The lower tree; `None`: an empty one.
    pub base: Option<InputIndex>,
    /// What is put on top: a tree of one layer.
    pub layer: InputIndex,
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

/// Whether it matters where in an input something is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    /// It does.
    Places,
    /// Only what is there: whoever asks adds the digest of that.
    Content,
}

impl Op {
    /// Everything that identifies this op, inputs apart, in a fixed order.
    ///
    /// Fields are taken apart without `..`, so that a new field does not compile until somebody
    /// decided whether it belongs to the identity.
    pub fn components(&self) -> Vec<Component> {
        self.seen(Sight::Places)
    }

    /// What is left of [`Op::components`] when the digest of what it reads from inputs stands beside them: not
    /// in which directory of an input that was. `None`: it reads nothing.
    pub fn components_by_content(&self) -> Option<Vec<Component>> {
        let reads = match self {
            Op::Source(_) | Op::Merge(_) => false,
            Op::File(file) => file.actions.iter().any(|action| matches!(action, FileAction::Copy(_))),
            Op::Exec(exec) => exec.mounts.iter().any(|mount| exec.reads(mount)),
        };
        reads.then(|| self.seen(Sight::Content))
    }

    fn seen(&self, sight: Sight) -> Vec<Component> {
        match self {
            Op::Source(source) => source.components(),
            Op::Exec(exec) => exec.components(sight),
            Op::File(File { base, actions }) => {
                let mut out = vec![component("op", "file"), component("base", slot(*base))];
                for action in actions {
                    match action {
                        FileAction::Copy(copy) => copy.components(sight, &mut out),
                        FileAction::Mkdir(Mkdir { path, mode, owner, created }) => {
                            out.push(component("mkdir", path));
                            out.push(component("mode", format!("{mode:o}")));
                            out.push(component("owner", owner.as_deref().unwrap_or("")));
                            out.extend(created.map(|seconds| component("created", seconds.to_string())));
                        }
                        FileAction::Mkfile(Mkfile { path, mode, data }) => {
                            out.push(component("mkfile", path));
                            out.push(component("mode", format!("{mode:o}")));
                            out.push(component("data", data));
                        }
                    }
                }
                out
            }
            Op::Merge(Merge { base, layer }) => vec![
                component("op", "merge"),
                component("base", slot(*base)),
                component("layer", layer.0.to_string()),
            ],
        }
    }
}

impl Source {
    fn components(&self) -> Vec<Component> {
        match self {
            Source::Image(SourceImage { reference: _, config: _, rootfs }) => {
                vec![component("op", "source.image"), component("rootfs", rootfs.to_string())]
            }
            Source::Local(Local { name, ignore }) => {
                let mut out = vec![component("op", "source.local"), component("name", name)];
                out.extend(ignore.iter().map(|line| component("ignore", line)));
                out
            }
            Source::Http(Http { url, filename, checksum, mode }) => vec![
                component("op", "source.http"),
                component("url", url),
                component("filename", filename),
                component("checksum", checksum.as_ref().map(Digest::to_string).unwrap_or_default()),
                component("mode", format!("{mode:o}")),
            ],
            Source::Git(git) => {
                let Git {
                    remote,
                    reference,
                    checksum,
                    subdir,
                    keep_git_dir,
                    submodules,
                    mtime,
                    fetch_by_commit,
                } = git;
                let mtime = match mtime {
                    GitMtime::Checkout => "checkout",
                    GitMtime::Commit => "commit",
                };
                vec![
                    component("op", "source.git"),
                    component("remote", remote),
                    component("reference", reference),
                    component("checksum", checksum.as_deref().unwrap_or("")),
                    component("subdir", subdir),
                    component("keep git dir", keep_git_dir.to_string()),
                    component("submodules", submodules.to_string()),
                    component("mtime", mtime),
                    component("fetch by commit", fetch_by_commit.to_string()),
                ]
            }
        }
    }
}

impl Exec {
    /// Whether a mount's input counts by what is mounted of it. What a process runs on counts as a whole.
    fn reads(&self, mount: &Mount) -> bool {
        let from = match &mount.kind {
            MountKind::Bind(bind) => bind.from,
            MountKind::Cache(cache) => cache.from,
            MountKind::Tmpfs { .. } | MountKind::Secret(_) | MountKind::Ssh(_) => None,
        };
        from.is_some() && from != self.base
    }

    fn components(&self, sight: Sight) -> Vec<Component> {
        let Exec {
            base,
            args,
            env,
            unkeyed_env: _,
            cwd,
            user,
            hostname,
            extra_hosts,
            network,
            security,
            mounts,
            secret_env,
            cache_ttl: _,
            foreign,
        } = self;
        let mut out = vec![component("op", "exec"), component("base", slot(*base))];
        out.extend(args.iter().map(|arg| component("arg", arg)));
        // The name stands in the value: `A=B=C` must not meet `A` `B=C` half-way.
        out.extend(env.iter().map(|(name, value)| component(format!("env {name}"), value)));
        out.push(component("cwd", cwd));
        out.push(component("user", user.as_deref().unwrap_or("")));
        out.push(component("hostname", hostname));
        // The address is where the build happens to run, as proxies are (BuildKit does the same).
        out.extend(extra_hosts.iter().map(|(name, _at)| component("host", name)));
        out.push(component("network", network.name()));
        out.push(component("security", security.name()));
        for mount in mounts {
            mount.components(if self.reads(mount) { sight } else { Sight::Places }, &mut out);
        }
        for SecretEnv { name, id, required } in secret_env {
            out.push(component(format!("secret env {name}"), id));
            out.push(component("required", required.to_string()));
        }
        out.extend(foreign.as_ref().map(|platform| component("platform", platform.to_string())));
        out
    }
}

impl Network {
    /// As in `--network`.
    pub fn name(self) -> &'static str {
        match self {
            Network::Default => "default",
            Network::None => "none",
            Network::Host => "host",
        }
    }
}

impl Security {
    /// As in `--security`.
    pub fn name(self) -> &'static str {
        match self {
            Security::Sandbox => "sandbox",
            Security::Insecure => "insecure",
        }
    }
}

impl Sharing {
    /// As in `sharing=`.
    pub fn name(self) -> &'static str {
        match self {
            Sharing::Shared => "shared",
            Sharing::Private => "private",
            Sharing::Locked => "locked",
        }
    }
}

impl Mount {
    /// What a step left in a cache is no part of its result, so neither is which cache it was
    /// (BuildKit does the same).
    fn components(&self, sight: Sight, out: &mut Vec<Component>) {
        let Mount { target, kind } = self;
        let mut push = |name: &str, value: String| out.push(component(name, value));
        let place = |source: &String| match sight {
            Sight::Places => source.clone(),
            Sight::Content => String::new(),
        };
        match kind {
            MountKind::Bind(BindMount { from, source, writable }) => {
                push("mount bind", target.clone());
                push("from", slot(*from));
                push("source", place(source));
                push("writable", writable.to_string());
            }
            MountKind::Cache(cache) => {
                let CacheMount { id: _, sharing: _, from, source, mode, uid, gid, read_only } = cache;
                push("mount cache", target.clone());
                push("from", slot(*from));
                push("source", place(source));
                push("mode", format!("{mode:o} {uid}:{gid}"));
                push("read only", read_only.to_string());
            }
            MountKind::Tmpfs { size_bytes } => {
                push("mount tmpfs", target.clone());
                push("size", size_bytes.map(|size| size.to_string()).unwrap_or_default());
            }
            MountKind::Secret(secret) | MountKind::Ssh(secret) => {
                let SecretMount { id, mode, uid, gid, required } = secret;
                let secret = matches!(kind, MountKind::Secret(_));
                push(if secret { "mount secret" } else { "mount ssh" }, target.clone());
                push("id", id.clone());
                push("mode", format!("{mode:o} {uid}:{gid}"));
                push("required", required.to_string());
            }
        }
    }
}

impl Copy {
    fn components<'a>(&'a self, sight: Sight, out: &mut Vec<Component>) {
        let Copy { from, sources, destination, destination_is_dir, owner, mode, parents, exclude, unpack } =
            self;
        out.push(component("copy from", from.0.to_string()));
        // A name becomes part of the destination, the directory that it is in only with `--parents`.
        let place = |source: &'a str| match sight {
            Sight::Content if !parents => source.rsplit('/').next().unwrap_or_default(),
            Sight::Content | Sight::Places => source,
        };
        out.push(component("sources", sources.len().to_string()));
        out.extend(sources.iter().map(|source| component("source", place(source))));
        out.push(component("destination", destination));
        out.push(component("into", destination_is_dir.to_string()));
        out.push(match owner {
            Owner::Keep => component("owner", "keep"),
            Owner::Root => component("owner", "root"),
            Owner::Named(name) => component("owner named", name),
        });
        out.push(component("mode", mode.as_ref().map(Mode::to_string).unwrap_or_default()));
        out.push(component("parents", parents.to_string()));
        out.extend(exclude.iter().map(|pattern| component("exclude", pattern)));
        out.push(match unpack {
            Unpack::Never => component("unpack", "never"),
            Unpack::Archives => component("unpack", "archives"),
        });
    }
}

fn slot(index: Option<InputIndex>) -> String {
    index.map_or_else(|| "none".to_owned(), |InputIndex(i)| i.to_string())
}
