//! What is said of a Dockerfile: `--check`, `--call`, and warnings beside a build. The whole
//! screen stands here, because it is what users read.

use crate::harness::{Context, Outcome, Store, needs_root};

/// Runs in the context, so that the Dockerfile's name is short.
fn call(store: &Store, context: &Context, args: &[&str]) -> Outcome {
    let mut all = vec!["build"];
    all.extend(args);
    let mut command = store.command(&all);
    command.current_dir(context.path());
    store.bounded(command)
}

#[track_caller]
fn check_screen(dockerfile: &str, args: &[&str], code: i32, stdout: &str) {
    let (store, context) = (Store::empty(), Context::new(&[("Dockerfile", dockerfile)]));
    let outcome = call(&store, &context, args).expect(code);
    assert_eq!(outcome.stdout, stdout, "\n{}", outcome.stdout);
    assert_eq!(outcome.stderr, "");
}

/// The parsed answer.
#[track_caller]
fn answer(dockerfile: &str, args: &[&str], code: i32) -> serde_json::Value {
    let (store, context) = (Store::empty(), Context::new(&[("Dockerfile", dockerfile)]));
    let outcome = call(&store, &context, args).expect(code);
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {}", outcome.stdout))
}

const TWO_WARNINGS: &str = "FROM busybox as base\nFROM base\nCMD echo hello\n";

#[test]
fn a_check_without_findings_says_so() {
    needs_root!();
    check_screen("FROM busybox\nRUN true\n", &["--check"], 0, "Dockerfile: no warnings\n");
}

#[test]
fn a_check_shows_each_warning_where_it_stands() {
    needs_root!();
    let screen = "\
warning: FromAsCasing: `as` and `FROM` are cased differently
  Dockerfile:1:6
     1 | >>> FROM busybox as base
       |          ^^^^^^^^^^^^^^^
see https://docs.docker.com/go/dockerfile/rule/from-as-casing/

warning: JSONArgsRecommended: CMD in shell form runs a shell, and signals do not reach the program
  Dockerfile:3:5
     2 |     FROM base
     3 | >>> CMD echo hello
       |         ^^^^^^^^^^
hint: write CMD [\"program\", \"argument\"]
see https://docs.docker.com/go/dockerfile/rule/json-args-recommended/

Dockerfile: 2 warnings
";
    check_screen(TWO_WARNINGS, &["--check"], 1, screen);
    check_screen(TWO_WARNINGS, &["--call=check"], 1, screen);
}

#[test]
fn a_check_shows_an_error_and_ends_with_3() {
    needs_root!();
    let screen = "\
error: unknown instruction `RNU`
  Dockerfile:2:1
     1 |     FROM busybox
     2 | >>> RNU true
       |     ^^^
hint: did you mean `RUN`?

Dockerfile: 1 error
";
    check_screen("FROM busybox\nRNU true\n", &["--check"], 3, screen);
}

#[test]
fn a_check_as_json_has_rules_places_and_the_text() {
    needs_root!();
    let json = answer(TWO_WARNINGS, &["--call=check,format=json"], 1);
    assert_eq!(json["sources"], serde_json::json!([{ "filename": "Dockerfile", "data": TWO_WARNINGS }]));
    assert_eq!(json["buildError"], serde_json::Value::Null);
    assert_eq!(
        json["warnings"][0],
        serde_json::json!({
            "ruleName": "FromAsCasing",
            "description": "Write `as` in the same case as `from`",
            "url": "https://docs.docker.com/go/dockerfile/rule/from-as-casing/",
            "detail": "`as` and `FROM` are cased differently",
            "hint": null,
            "location": {
                "sourceIndex": 0,
                "ranges": [{ "start": { "line": 1, "character": 5 }, "end": { "line": 1, "character": 20 } }],
            },
        })
    );
    assert_eq!(json["warnings"][1]["ruleName"], "JSONArgsRecommended");
    assert_eq!(json["warnings"].as_array().map(Vec::len), Some(2));

    let json = answer("FROM busybox\nRNU true\n", &["--call=check,format=json"], 3);
    assert_eq!(
        json["buildError"],
        serde_json::json!({
            "message": "unknown instruction `RNU`",
            "location": {
                "sourceIndex": 0,
                "ranges": [{ "start": { "line": 2, "character": 0 }, "end": { "line": 2, "character": 3 } }],
            },
        })
    );
    assert_eq!(answer("FROM busybox\n", &["--call=check,format=json"], 0)["warnings"], serde_json::json!([]));
}

#[test]
fn rules_are_skipped_for_a_file_and_warnings_made_errors() {
    needs_root!();
    let with = |directive: &str| format!("# check={directive}\n{TWO_WARNINGS}");
    check_screen(&with("skip=all"), &["--check"], 0, "Dockerfile: no warnings\n");
    let one = answer(&with("skip=FromAsCasing"), &["--call=check,format=json"], 1);
    assert_eq!(one["warnings"].as_array().map(Vec::len), Some(1));
    assert_eq!(one["warnings"][0]["ruleName"], "JSONArgsRecommended");
    check_screen(&with("skip=all;error=true"), &["--check"], 0, "Dockerfile: no warnings\n");
    // A check tells warnings from errors by its exit code already.
    call(&Store::empty(), &Context::new(&[("Dockerfile", &with("error=true"))]), &["--check"]).expect(1);
}

#[test]
fn rules_are_skipped_for_one_instruction() {
    needs_root!();
    let dockerfile = "\
FROM busybox
# check=skip=JSONArgsRecommended
CMD echo hello
ENTRYPOINT echo hello
";
    let json = answer(dockerfile, &["--call=check,format=json"], 1);
    assert_eq!(json["warnings"].as_array().map(Vec::len), Some(1), "{json}");
    assert_eq!(json["warnings"][0]["location"]["ranges"][0]["start"]["line"], 4);
}

#[test]
fn a_build_shows_its_warnings_and_succeeds() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), Context::new(&[("Dockerfile", TWO_WARNINGS)]));
    for (args, wanted) in [(&["--progress", "plain"][..], true), (&["--progress", "quiet"][..], false)] {
        let outcome = call(&store, &context, args).expect(0);
        assert!(outcome.stdout.starts_with("image sha256:"), "{}", outcome.stdout);
        // Below the steps, where they are read.
        let steps = outcome.stderr.rfind("\n#").unwrap_or(0);
        let below = &outcome.stderr[steps..];
        let shown = below.contains("\nwarning: FromAsCasing: ") && below.contains("  Dockerfile:3:5\n");
        assert_eq!(shown, wanted, "{args:?}:\n{}", outcome.stderr);
    }
    // A build from the cache says it again: the file is no better for it.
    call(&store, &context, &["--progress", "plain"]).expect(0).says(&["FromAsCasing", "JSONArgsRecommended"]);
}

