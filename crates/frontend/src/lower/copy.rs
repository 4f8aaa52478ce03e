//! COPY and ADD: paths, heredocs, URLs, repositories.

use kiln_llb::{
    Copy, File, FileAction, Http, InputIndex, Local, Merge, Mkfile, Mode, Op, Owner, Source, Unpack, Vertex,
    VertexId,
};
use kiln_oci::Digest;

use super::{Built, Lower, Step, join};
use crate::ast::{Files, Flag, Instruction, Kind, Text};
use crate::git_url;
use crate::stages::{Origin, Result, wrong};
use crate::words::Quotes;
use crate::{Diagnostic, Rule};

/// What the flags of COPY and ADD ask for.
struct Wanted {
    owner: Option<String>,
    mode: Option<Mode>,
    link: bool,
    parents: bool,
    exclude: Vec<String>,
    checksum: Option<String>,
    unpack: Option<bool>,
    keep_git_dir: Option<bool>,
}

/// The vertices that actions read from, behind the base.
struct Inputs {
    list: Vec<VertexId>,
    offset: usize,
}

impl Inputs {
    fn add(&mut self, vertex: VertexId) -> InputIndex {
        let at = self.list.iter().position(|known| *known == vertex).unwrap_or(self.list.len());
        if at == self.list.len() {
            self.list.push(vertex);
        }
        InputIndex(self.offset + at)
    }
}

