//! What a build leaves, out of `--output` and its kin; the files that tell of it.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;

use kiln_build::Built;
use kiln_build::export::{ImageOutput, Output, write_whole};
use serde_json::{Map, Value, json};

use crate::args::BuildArgs;
use crate::errors::Failure;

/// The outputs that a command line asks for; none: an image in the store.
pub(super) fn outputs(args: &BuildArgs) -> Result<Vec<Output>, Failure> {
    let mut outputs = args.output.clone();
    if args.push {
        let image = outputs.iter_mut().find_map(|output| match output {
            Output::Image(image) => Some(image),
            _ => None,
        });
        match image {
            Some(image) => image.push = true,
            None => outputs.push(Output::Image(ImageOutput { push: true, ..ImageOutput::default() })),
        }
    }
    let wants_image = args.load || (outputs.is_empty() && !args.annotation.is_empty());
    if wants_image && !outputs.iter().any(|output| matches!(output, Output::Image(_))) {
        outputs.push(Output::image(&[]));
    }
    for output in &mut outputs {
        output.set_names(&args.tag);
        for text in &args.annotation {
            let Some(format) = output.format_mut() else { continue };
            format.annotations.add_flag(text).map_err(|error| Failure::usage(error.to_string()))?;
        }
    }
    let nameless = |output: &Output| matches!(output, Output::Image(ImageOutput { push: true, names, .. }) if names.is_empty());
    if outputs.iter().any(nameless) {
        return Err(Failure::usage("a push needs a name: `-t HOST/NAME:TAG`"));
    }
    match outputs.iter().filter(|output| output.is_stdout()).count() {
        0 => {}
        1 if io::stdout().is_terminal() => {
            return Err(Failure::usage("files do not go to a terminal; name a place with dest="));
        }
        1 => {}
        _ => return Err(Failure::usage("only one output can go to standard output")),
    }
    Ok(outputs)
}

/// Removes the file of an earlier build: a build that fails leaves no image ID.
pub(super) fn forget_id(args: &BuildArgs) -> Result<(), Failure> {
    let Some(path) = args.iidfile.as_deref().filter(|path| path.is_file()) else { return Ok(()) };
    fs::remove_file(path)
        .map_err(|error| Failure::source(format!("cannot remove {}: {error}", path.display())))
}

/// Writes `--iidfile` and `--metadata-file`.
pub(super) fn write_results(args: &BuildArgs, built: &Built) -> Result<(), Failure> {
    if let Some(path) = &args.iidfile {
        let id = built.id.map(|id| id.to_string()).unwrap_or_default();
        write_whole(path, id.as_bytes())?;
    }
    if let Some(path) = &args.metadata_file {
        write_metadata(path, built)?;
    }
    Ok(())
}

/// The keys that docker's `--metadata-file` has.
fn write_metadata(path: &Path, built: &Built) -> Result<(), Failure> {
    let mut keys = Map::new();
    let mut set = |key: &str, value: Value| keys.insert(key.to_owned(), value);
    // An index has no config of its own.
    if let Some(id) = built.id.filter(|_| built.platforms.len() < 2) {
        set("containerimage.config.digest", json!(id));
    }
    if let Some(manifest) = &built.manifest {
        set("containerimage.descriptor", json!(manifest));
        set("containerimage.digest", json!(manifest.digest));
    }
    if !built.names.is_empty() {
        let names: Vec<String> = built.names.iter().map(ToString::to_string).collect();
        set("image.name", json!(names.join(",")));
    }
    let text = serde_json::to_string_pretty(&keys).map_err(|error| Failure::store(error.to_string()))?;
    Ok(write_whole(path, format!("{text}\n").as_bytes())?)
}
