//! Reads what `kiln build --progress plain` prints: `#3 [stage-0 2/4] RUN make`, `#3 CACHED`.

use std::collections::BTreeMap;

/// What became of the steps of one build.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Steps answered from the cache.
    pub(crate) cached: usize,
    /// Titles of the instructions that ran. Base images count as neither.
    pub(crate) ran: Vec<String>,
}

/// Reads the progress lines of one build.
pub(crate) fn read(stderr: &str) -> Outcome {
    let mut titles: BTreeMap<&str, &str> = BTreeMap::new();
    let mut cached: Vec<&str> = Vec::new();
    for line in stderr.lines() {
        let Some((number, rest)) = line.strip_prefix('#').and_then(|line| line.split_once(' ')) else {
            continue;
        };
        if rest.starts_with('[') {
            titles.entry(number).or_insert(rest);
        } else if rest == "CACHED" {
            cached.push(number);
        }
    }
    let is_cached = |number: &str| cached.contains(&number);
    let ran = titles.iter().filter(|(number, title)| !is_cached(number) && is_instruction(title));
    let ran = ran.map(|(_, title)| (*title).to_owned()).collect();
    Outcome { cached: titles.keys().filter(|number| is_cached(number)).count(), ran }
}

// `[compile 2/5] RUN gcc`, against `[internal] load build context` and `[compile 1/5] FROM debian`.
fn is_instruction(title: &str) -> bool {
    let what = title.split_once("] ").map_or("", |(_, what)| what);
    ["RUN", "COPY", "ADD", "WORKDIR"].contains(&what.split(' ').next().unwrap_or(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_cached_or_ran() {
        let stderr = "#1 [internal] load build context\n#1 DONE 0.0s\n#2 [stage-0 1/3] FROM debian\n#2 DONE 0.0s\n\
                      #3 [stage-0 2/3] RUN make\n#4 [stage-0 3/3] COPY a b\n#3 CACHED\n#4 0.1 CACHED\n#4 DONE 0.1s\n";
        assert_eq!(read(stderr), Outcome { cached: 1, ran: vec!["[stage-0 3/3] COPY a b".into()] });
    }

    #[test]
    fn other_lines_are_no_steps() {
        assert_eq!(read("error: no\n# comment\n#\n"), Outcome { cached: 0, ran: vec![] });
    }
}