impl Lower<'_> {
    /// Adds a COPY or ADD; false while an image is missing.
    pub(super) fn copy(
        &mut self,
        step: &mut Step,
        built: &mut Built,
        at: &Instruction,
        files: &Files,
        title: &str,
    ) -> Result<bool> {
        let wanted = self.wanted(built, at)?;
        let mut paths = Vec::new();
        for path in &files.paths {
            paths.push((path, self.expand(built, at, path)?));
        }
        let written = self.expand(built, at, &files.destination)?;
        let destination = destination(built, at, files, &written)?;
        let linked = wanted.link && built.tree.is_some() && wanted.owner.as_deref().is_none_or(is_numeric);
        let mut inputs = Inputs { list: Vec::new(), offset: usize::from(built.tree.is_some() && !linked) };
        let mut actions: Vec<Copy> = Vec::new();
        for (text, path) in &paths {
            if let Some((vertex, source)) = self.outside_source(at, text, path, &wanted, step, title)? {
                // What is downloaded is a file unless it is asked for; a repository is a directory.
                let unpack = if wanted.unpack == Some(true) { Unpack::Archives } else { Unpack::Never };
                let from = inputs.add(vertex);
                actions.push(wanted.copy(from, vec![source], &destination, Owner::Keep, unpack));
                continue;
            }
            let Some((vertex, owner)) = self.local_source(step, at, text, path)? else { return Ok(false) };
            let from = inputs.add(vertex);
            let source = source_path(path, wanted.parents);
            // Paths side by side are one selection: a pattern among them may match nothing.
            match actions.last_mut().filter(|last| last.from == from) {
                Some(last) => last.sources.push(source),
                None => {
                    let unpack = wanted.unpack.unwrap_or(at.kind == Kind::Add);
                    let unpack = if unpack { Unpack::Archives } else { Unpack::Never };
                    actions.push(wanted.copy(from, vec![source], &destination, owner, unpack));
                }
            }
        }
        for &number in &files.heredocs {
            let (vertex, name) = self.inline(built, at, number)?;
            let from = inputs.add(vertex);
            actions.push(wanted.copy(from, vec![name], &destination, Owner::Keep, Unpack::Never));
        }
        let created_by = wanted.history(at, &paths, files, &written);
        let title = step.title(title);
        let actions = actions.into_iter().map(FileAction::Copy).collect();
        if linked {
            let op = Op::File(File { base: None, actions });
            let layer = self.definition.push(Vertex { op, inputs: inputs.list });
            self.source_map.insert(layer, title.clone(), Some(super::location(at)));
            let op = Op::Merge(Merge { base: Some(InputIndex(0)), layer: InputIndex(1) });
            let vertex = Vertex { op, inputs: built.tree.into_iter().chain([layer]).collect() };
            self.layer(built, at, format!("{title} (link)"), vertex, created_by);
        } else {
            let base = built.tree.map(|_| InputIndex(0));
            let vertex = Vertex {
                op: Op::File(File { base, actions }),
                inputs: built.tree.into_iter().chain(inputs.list).collect(),
            };
            self.layer(built, at, title, vertex, created_by);
        }
        Ok(true)
    }

    fn wanted(&mut self, built: &Built, at: &Instruction) -> Result<Wanted> {
        let text = |lower: &mut Self, name: &str| match at.flag(name).and_then(|flag| flag.value.as_ref()) {
            None => Ok(None),
            Some(value) => {
                lower.expand(built, at, value).map(|expanded| Some((expanded, at.text_span(value))))
            }
        };
        let owner = match text(self, "chown")? {
            Some((owner, span)) if owner.is_empty() || owner.starts_with(':') => {
                return wrong(span, format!("--chown={owner} names no user"));
            }
            other => other.map(|(owner, _)| owner),
        };
        let mode = match text(self, "chmod")? {
            Some((mode, _)) if mode.is_empty() => None,
            Some((mode, span)) => match mode.parse::<Mode>() {
                Ok(mode) => Some(mode),
                Err(error) => return wrong(span, format!("--chmod: {error}")),
            },
            None => None,
        };
        let checksum = text(self, "checksum")?.map(|(checksum, _)| checksum).filter(|text| !text.is_empty());
        let mut exclude = Vec::new();
        for flag in at.flags.iter().filter(|flag| flag.name == "exclude") {
            if let Some(value) = &flag.value {
                exclude.push(self.expand(built, at, value)?);
            }
        }
        if let Err(error) = crate::ignore::Patterns::from_lines(&exclude) {
            let flag: Option<&Flag> =
                at.flags.iter().filter(|flag| flag.name == "exclude").nth(error.line.saturating_sub(1));
            let span = flag.map_or(at.span(), |flag| at.line.span(flag.piece.start, flag.piece.end));
            return wrong(span, format!("--exclude: {}", error.message));
        }
        Ok(Wanted {
            owner,
            mode,
            link: at.switch("link").unwrap_or(false),
            parents: at.switch("parents").unwrap_or(false),
            exclude,
            checksum,
            unpack: at.switch("unpack"),
            keep_git_dir: at.switch("keep-git-dir"),
        })
    }

    /// The vertex of a URL or a repository and the path in it; `None` for a path of the context.
    fn outside_source(
        &mut self,
        at: &Instruction,
        text: &Text,
        path: &str,
        wanted: &Wanted,
        step: &Step,
        title: &str,
    ) -> Result<Option<(VertexId, String)>> {
        let span = at.text_span(text);
        let is_web = path.starts_with("http://") || path.starts_with("https://");
        // `github.com/x` may be a directory as well, and in a context it is one.
        let repository = match git_url::parse(path).filter(|_| !git_url::is_schemeless(path)) {
            Some(Ok(git)) => Some(git),
            Some(Err(error @ git_url::GitUrlError::Refused { .. })) => {
                return Err(Box::new(Diagnostic::refused(span, error.to_string())));
            }
            Some(Err(error)) => return wrong(span, error.to_string()),
            None => None,
        };
        if repository.is_none() && !is_web {
            if let Some(checksum) = &wanted.checksum {
                let message =
                    format!("--checksum={checksum} is for URLs and repositories, and {path:?} is neither");
                return wrong(span, message);
            }
            return Ok(None);
        }
        if at.kind == Kind::Copy {
            let what = if repository.is_some() { "a repository" } else { "a URL" };
            let hint = Some("use ADD".to_owned());
            let message = format!("COPY does not take {what}");
            return Err(Box::new(Diagnostic::error(span, message).with_hint(hint)));
        }
        if let Some(checksum) = &wanted.checksum
            && at_sources(at) > 1
        {
            return wrong(span, format!("--checksum={checksum} is for one source, and this ADD has several"));
        }
        let (op, source) = if let Some(mut git) = repository {
            if let (Some(flag), true) = (wanted.keep_git_dir, git.keep_git_dir)
                && !flag
            {
                return wrong(span, "--keep-git-dir=false and keep-git-dir of the URL contradict each other");
            }
            git.keep_git_dir |= wanted.keep_git_dir.unwrap_or(false);
            if let Some(checksum) = &wanted.checksum {
                let fits = git.checksum.as_ref().is_none_or(|own| own == checksum);
                if !fits {
                    return wrong(span, format!("--checksum={checksum} and the URL's checksum differ"));
                }
                let is_commit =
                    (4..=64).contains(&checksum.len()) && checksum.bytes().all(|b| b.is_ascii_hexdigit());
                if !is_commit {
                    return wrong(span, format!("--checksum={checksum} is no commit of a repository"));
                }
                git.checksum = Some(checksum.clone());
            }
            (Op::Source(Source::Git(git)), String::new())
        } else {
            let checksum = match &wanted.checksum {
                None => None,
                Some(text) => match text.parse::<Digest>() {
                    Ok(digest) => Some(digest),
                    Err(error) => {
                        let flag = at.flag("checksum").and_then(|flag| flag.value.as_ref());
                        let span = flag.map_or(span, |value| at.text_span(value));
                        return wrong(span, format!("--checksum: {error}"));
                    }
                },
            };
            let filename = file_name(path);
            let http = Http { url: path.to_owned(), filename: filename.clone(), checksum, mode: 0o600 };
            (Op::Source(Source::Http(http)), filename)
        };
        let vertex = self.definition.push(Vertex { op, inputs: Vec::new() });
        self.source_map.insert(vertex, step.title(title), Some(super::location(at)));
        Ok(Some((vertex, source)))
    }

    /// The tree that a path is taken from; `None` while an image is missing.
    fn local_source(
        &mut self,
        step: &Step,
        at: &Instruction,
        path_text: &Text,
        path: &str,
    ) -> Result<Option<(VertexId, Owner)>> {
        let Some(text) = at.flag("from").and_then(|flag| flag.value.as_ref()) else {
            self.check_ignored(at, path_text, path);
            // As in BuildKit: only what a client sends file by file belongs to root.
            let owner = if self.options.keep_owners { Owner::Keep } else { Owner::Root };
            return Ok(Some((self.context(), owner)));
        };
        let span = at.text_span(text);
        let name = &text.value;
        let tree = match self.stages.origin(name, span, true)? {
            Origin::Stage(stage) => self.trees.get(&stage).copied().flatten(),
            Origin::Outside(name) => {
                let platform = self.stages.list[step.stage].platform.clone();
                let stages = self.stage_names();
                self.outside(&name, at, span, &platform, Some(stages), None)?.map(|built| built.tree)
            }
        };
        let Some(tree) = tree else { return Ok(None) };
        // A named context that is a directory is a build context too: its files belong to root.
        let is_context =
            tree.is_some_and(|tree| matches!(self.definition.vertex(tree).op, Op::Source(Source::Local(_))));
        let owner = if is_context { Owner::Root } else { Owner::Keep };
        match tree {
            Some(tree) => Ok(Some((tree, owner))),
            None => wrong(span, format!("{name:?} has no files to copy")),
        }
    }

    fn check_ignored(&mut self, at: &Instruction, text: &Text, path: &str) {
        let Some(ignore) = self.ignore else { return };
        let clean = join("/", path)[1..].to_owned();
        if clean.is_empty() || !ignore.is_ignored(&clean) {
            return;
        }
        let Some(rule) = ignore.deciding_rule(&clean) else { return };
        let message = format!("{clean:?} is excluded by {rule}");
        self.lint.warn(Rule::CopyIgnoredFile, at, at.text_span(text), message, None);
    }

    /// A heredoc's file.
    fn inline(&mut self, built: &Built, at: &Instruction, number: usize) -> Result<(VertexId, String)> {
        let heredoc = &at.line.heredocs[number];
        let span = at.line.span(heredoc.word.start, heredoc.word.end);
        let name = heredoc.name.clone();
        let mut data = heredoc.content();
        if heredoc.expand {
            let place = Text { value: name.clone(), piece: heredoc.word, exact: false };
            data = self.expand_text(built, at, &place, &data, Quotes::Text)?;
        }
        let path = join("/", &name);
        if path == "/" || path.contains('\0') || path[1..].contains('/') {
            return wrong(span, format!("a file cannot be called {name:?}"));
        }
        let file = Mkfile { path: path.clone(), mode: 0o644, data };
        let op = Op::File(File { base: None, actions: vec![FileAction::Mkfile(file)] });
        let vertex = self.definition.push(Vertex { op, inputs: Vec::new() });
        self.source_map.insert(vertex, "[internal] preparing inline document".to_owned(), None);
        Ok((vertex, path[1..].to_owned()))
    }

    /// The one vertex for the build context.
    pub(super) fn context(&mut self) -> VertexId {
        let local = Local { name: "context".to_owned(), ignore: self.options.ignore.lines().to_vec() };
        let id = self.definition.push(Vertex { op: Op::Source(Source::Local(local)), inputs: Vec::new() });
        self.source_map.insert(id, "[internal] load build context".to_owned(), None);
        id
    }

    pub(super) fn stage_names(&self) -> Vec<String> {
        self.stages.list.iter().filter_map(|stage| stage.name.clone()).collect()
    }
}

