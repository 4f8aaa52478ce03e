//! Where trees come from that no instruction makes: images and named contexts.

use kiln_llb::{
    Copy, File, FileAction, Http, InputIndex, Local, Op, Owner, Source, SourceImage, Unpack, Vertex,
};
use kiln_oci::{Platform, Reference};

use super::{Built, ImageKey, Lower, NamedContext, Need, Step, bare, history_entry, location, scratch};
use crate::ast::Instruction;
use crate::redact::without_credentials;
use crate::scope::Scope;
use crate::stages::Result;
use crate::suggest::did_you_mean;
use crate::{Diagnostic, Rule, Span};

impl Lower<'_> {
    /// A stage whose place a named context takes: none of its instructions count.
    pub(super) fn replaced(&mut self, index: usize, name: &str, from: &Instruction) -> Result<Option<Built>> {
        let platform = self.stages.list[index].platform.clone();
        self.outside(name, from, from.rest_span(), &platform, None, None)
    }

    /// What stands on files that came without an image, or is an image of nothing else: they become
    /// its first layer.
    pub(super) fn based_on_files(&mut self, built: &mut Built, from: &Instruction) {
        let is_image = !built.history.is_empty() || !built.config.rootfs.diff_ids.is_empty();
        let Some(tree) = built.tree.filter(|_| !is_image) else { return };
        let owner = match &self.definition.vertex(tree).op {
            Op::Source(Source::Local(_)) => Some(Owner::Root),
            Op::Source(_) => Some(Owner::Keep),
            // Unpacked by a copy already.
            _ => None,
        };
        let created_by = format!("{} # buildkit", from.title());
        let Some(owner) = owner else {
            return built.history.push(history_entry(created_by, tree));
        };
        let action = FileAction::Copy(everything(owner));
        let vertex = Vertex { op: Op::File(File { base: None, actions: vec![action] }), inputs: vec![tree] };
        let title = format!("[internal] {}", without_credentials(&from.title()));
        self.layer(built, from, title, vertex, created_by);
    }

    /// An image or a named context; `None`, and a need, while its config is missing.
    pub(super) fn outside(
        &mut self,
        name: &str,
        at: &Instruction,
        span: Span,
        platform: &Platform,
        stages: Option<Vec<String>>,
        step: Option<&Step>,
    ) -> Result<Option<Built>> {
        let (known, context) = self.options.context(name, platform).unzip();
        let (known, context) = (known.unwrap_or(name).to_owned(), context.cloned());
        let title = |what: &str| {
            step.map_or_else(
                || format!("[internal] load {}", without_credentials(what)),
                |step| step.title(what),
            )
        };
        let (reference, layout) = match context {
            Some(NamedContext::Layout(reference)) => (reference, Some(known)),
            Some(NamedContext::Image(reference)) => (reference, None),
            Some(NamedContext::Local { ignore }) => {
                let op = Op::Source(Source::Local(Local { name: known, ignore }));
                return Ok(Some(self.source(op, title(&format!("build context {name}")), platform)));
            }
            Some(NamedContext::Git(git)) => {
                let shown = format!("{}#{}", git.remote, git.reference);
                return Ok(Some(self.source(Op::Source(Source::Git(git)), title(&shown), platform)));
            }
            Some(NamedContext::Http(url)) => {
                let op = Op::Source(Source::Http(named_download(&url)));
                return Ok(Some(self.source(op, title(&url), platform)));
            }
            None if name == "scratch" => return Ok(Some(scratch(platform))),
            None => {
                let reference: Reference = name.parse().map_err(|error: kiln_oci::ReferenceError| {
                    let known = self.stages.list.iter().filter_map(|stage| stage.name.as_deref());
                    let hint = did_you_mean(name, known);
                    Box::new(Diagnostic::error(span, error.to_string()).with_hint(hint))
                })?;
                (reference, None)
            }
        };
        let key = ImageKey { reference, platform: platform.clone(), layout };
        let Some(image) = self.images.get(&key).cloned() else {
            if self.needed.insert(key.clone()) {
                self.needs.push(Need { image: key, span, stages });
            }
            return Ok(None);
        };
        let reference = key.reference;
        let config = image.config;
        if !image.unknown && (config.os != platform.os || config.architecture != platform.architecture) {
            let message = format!(
                "{} is for {}/{}, not for {platform}",
                reference.familiar(),
                config.os,
                config.architecture
            );
            self.lint.warn(Rule::InvalidBaseImagePlatform, at, span, message, None);
        }
        let mut tree = None;
        // One of which nothing is known has files, for all that is known.
        if image.unknown || !config.rootfs.diff_ids.is_empty() {
            let title = title(&format!("FROM {reference}"));
            let rootfs = if image.unknown { image.config_digest } else { SourceImage::rootfs(&config) };
            let source = SourceImage { reference, config: image.config_digest, rootfs };
            let id =
                self.definition.push(Vertex { op: Op::Source(Source::Image(source)), inputs: Vec::new() });
            self.source_map.insert(id, title, Some(location(at)));
            tree = Some(id);
        }
        let env = Scope::of(&config.config.env);
        Ok(Some(Built { tree, image_env: env.clone(), env, unknown: image.unknown, ..bare(config) }))
    }

    /// A tree without a config.
    fn source(&mut self, op: Op, title: String, platform: &Platform) -> Built {
        let id = self.definition.push(Vertex { op, inputs: Vec::new() });
        self.source_map.insert(id, title, None);
        Built { tree: Some(id), ..scratch(platform) }
    }
}

/// A copy of all of the first input, to the root.
fn everything(owner: Owner) -> Copy {
    Copy {
        from: InputIndex(0),
        sources: vec![String::new()],
        destination: "/".to_owned(),
        destination_is_dir: true,
        owner,
        mode: None,
        parents: false,
        exclude: Vec::new(),
        unpack: Unpack::Never,
    }
}

/// A named context on a web server: one file called `context`, as BuildKit has it, an archive or not.
pub(super) fn named_download(url: &str) -> Http {
    Http { url: url.to_owned(), filename: "context".to_owned(), checksum: None, mode: 0o600 }
}
