//! `--no-cache`: which steps are run again although there may be a result.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use kiln_frontend::Lowered;
use kiln_llb::VertexId;

use crate::shell::{is_stage, stage_of, without_platform};
use crate::{BuildError, StepNumber};

/// Which results of earlier builds do not count. What stands on a step that runs again is looked up by what
/// comes out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NoCache {
    /// None of them; cache mounts start empty, too.
    pub all: bool,
    /// Those of these steps.
    pub steps: Vec<StepChoice>,
    /// Those of stages with these names, in whatever case; names that no stage has are passed by
    /// (`--no-cache-filter`, as BuildKit has it).
    pub stages: Vec<String>,
}

/// Steps of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepChoice {
    /// All steps of a stage.
    Stage(String),
    /// One step, by its number.
    Number(StepNumber),
    /// The step that this line of the Dockerfile belongs to, counted from 1.
    Line(usize),
}

impl FromStr for StepChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(line) = text.strip_prefix("line:") {
            let line = line.parse().ok().filter(|line| *line > 0);
            return line.map(StepChoice::Line).ok_or_else(|| format!("{text:?} is no line such as line:7"));
        }
        match text.parse() {
            Ok(number) => Ok(StepChoice::Number(number)),
            Err(_) if !text.is_empty() && !text.contains(':') => Ok(StepChoice::Stage(text.to_owned())),
            Err(_) => Err(format!("{text:?} is no step such as STAGE, 2, STAGE:2 or line:7")),
        }
    }
}

impl fmt::Display for StepChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StepChoice::Stage(name) => f.write_str(name),
            StepChoice::Number(number) => number.fmt(f),
            StepChoice::Line(line) => write!(f, "line:{line}"),
        }
    }
}

/// The steps of one build that run again.
#[derive(Debug, Clone, Default)]
pub(crate) struct MadeAgain {
    all: bool,
    /// By vertex: the option that says so.
    some: BTreeMap<usize, String>,
}

impl MadeAgain {
    /// What `no_cache` means in this build.
    ///
    /// # Errors
    /// [`BuildError::NoStep`] for a step that the build does not have, and a stage that the Dockerfile does not.
    pub(crate) fn find(no_cache: &NoCache, lowered: &Lowered) -> Result<Self, BuildError> {
        let NoCache { all, steps, stages } = no_cache;
        let mut again = Self { all: *all, some: BTreeMap::new() };
        for name in stages {
            for vertex in of_stage(lowered, name) {
                again.some.entry(vertex).or_insert_with(|| format!("--no-cache-filter={name}"));
            }
        }
        for step in steps {
            let found = vertices_of(lowered, step);
            let is_left_out =
                |name: &String| lowered.stages.iter().any(|known| known.eq_ignore_ascii_case(name));
            if found.is_empty() && !matches!(step, StepChoice::Stage(name) if is_left_out(name)) {
                let titles = (0..lowered.definition.vertices().len()).map(|at| title(lowered, at));
                let steps = titles.filter(|title| stage_of(title).is_some()).map(str::to_owned).collect();
                return Err(BuildError::NoStep { what: step.to_string(), steps });
            }
            for vertex in found {
                again.some.entry(vertex).or_insert_with(|| format!("--no-cache={step}"));
            }
        }
        Ok(again)
    }

    /// Every step runs again.
    pub(crate) fn is_all(&self) -> bool {
        self.all
    }

    /// The option because of which `vertex` runs again; `None`: it need not.
    pub(crate) fn reason(&self, vertex: usize) -> Option<&str> {
        let own = self.some.get(&vertex).map(String::as_str);
        if self.all { Some("--no-cache") } else { own }
    }
}

fn title(lowered: &Lowered, vertex: usize) -> &str {
    lowered.source_map.title(VertexId(vertex))
}

fn of_stage(lowered: &Lowered, name: &str) -> Vec<usize> {
    let vertices = 0..lowered.definition.vertices().len();
    let of = |at: &usize| stage_of(title(lowered, *at)).is_some_and(|(stage, _)| is_stage(stage, name));
    vertices.filter(of).collect()
}

fn vertices_of(lowered: &Lowered, step: &StepChoice) -> Vec<usize> {
    let vertices = 0..lowered.definition.vertices().len();
    match step {
        StepChoice::Stage(name) => of_stage(lowered, name),
        StepChoice::Number(number) => {
            let built = lowered.result.and_then(|id| stage_of(title(lowered, id.0))).map(|(stage, _)| stage);
            let stage = number.stage.as_deref().or(built.map(without_platform)).unwrap_or_default();
            let is_it = |at: &usize| {
                stage_of(title(lowered, *at))
                    .is_some_and(|(name, nth)| is_stage(name, stage) && nth == number.number)
            };
            vertices.filter(is_it).collect()
        }
        StepChoice::Line(line) => {
            let is_there = |at: &usize| {
                let location = lowered.source_map.location(VertexId(*at));
                location.is_some_and(|at| (at.first_line..=at.last_line).contains(line))
            };
            vertices.filter(is_there).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_named_as_kiln_why_names_them() {
        let number = |stage: Option<&str>, number| {
            StepChoice::Number(StepNumber { stage: stage.map(str::to_owned), number })
        };
        assert_eq!("2".parse(), Ok(number(None, 2)));
        assert_eq!("build:3".parse(), Ok(number(Some("build"), 3)));
        assert_eq!("build".parse(), Ok(StepChoice::Stage("build".to_owned())));
        assert_eq!("line:7".parse(), Ok(StepChoice::Line(7)));
        for wrong in ["", "line:", "line:0", "build:x", ":"] {
            assert!(wrong.parse::<StepChoice>().is_err(), "{wrong}");
        }
        for right in ["2", "build:3", "build", "line:7"] {
            assert_eq!(right.parse::<StepChoice>().map(|step| step.to_string()), Ok(right.to_owned()));
        }
    }
}