impl Wanted {
    fn copy(
        &self,
        from: InputIndex,
        sources: Vec<String>,
        to: &Destination,
        owner: Owner,
        unpack: Unpack,
    ) -> Copy {
        Copy {
            from,
            sources,
            destination: to.path.clone(),
            destination_is_dir: to.is_dir,
            owner: self.owner.clone().map_or(owner, Owner::Named),
            mode: self.mode.clone(),
            parents: self.parents,
            exclude: self.exclude.clone(),
            unpack,
        }
    }

    /// The instruction as image histories tell it.
    fn history(&self, at: &Instruction, paths: &[(&Text, String)], files: &Files, to: &str) -> String {
        let mut text = at.kind.name().to_owned();
        if self.parents {
            text.push_str(" --parents");
        }
        if let Some(owner) = &self.owner {
            text.push_str(&format!(" --chown={owner}"));
        }
        if let Some(mode) = &self.mode {
            text.push_str(&format!(" --chmod={mode}"));
        }
        for (_, path) in paths {
            text.push_str(&format!(" {path}"));
        }
        for &number in &files.heredocs {
            text.push_str(&format!(" <<{}", at.line.heredocs[number].name));
        }
        format!("{text} {to} # buildkit")
    }
}

struct Destination {
    path: String,
    is_dir: bool,
}