#[test]
fn a_build_stops_at_warnings_that_are_errors() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "# check=error=true\nFROM busybox\nRUN touch /ran\nCMD echo hello\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let before = store.holds();
    let outcome = call(&store, &context, &["--progress", "plain", "-t", "x"]).expect(3);
    assert_eq!(
        outcome.stderr,
        "\
warning: JSONArgsRecommended: CMD in shell form runs a shell, and signals do not reach the program
  Dockerfile:4:5
     3 |     RUN touch /ran
     4 | >>> CMD echo hello
       |         ^^^^^^^^^^
hint: write CMD [\"program\", \"argument\"]
error: 1 warning, and `# check=error=true` makes it an error
hint: mend what is warned of, or remove `error=true`
"
    );
    assert_eq!(store.holds(), before, "something ran");
    context.write("Dockerfile", &dockerfile.replace("error=true", "skip=JSONArgsRecommended;error=true"));
    call(&store, &context, &["--progress", "plain", "-t", "x"]).expect(0);
}

const MANY_TARGETS: &str = "\
# VERSION of what is built
ARG VERSION=1
# base where all begins
FROM busybox AS base
# WHO shall be greeted
ARG WHO
FROM --platform=$BUILDPLATFORM base AS compile
ARG VERSION
RUN --mount=type=secret,id=token,required=true --mount=type=cache,id=objects,target=/o --mount=type=ssh true
FROM base AS final
COPY --from=compile /o /o
FROM scratch
";

