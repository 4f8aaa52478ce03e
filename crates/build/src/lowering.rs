//! From the text of a Dockerfile to a definition, with the images that it stands on.

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_frontend::{BaseImage, Diagnostic, EpochTime, ImageKey, Lowered, Lowering, Options};
use kiln_oci::Platform;

use crate::BuildError;
use crate::attest::Stood;
use crate::bases::{Finder, StandsOn};
use crate::input::{Input, Reader};
use crate::lock::Pins;
use crate::platforms::{Target, join};
use crate::registry::Resolved;

/// What the definition is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// It will be solved: every image must be there, or at a registry.
    Build,
    /// Only what is said about it counts: an image that is not there is taken for an empty one.
    Look,
    /// The same, at all stages.
    Check,
}

/// A Dockerfile that was understood, for every platform of the request.
pub(crate) struct Understood {
    /// The first one's, with the steps of all.
    pub(crate) lowered: Lowered,
    pub(crate) targets: Vec<Target>,
    /// Those of the images that it stands on of which no layer has come.
    pub(crate) unpulled: Vec<Arc<Resolved>>,
    /// All of them; none where nobody asks.
    pub(crate) stood: Vec<Stood>,
}

/// Lowers the Dockerfile for every platform of the request.
pub(crate) fn lower_all(
    reader: &Reader<'_>,
    input: &Input,
    purpose: Purpose,
    pins: &mut Pins,
) -> Result<Understood, BuildError> {
    let (mut unpulled, mut stood) = (Vec::new(), Vec::new());
    let lowered = |platform: Platform| {
        let (lowered, bases) = lower(reader, input, purpose, &platform, pins)?;
        unpulled.extend(bases.unpulled);
        stood.extend(bases.stood);
        Ok((platform, lowered))
    };
    let all = reader.request.targets().into_iter().map(lowered).collect::<Result<_, BuildError>>()?;
    let (lowered, targets) =
        join(all).ok_or_else(|| BuildError::Bug { what: "a build for no platform".to_owned() })?;
    Ok(Understood { lowered, targets, unpulled, stood })
}

/// Rounds of asking for base images; each round needs one more, and stages are bounded.
const MAX_ROUNDS: usize = 1000;

/// Parses and lowers the Dockerfile of a request for `platform`, with the images it needs; `pins` says which those are,
/// and learns. Blocks when it asks for the time of something.
pub(crate) fn lower(
    reader: &Reader<'_>,
    input: &Input,
    purpose: Purpose,
    platform: &Platform,
    pins: &mut Pins,
) -> Result<(Lowered, StandsOn), BuildError> {
    let request = reader.request;
    let Input { dockerfile, ignore, named, .. } = input;
    let wrong = |diagnostics| BuildError::Dockerfile { dockerfile: dockerfile.clone(), diagnostics };
    let (ast, mut warnings) = kiln_frontend::parse(&dockerfile.text);
    if warnings.iter().any(Diagnostic::is_error) {
        return Err(wrong(warnings));
    }
    let mut options = Options {
        build_args: request.build_args.clone(),
        target: request.target.clone(),
        labels: request.labels.clone(),
        ignore: ignore.clone(),
        contexts: named.clone(),
        extra_hosts: request.extra_hosts.clone(),
        network: request.network,
        all_stages: purpose == Purpose::Check && request.target.is_none(),
        keep_owners: input.has_owners(),
        epoch: if purpose == Purpose::Build { EpochTime::Unasked } else { EpochTime::Unknown },
        build_platform: Platform::host(),
        names_platform: request.platforms.len() > 1,
        ..Options::new(platform.clone())
    };
    let mut images: BTreeMap<ImageKey, BaseImage> = BTreeMap::new();
    let mut finder = Finder { reader, dockerfile, ast: &ast, purpose, stands_on: StandsOn::default() };
    for _ in 0..MAX_ROUNDS {
        match kiln_frontend::lower(&ast, &options, &images).map_err(wrong)? {
            Lowering::Done(mut lowered) => {
                warnings.append(&mut lowered.warnings);
                lowered.warnings = warnings;
                return Ok((*lowered, finder.stands_on));
            }
            Lowering::NeedsTime(asked) => options.epoch = EpochTime::At(reader.time_of(input, &asked)?),
            Lowering::Needs(needs) => {
                for need in needs {
                    let image = finder.image(&need, pins, &mut warnings)?;
                    images.insert(need.image, image);
                }
            }
        }
    }
    Err(BuildError::Bug { what: "the frontend keeps asking for base images".to_owned() })
}