fn destination(built: &Built, at: &Instruction, files: &Files, written: &str) -> Result<Destination> {
    let span = at.text_span(&files.destination);
    if written.contains('\0') {
        return wrong(span, "a path cannot hold a NUL byte");
    }
    let is_dir = written.is_empty() || written.ends_with('/') || written == "." || written.ends_with("/.");
    let several = files.paths.len() + files.heredocs.len() > 1;
    if several && !is_dir {
        let hint = Some(format!("write `{written}/`"));
        let message = format!(
            "with several sources the destination must be a directory and end with `/`, but it is {written:?}"
        );
        return Err(Box::new(Diagnostic::error(span, message).with_hint(hint)));
    }
    Ok(Destination { path: join(&built.config.config.working_dir, written), is_dir })
}

/// Clipped to the root; with `parents` the pivot `/./` stays.
fn source_path(path: &str, parents: bool) -> String {
    match path.split_once("/./").filter(|_| parents) {
        Some((parent, rest)) => {
            let parent = &join("/", parent)[1..];
            let rest = &join("/", rest)[1..];
            if parent.is_empty() { rest.to_owned() } else { format!("{parent}/./{rest}") }
        }
        None => join("/", path)[1..].to_owned(),
    }
}

fn at_sources(at: &Instruction) -> usize {
    match &at.body {
        crate::ast::Body::Add(files) | crate::ast::Body::Copy(files) => {
            files.paths.len() + files.heredocs.len()
        }
        _ => 0,
    }
}

/// Names cannot be looked up without the tree below, so that such a copy is not linked.
fn is_numeric(owner: &str) -> bool {
    owner.split(':').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

/// The last part of a URL's path.
pub(super) fn file_name(url: &str) -> String {
    let path = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let name = path.split_once('/').and_then(|(_, path)| path.trim_end_matches('/').rsplit('/').next());
    let name = decode_percent(name.unwrap_or_default());
    match name.as_str() {
        "" | "." | ".." => "__unnamed__".to_owned(),
        name if name.contains(['/', '\0']) => "__unnamed__".to_owned(),
        _ => name,
    }
}

fn decode_percent(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match digits.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}
