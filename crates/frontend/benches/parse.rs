//! Time to parse and lower large Dockerfiles, at three sizes each: `cargo bench -p kiln-frontend`.
//! Prints a Markdown table; the last column is 2 where time is proportional to the size. A word behind `--` chooses rows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kiln_frontend::ignore::Patterns;
use kiln_frontend::{Lowering, Options, lower, parse};

const SAMPLES: usize = 5;
const MIB: usize = 1 << 20;

/// Something whose time depends on a size.
struct Shape {
    what: &'static str,
    unit: &'static str,
    sizes: [usize; 3],
    /// The input of a size.
    make: fn(usize) -> String,
    /// The work on it.
    run: fn(&str),
}

const SHAPES: &[Shape] = &[
    Shape { what: "instructions", unit: "bytes", sizes: SIZES, make: instructions, run: whole },
    Shape { what: "one RUN line", unit: "bytes", sizes: LINE, make: one_line, run: whole },
    Shape { what: "one continued RUN", unit: "bytes", sizes: SIZES, make: continued, run: whole },
    Shape { what: "one here-document", unit: "bytes", sizes: SIZES, make: heredoc, run: whole },
    Shape { what: "stages in a chain", unit: "stages", sizes: STAGES, make: chain, run: whole },
    Shape { what: "stages, parsed only", unit: "stages", sizes: STAGES, make: chain, run: parsed },
    Shape { what: "stages copied together", unit: "stages", sizes: STAGES, make: gathered, run: whole },
    Shape { what: ".dockerignore", unit: "rules", sizes: RULES, make: rules, run: ignore },
    Shape { what: "20 ignore rules", unit: "paths", sizes: PATHS, make: paths, run: ignored },
];
const SIZES: [usize; 3] = [MIB / 4, MIB / 2, MIB - 64];
/// A physical line ends at 64 KiB.
const LINE: [usize; 3] = [15_000, 30_000, 60_000];
const STAGES: [usize; 3] = [2_500, 5_000, 10_000];
const RULES: [usize; 3] = [250_000, 500_000, 1_000_000];
const PATHS: [usize; 3] = [25_000, 50_000, 100_000];

/// What such files usually hold.
const USUAL: &str = ".git\n.github\n**/node_modules\n**/*.log\n**/*.tmp\n*.md\n!README.md\ntarget\ndist\nbuild\n.env*\n\
    **/__pycache__\n**/*.pyc\n.vscode\n.idea\ncoverage\n**/.DS_Store\ndocs/**/*.pdf\nDockerfile*\ncompose.y*ml\n";

fn main() {
    println!("### Large inputs, ms (least of {SAMPLES})\n");
    println!("| input | sizes | quarter | half | full | full / half |\n|---|---|--:|--:|--:|--:|");
    // Cargo itself adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let chosen = |shape: &&Shape| words.is_empty() || words.iter().any(|word| shape.what.contains(word));
    for shape in SHAPES.iter().filter(chosen) {
        let times = shape.sizes.map(|size| least(shape.run, &(shape.make)(size)));
        let [quarter, half, full] = times.map(|time| time.as_secs_f64() * 1e3);
        let [_, _, size] = shape.sizes;
        println!(
            "| {} | {size} {} | {quarter:.1} | {half:.1} | {full:.1} | {:.1} |",
            shape.what,
            shape.unit,
            full / half
        );
    }
}

fn least(run: fn(&str), input: &str) -> Duration {
    let sample = || {
        let start = Instant::now();
        run(input);
        start.elapsed()
    };
    (0..SAMPLES).map(|_| sample()).min().unwrap_or_default()
}

fn parsed(text: &str) {
    let (_, diagnostics) = parse(text);
    assert!(diagnostics.iter().all(|diagnostic| !diagnostic.is_error()), "{diagnostics:?}");
}

fn whole(text: &str) {
    let (ast, diagnostics) = parse(text);
    assert!(diagnostics.iter().all(|diagnostic| !diagnostic.is_error()), "{diagnostics:?}");
    let platform = "linux/amd64".parse().expect("a platform");
    match lower(&ast, &Options::new(platform), &BTreeMap::new()) {
        Ok(Lowering::Done(lowered)) => assert!(lowered.result.is_some()),
        other => panic!("{other:?}"),
    }
}

fn ignore(text: &str) {
    let rules = Patterns::parse(text).expect("rules");
    assert!(!rules.is_ignored("src/main.rs"));
}

fn ignored(paths: &str) {
    let rules = Patterns::parse(USUAL).expect("rules");
    let count = paths.lines().filter(|path| rules.is_ignored(path)).count();
    assert!(count > 0 && count < paths.lines().count());
}

fn repeated(head: &str, unit: &str, size: usize) -> String {
    let mut text = String::from(head);
    while text.len() + unit.len() <= size {
        text.push_str(unit);
    }
    text
}

fn instructions(size: usize) -> String {
    let unit = "# what it does\nRUN apt-get update && \\\n    apt-get install -y gcc\nCOPY --chown=1:1 src/*.c /src/\nENV PATH=\"/opt/bin:$PATH\" X=${Y:-z}\nWORKDIR /src\n";
    // PATH would grow with each round, and that is no matter of parsing.
    let unit = unit.replace(":$PATH", "");
    repeated("FROM scratch\n", &unit, size)
}

fn one_line(size: usize) -> String {
    repeated("FROM scratch\nRUN true", " && true", size)
}

fn continued(size: usize) -> String {
    repeated("FROM scratch\nRUN true", " \\\n && true", size)
}

fn heredoc(size: usize) -> String {
    repeated("FROM scratch\nRUN <<EOF\n", "echo hello\n", size - 8) + "EOF\n"
}

fn chain(count: usize) -> String {
    let stage = |at: usize| match at {
        0 => "FROM scratch AS s0\nCOPY a /a\n".to_owned(),
        at => format!("FROM s{} AS s{at}\nRUN step {at}\n", at - 1),
    };
    (0..count).map(stage).collect()
}

fn gathered(count: usize) -> String {
    let stages = (0..count).map(|at| format!("FROM scratch AS s{at}\nCOPY f{at} /f\n"));
    let copies = (0..count).map(|at| format!("COPY --from=s{at} /f /f{at}\n"));
    stages.chain(["FROM scratch\n".to_owned()]).chain(copies).collect()
}

fn rules(count: usize) -> String {
    (0..count).map(|at| format!("**/dir{at}/*.o\n")).collect()
}

fn paths(count: usize) -> String {
    let path = |at: usize| match at % 10 {
        0 => format!("web/node_modules/package{at}/index.js\n"),
        _ => format!("src/component{}/part{at}/source_file_{at}.rs\n", at % 100),
    };
    (0..count).map(path).collect()
}
