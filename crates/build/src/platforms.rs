//! A build for several platforms at once: one graph, in which what is the same stands once.

use kiln_content::ImageRecord;
use kiln_frontend::{HistoryEntry, Lowered};
use kiln_llb::{Location, SourceMap, Vertex, VertexId};
use kiln_oci::image::ImageConfig;
use kiln_oci::{Platform, SnapshotId};

use crate::attest::Predicate;
use crate::export::Assembled;
use crate::image::read_config;
use crate::{BuildError, Engine};

/// What one platform of a build is.
pub(crate) struct Target {
    pub(crate) platform: Platform,
    /// Its tree; `None`: no file at all.
    pub(crate) result: Option<VertexId>,
    pub(crate) config: ImageConfig,
    pub(crate) history: Vec<HistoryEntry>,
}

impl Target {
    /// All of `lowered`, whose vertices have other places now.
    fn of(platform: Platform, lowered: &Lowered, place: impl Fn(VertexId) -> VertexId) -> Self {
        let moved = |entry: &HistoryEntry| HistoryEntry { vertex: entry.vertex.map(&place), ..entry.clone() };
        Self {
            platform,
            result: lowered.result.map(&place),
            config: lowered.config.clone(),
            history: lowered.history.iter().map(moved).collect(),
        }
    }
}

/// Joins what was lowered for each platform, one at least: the first one's, with the steps of all, and each.
pub(crate) fn join(mut all: Vec<(Platform, Lowered)>) -> Option<(Lowered, Vec<Target>)> {
    if all.len() == 1 {
        let (platform, lowered) = all.pop()?;
        let target = Target::of(platform, &lowered, |id| id);
        return Some((lowered, vec![target]));
    }
    let mut joined: Option<Lowered> = None;
    let mut targets = Vec::with_capacity(all.len());
    // For each step who names it, and whose it is: `None` for one of several.
    let mut names: Vec<(String, Option<Location>, Option<Platform>)> = Vec::new();
    for (platform, lowered) in all {
        let mut places: Vec<VertexId> = Vec::with_capacity(lowered.definition.vertices().len());
        let mut definition =
            joined.as_mut().map(|all| std::mem::take(&mut all.definition)).unwrap_or_default();
        for (nth, vertex) in lowered.definition.vertices().iter().enumerate() {
            let inputs = vertex.inputs.iter().map(|input| places[input.0]).collect();
            let id = definition.push(Vertex { op: vertex.op.clone(), inputs });
            places.push(id);
            match names.get_mut(id.0) {
                Some((_, _, of)) => *of = None,
                None => {
                    let from = VertexId(nth);
                    let (title, location) =
                        (lowered.source_map.title(from), lowered.source_map.location(from));
                    names.push((title.to_owned(), location.cloned(), Some(platform.clone())));
                }
            }
        }
        targets.push(Target::of(platform, &lowered, |id| places[id.0]));
        let all = match joined.take() {
            None => lowered,
            Some(mut all) => {
                all.warnings_are_errors |= lowered.warnings_are_errors;
                let news = lowered.warnings.into_iter().filter(|warning| !all.warnings.contains(warning));
                let news: Vec<_> = news.collect();
                all.warnings.extend(news);
                all
            }
        };
        joined = Some(Lowered { definition, ..all });
    }
    let mut joined = joined?;
    joined.source_map = SourceMap::default();
    for (nth, (title, location, of)) in names.into_iter().enumerate() {
        let title = of.map_or_else(|| title.clone(), |target| for_target(&title, &target));
        joined.source_map.insert(VertexId(nth), title, location);
    }
    Some((joined, targets))
}

/// The title of a step that is made for `target` alone, by another platform perhaps:
/// `[linux/amd64->arm/v7 build 2/5] RUN make`.
fn for_target(title: &str, target: &Platform) -> String {
    let plain = || title.to_owned();
    let Some((by, rest)) = title.strip_prefix('[').and_then(|rest| rest.split_once(' ')) else {
        return plain();
    };
    let name = target.to_string();
    let os = |platform: &str| platform.split('/').next().unwrap_or_default().to_owned();
    if !by.contains('/') || by == name {
        return plain();
    }
    let short = if os(by) == target.os { &name[target.os.len() + 1..] } else { &name };
    format!("[{by}->{short} {rest}")
}

