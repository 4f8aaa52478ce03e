//! `kiln build --check` and `--call`: what can be said of a Dockerfile without building it.

use std::sync::Arc;

use kiln_frontend::{Diagnostic, Outline, Target};

use crate::dockerfile::Dockerfile;
use crate::input::Reader;
use crate::lock::Pins;
use crate::lowering::{Purpose, lower};
use crate::{BuildCancel, BuildError, BuildRequest, Engine};

/// What a check found.
#[derive(Debug)]
pub struct Checked {
    /// The Dockerfile, for showing places.
    pub dockerfile: Arc<Dockerfile>,
    /// Warnings in file order.
    pub warnings: Vec<Diagnostic>,
    /// What would keep it from being built.
    pub errors: Vec<Diagnostic>,
}

/// Looks at all stages, or at what `request.target` needs, and runs nothing. Images of which nothing
/// is known here are taken as unknown.
///
/// # Errors
/// When the Dockerfile or the context cannot be read; what is wrong inside is in the result.
pub fn check(engine: &Engine, request: &BuildRequest, cancel: &BuildCancel) -> Result<Checked, BuildError> {
    let reader = Reader { engine, request, cancel };
    let input = reader.read()?;
    let mut pins = Pins::seen(engine, &input.lock, request.lock);
    match lower(&reader, &input, Purpose::Check, &request.targets()[0], &mut pins) {
        Ok((lowered, _)) => {
            Ok(Checked { dockerfile: input.dockerfile, warnings: lowered.warnings, errors: Vec::new() })
        }
        Err(BuildError::Dockerfile { dockerfile, diagnostics }) => {
            let (errors, warnings) = diagnostics.into_iter().partition(Diagnostic::is_error);
            Ok(Checked { dockerfile, warnings, errors })
        }
        Err(error) => Err(error),
    }
}

/// What can be passed to the build that `request` asks for.
///
/// # Errors
/// [`BuildError::Dockerfile`] and what keeps it from being read.
pub fn outline(engine: &Engine, request: &BuildRequest, cancel: &BuildCancel) -> Result<Outline, BuildError> {
    let reader = Reader { engine, request, cancel };
    let input = reader.read()?;
    let mut pins = Pins::seen(engine, &input.lock, request.lock);
    Ok(lower(&reader, &input, Purpose::Look, &request.targets()[0], &mut pins)?.0.outline)
}

/// The stages that `--target` can name, in file order.
///
/// # Errors
/// [`BuildError::Dockerfile`] and what keeps it from being read.
pub fn targets(
    engine: &Engine,
    request: &BuildRequest,
    cancel: &BuildCancel,
) -> Result<Vec<Target>, BuildError> {
    let input = Reader { engine, request, cancel }.read()?;
    let (ast, diagnostics) = kiln_frontend::parse(&input.dockerfile.text);
    if diagnostics.iter().any(Diagnostic::is_error) {
        return Err(BuildError::Dockerfile { dockerfile: input.dockerfile, diagnostics });
    }
    Ok(kiln_frontend::targets(&ast))
}