#[test]
fn targets_are_listed_in_file_order() {
    needs_root!();
    check_screen(
        MANY_TARGETS,
        &["--call=targets"],
        0,
        "\
TARGET                       BASE      DESCRIPTION
base                         busybox   where all begins
compile                      base
final                        base
(without a name) (default)   scratch
",
    );
    let json = answer(MANY_TARGETS, &["--call=targets,format=json"], 0);
    assert_eq!(
        json["targets"][0],
        serde_json::json!({
            "name": "base", "default": false, "description": "where all begins", "base": "busybox",
            "platform": null, "location": { "line": 4 },
        })
    );
    assert_eq!(json["targets"][1]["platform"], "$BUILDPLATFORM");
    assert_eq!(json["targets"][3]["default"], true);
}

#[test]
fn an_outline_lists_what_a_target_takes() {
    needs_root!();
    check_screen(
        MANY_TARGETS,
        &["--call=outline", "--target=final"],
        0,
        "\
target: final

BUILD ARG   VALUE   DESCRIPTION
VERSION     1       of what is built
WHO                 shall be greeted

SECRET   REQUIRED
token    yes

SSH       REQUIRED
default   no

CACHE MOUNT
objects
",
    );
    let args = ["--call=outline,format=json", "--target=final", "--build-arg=VERSION=2"];
    let json = answer(MANY_TARGETS, &args, 0);
    assert_eq!(json["name"], "final");
    assert_eq!(
        json["args"][0],
        serde_json::json!({
            "name": "VERSION", "value": "2", "description": "of what is built", "location": { "line": 2 },
        })
    );
    assert_eq!(json["secrets"], serde_json::json!([{ "name": "token", "required": true }]));
    assert_eq!(json["ssh"], serde_json::json!([{ "name": "default", "required": false }]));
    assert_eq!(json["cache"], serde_json::json!([{ "ID": "objects" }]));
}

#[test]
fn a_question_about_what_is_not_there_is_an_error() {
    needs_root!();
    let (store, context) = (Store::empty(), Context::new(&[("Dockerfile", MANY_TARGETS)]));
    call(&store, &context, &["--call=outline", "--target=fnal"])
        .expect(3)
        .says(&["error:", "fnal", "`final`"]);
    call(&store, &context, &["--call=guess"]).expect(2).says(&["guess", "outline"]);
    call(&store, &context, &["--check", "--call=targets"]).expect(2).says(&["--check"]);
    context.write("Dockerfile", "RNU\n");
    for what in ["--call=outline", "--call=targets"] {
        call(&store, &context, &[what]).expect(3).says(&["unknown instruction `RNU`", "Dockerfile:1:1"]);
    }
}

#[test]
fn a_check_takes_images_that_are_not_there_for_granted() {
    needs_root!();
    let dockerfile =
        "FROM nowhere\nCOPY --from=tools /bin/tool /bin/\nRUN --mount=from=other,target=/x true\n";
    check_screen(dockerfile, &["--check"], 0, "Dockerfile: no warnings\n");
}

#[test]
fn an_argument_that_nobody_declares_is_no_finding_that_ends_the_build() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "# check=error=true\nFROM busybox\n")]);
    store.build(&context, &["--build-arg", "NOBODY=1"]).expect(0).says(&["--build-arg NOBODY"]);
    let check = "BUILDKIT_DOCKERFILE_CHECK=error=true";
    let context = Context::new(&[("Dockerfile", "FROM busybox AS Upper\n")]);
    store.build(&context, &["--build-arg", check]).expect(3).says(&["StageNameCasing", "1 warning"]);
}

#[test]
fn a_base_image_that_is_not_there_is_compared_with_those_that_are() {
    needs_root!();
    let store = Store::with_busybox();
    let build = |dockerfile: &str| store.build(&Context::new(&[("Dockerfile", dockerfile)]), &[]).expect(4);
    build("FROM busybx\n").says(&["base image busybx:latest is not in the store", "did you mean `busybox`?"]);
    build("FROM busybox:1.36\n").says(&["did you mean `busybox:latest`?"]);
    build("FROM busybox AS builder\nFROM buidler\n").says(&["did you mean `builder`?"]);
}

#[test]
fn a_missing_source_is_explained() {
    needs_root!();
    let store = Store::with_busybox();
    let check = |copy: &str, hint: &str| {
        let context = Context::new(&[("Dockerfile", &format!("FROM busybox\n{copy}\n")), ("a", "")]);
        store.build(&context, &[]).expect(4).says(&[hint]);
    };
    check("COPY ../x /", "`..` does not lead out of the build context");
    check("COPY a --chown=1 /x/", "flags stand in front of the sources");
    check("COPY *.jar /", "nothing matches the pattern");
}
