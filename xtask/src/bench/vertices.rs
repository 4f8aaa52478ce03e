//! What a build costs when all of its steps are cached, by how many they are.

use std::path::Path;
use std::time::Duration;

use super::cache::{Builder, IMAGE, LARGE_SAMPLES, Line, again};
use super::{Row, write};
use crate::step::{self, Failure};

/// Stages of copies that all differ, and one that copies from each of them.
struct Graph {
    stages: usize,
    /// In each stage.
    copies: usize,
}

const SMALL: Graph = Graph { stages: 10, copies: 19 };
const LARGE: Graph = Graph { stages: 100, copies: 99 };

impl Graph {
    fn steps(&self) -> usize {
        self.stages * (self.copies + 1)
    }

    fn dockerfile(&self) -> String {
        let mut text = String::new();
        for stage in 0..self.stages {
            text.push_str(&format!("FROM busybox AS s{stage}\n"));
            (0..self.copies).for_each(|copy| text.push_str(&format!("COPY f /{stage}/{copy}\n")));
        }
        text.push_str("FROM busybox\n");
        (0..self.stages)
            .for_each(|stage| text.push_str(&format!("COPY --from=s{stage} /{stage} /{stage}\n")));
        text
    }

    /// Whether a builder makes so many steps in minutes: buildah and podman look through all images for each.
    fn is_for(&self, builder: &Builder<'_>) -> bool {
        self.steps() <= SMALL.steps() || ["kiln", "docker"].contains(&builder.name())
    }

    fn measure(&self, builder: &Builder<'_>, context: &Path) -> Result<Vec<Duration>, Failure> {
        again(builder, context, LARGE_SAMPLES)
    }
}

/// Lines of the table; `dir` is for contexts.
pub(super) fn lines(builders: &[Builder<'_>], dir: &Path) -> Result<Vec<Line>, Failure> {
    let mut lines = Vec::new();
    for graph in [SMALL, LARGE] {
        let context = dir.join(format!("steps-{}", graph.steps()));
        write(&context.join("Dockerfile"), &graph.dockerfile())?;
        write(&context.join("f"), "f\n")?;
        let title = format!("nothing changed: {} steps in {} stages", graph.steps(), graph.stages);
        let mut rows = Vec::new();
        for builder in builders.iter().filter(|builder| graph.is_for(builder)) {
            step::note(&format!("{}: {title}", builder.name()));
            rows.push(Row { builder: builder.name().to_owned(), times: graph.measure(builder, &context)? });
            builder.remove(IMAGE)?;
        }
        lines.push(Line { title, rows });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_steps_as_are_said_and_no_two_are_the_same() {
        for (graph, steps) in [(SMALL, 200), (LARGE, 10_000)] {
            let text = graph.dockerfile();
            let different: std::collections::HashSet<&str> =
                text.lines().filter(|line| line.starts_with("COPY")).collect();
            assert_eq!((graph.steps(), different.len()), (steps, steps));
        }
    }
}
