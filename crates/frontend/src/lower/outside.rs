//! Where trees come from that no instruction makes: images and named contexts.

use kiln_llb::{File, FileAction, Http, InputIndex, Local, Op, Source, SourceImage, Vertex};
use kiln_oci::{Platform, Reference};

use super::{Built, Lower, NamedContext, Need, Step, bare, copy, location, scratch};
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
        let context = self.options.context(name, platform).cloned();
        let title = |what: &str| {
            step.map_or_else(
                || format!("[internal] load {}", without_credentials(what)),
                |step| step.title(what),
            )
        };
        let (reference, image) = match context {
            Some(NamedContext::Layout(reference, image)) => (reference, Some(*image)),
            Some(NamedContext::Image(reference)) => {
                let image = self.images.get(&reference).cloned();
                (reference, image)
            }
            Some(NamedContext::Local { ignore }) => {
                let op = Op::Source(Source::Local(Local { name: name.to_owned(), ignore }));
                return Ok(Some(self.source(op, title(&format!("build context {name}")), platform)));
            }
            Some(NamedContext::Git(git)) => {
                let shown = format!("{}#{}", git.remote, git.reference);
                return Ok(Some(self.source(Op::Source(Source::Git(git)), title(&shown), platform)));
            }
            Some(NamedContext::Http(url)) => return Ok(Some(self.download(&url, title(&url), platform))),
            None if name == "scratch" => return Ok(Some(scratch(platform))),
            None => {
                let reference: Reference = name.parse().map_err(|error: kiln_oci::ReferenceError| {
                    let known = self.stages.list.iter().filter_map(|stage| stage.name.as_deref());
                    let hint = did_you_mean(name, known);
                    Box::new(Diagnostic::error(span, error.to_string()).with_hint(hint))
                })?;
                let image = self.images.get(&reference).cloned();
                (reference, image)
            }
        };
        let Some(image) = image else {
            if self.needed.insert(reference.clone()) {
                self.needs.push(Need { reference, span, stages });
            }
            return Ok(None);
        };
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
            let source = SourceImage { reference, config: image.config_digest };
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

    /// A named context on a web server: an archive is unpacked, another file stands for itself.
    fn download(&mut self, url: &str, title: String, platform: &Platform) -> Built {
        let http = named_download(url);
        let filename = http.filename.clone();
        let file = self.source(Op::Source(Source::Http(http)), title.clone(), platform);
        let action = FileAction::Copy(kiln_llb::Copy {
            from: InputIndex(0),
            sources: vec![filename],
            destination: "/".to_owned(),
            destination_is_dir: true,
            owner: kiln_llb::Owner::Keep,
            mode: None,
            parents: false,
            exclude: Vec::new(),
            unpack: kiln_llb::Unpack::Archives,
        });
        let op = Op::File(File { base: None, actions: vec![action] });
        let id = self.definition.push(Vertex { op, inputs: file.tree.into_iter().collect() });
        self.source_map.insert(id, title, None);
        Built { tree: Some(id), ..file }
    }
}

pub(super) fn named_download(url: &str) -> Http {
    Http { url: url.to_owned(), filename: copy::file_name(url), checksum: None, mode: 0o644 }
}
