//! `kiln manifest`

use kiln_build::registry::{Annotate, ListError, Lists};

use super::{human_size, print};
use crate::args::registry::{ManifestCommand, RegistryArgs};
use crate::config::Config;
use crate::errors::Failure;
use crate::registries::registries;
use crate::session::Session;

pub(crate) fn run(session: &Session, command: &ManifestCommand) -> Result<u8, Failure> {
    let none = RegistryArgs::default();
    let flags = match command {
        ManifestCommand::Create(args) => &args.registries,
        ManifestCommand::Inspect(args) => &args.registries,
        ManifestCommand::Push(args) => &args.registries,
        ManifestCommand::Annotate(_) | ManifestCommand::Rm(_) => &none,
    };
    let registries = registries(&Config::read()?, flags);
    let lists = Lists::new(&session.engine, &registries, &session.cancel);
    match command {
        ManifestCommand::Create(args) => {
            lists.create(&args.list, &args.images, args.amend)?;
            print(&format!("{}\n", args.list.familiar()))?;
        }
        ManifestCommand::Inspect(args) => {
            let json = lists.inspect(&args.name)?;
            let value: serde_json::Value = serde_json::from_slice(&json)
                .map_err(|error| Failure::store(format!("{}: {error}", args.name.familiar())))?;
            print(&format!("{value:#}\n"))?;
        }
        ManifestCommand::Annotate(args) => {
            let mut change = Annotate {
                os: args.os.clone(),
                arch: args.arch.clone(),
                variant: args.variant.clone(),
                os_version: args.os_version.clone(),
                os_features: args.os_features.clone(),
                ..Annotate::default()
            };
            for text in &args.annotation {
                let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                    return Err(Failure::usage(format!("--annotation {text:?} is not NAME=VALUE")));
                };
                change.annotations.insert(name.to_owned(), value.to_owned());
            }
            let platform = [&args.os, &args.arch, &args.variant, &args.os_version];
            if args.image.is_none()
                && (platform.iter().any(|part| part.is_some()) || !args.os_features.is_empty())
            {
                return Err(Failure::usage("a platform is an image's: name the image behind the list"));
            }
            lists.annotate(&args.list, args.image.as_ref(), &change)?;
        }
        ManifestCommand::Push(args) => {
            let (digest, copied) = lists.push(&args.list, args.to.as_ref())?;
            if args.purge {
                lists.remove(&args.list)?;
            }
            let name = args.to.as_ref().unwrap_or(&args.list).familiar();
            let (blobs, bytes) = copied.sent;
            print(&match args.quiet {
                true => format!("{digest}\n"),
                false => format!(
                    "pushed {name} ({blobs} blobs copied, {}, {} mounted)\ndigest {digest}\n",
                    human_size(bytes),
                    copied.mounted
                ),
            })?;
        }
        ManifestCommand::Rm(args) => {
            for list in &args.lists {
                lists.remove(list)?;
            }
        }
    }
    Ok(0)
}

impl From<ListError> for Failure {
    fn from(error: ListError) -> Self {
        match error {
            ListError::Build(error) => error.into(),
            ListError::Exists { .. } => Failure::usage(error.to_string()).hint("`--amend` adds to it"),
            ListError::Missing { .. } => {
                Failure::source(error.to_string()).hint("`kiln manifest create` makes one")
            }
            ListError::File { path, source } => Failure::store(format!("{}: {source}", path.display())),
            error => Failure::usage(error.to_string()),
        }
    }
}