/// What was built for one platform.
pub(crate) struct Product {
    pub(crate) platform: Platform,
    /// `None`: no output wants an image.
    pub(crate) image: Option<Assembled>,
    pub(crate) top: Option<SnapshotId>,
    /// What is said of it.
    pub(crate) predicates: Vec<Predicate>,
}

impl Product {
    /// When its image was made; seconds since 1970, and 0 when nobody knows.
    pub(crate) fn created_unix(&self) -> i64 {
        let config = self.image.as_ref().and_then(|image| serde_json::from_slice(&image.config_json).ok());
        let created = config.and_then(|config: ImageConfig| config.created);
        created.and_then(|at| at.parse::<jiff::Timestamp>().ok()).map_or(0, |at| at.as_second())
    }
}

/// Whether an image that says this of itself is good for `wanted`. One that says nothing is.
pub(crate) fn serves(wanted: &Platform, config: &ImageConfig) -> bool {
    let is_silent = config.os.is_empty() || config.architecture.is_empty();
    is_silent || wanted.distance(&config.platform()).is_some()
}

/// What the image of the store says that it is for, and whether that is good for `wanted`.
pub(crate) fn stored_platform(
    engine: &Engine,
    image: &ImageRecord,
    wanted: &Platform,
) -> Result<(Platform, bool), BuildError> {
    let config = read_config(engine, &image.config)?;
    Ok((config.platform(), serves(wanted, &config)))
}

#[cfg(test)]
mod tests {
    use kiln_frontend::{Lowering, Options, lower, parse};

    use super::*;

    fn lowered(text: &str, platform: &str) -> (Platform, Lowered) {
        let (ast, _) = parse(text);
        let platform: Platform = platform.parse().unwrap();
        let build_platform = "linux/amd64".parse().unwrap();
        let options = Options { build_platform, names_platform: true, ..Options::new(platform.clone()) };
        match lower(&ast, &options, &Default::default()).unwrap() {
            Lowering::Done(lowered) => (platform, *lowered),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_the_same_for_all_platforms_is_one_step() {
        let text = "FROM --platform=$BUILDPLATFORM scratch AS all\nCOPY a /\n\
                    FROM --platform=$BUILDPLATFORM scratch AS own\nARG TARGETARCH\nCOPY $TARGETARCH /\n\
                    FROM scratch\nCOPY --from=all / /\nCOPY --from=own / /\n";
        let all = ["linux/amd64", "linux/arm/v7", "darwin/arm64"].map(|platform| lowered(text, platform));
        let (joined, targets) = join(all.into()).unwrap();
        let count = joined.definition.vertices().len();
        let titles: Vec<&str> = (0..count).map(|at| joined.source_map.title(VertexId(at))).collect();
        assert_eq!(
            titles,
            [
                "[internal] load build context",
                "[linux/amd64 all 1/1] COPY a /",
                "[linux/amd64 own 1/1] COPY $TARGETARCH /",
                "[linux/amd64 stage-2 1/2] COPY --from=all / /",
                "[linux/amd64 stage-2 2/2] COPY --from=own / /",
                "[linux/amd64->arm/v7 own 1/1] COPY $TARGETARCH /",
                "[linux/arm/v7 stage-2 2/2] COPY --from=own / /",
                "[linux/amd64->darwin/arm64 own 1/1] COPY $TARGETARCH /",
                "[darwin/arm64 stage-2 2/2] COPY --from=own / /",
            ]
        );
        let results: Vec<_> = targets.iter().map(|target| target.result.unwrap().0).collect();
        assert_eq!(results, [4, 6, 8]);
        assert!(targets.iter().all(|target| target.history[0].vertex == Some(VertexId(3))));
        let of: Vec<String> = targets.iter().map(|target| target.config.platform().to_string()).collect();
        assert_eq!(of, ["linux/amd64", "linux/arm/v7", "darwin/arm64"]);
    }
}
