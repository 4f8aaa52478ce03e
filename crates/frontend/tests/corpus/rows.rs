//! What the corpus has to speak of: the rows of the language's description and the bad inputs.

use std::collections::BTreeSet;

const ROWS: &[(&str, &[&str])] = &[
    (
        "1",
        &[
            "Encoding",
            "Comments",
            "Continuation",
            "Continuation at EOF",
            "Directive syntax",
            "Directive escape",
            "Directive check",
            "Directive rules",
            "Instruction keywords",
            "Flags",
            "JSON (exec) form",
            "Whitespace splitting",
            "ENV/LABEL legacy form",
            "Heredocs",
            "Locations",
            "Empty file / no FROM",
        ],
    ),
    (
        "1.1",
        &[
            "$VAR",
            "${V:-w}",
            "${V-w}",
            "${V:?msg}",
            "${V#p}",
            "${V/p/r}",
            "${V:=w} rejected",
            "Quoting",
            "Where",
            "One snapshot per instruction",
            "FROM scope",
        ],
    ),
    (
        "2",
        &[
            "FROM",
            "ARG",
            "ENV",
            "RUN",
            "COPY",
            "ADD",
            "WORKDIR",
            "USER",
            "CMD / ENTRYPOINT",
            "SHELL",
            "EXPOSE",
            "LABEL",
            "MAINTAINER",
            "VOLUME",
            "STOPSIGNAL",
            "HEALTHCHECK",
            "ONBUILD",
            "Image history",
            "Default image config for scratch",
        ],
    ),
    ("2.1", &["TARGETPLATFORM", "TARGETOSVERSION", "HTTP_PROXY", "SOURCE_DATE_EPOCH", "BUILDKIT_SYNTAX"]),
    (
        "3",
        &[
            "--mount=type=bind",
            "--mount=type=cache",
            "--mount=type=tmpfs",
            "--mount=type=secret",
            "--mount=type=ssh",
            "option syntax",
            "--network",
            "--security",
            "--device",
            "Sandbox details",
        ],
    ),
    (
        "4",
        &[
            "sources",
            "symlinks",
            "metadata",
            "--from",
            "--chown",
            "--chmod",
            "--link",
            "--parents",
            "--exclude",
            "heredoc source",
        ],
    ),
    (
        "5",
        &[
            "local tar auto-extract",
            "URL",
            "--checksum",
            "git source",
            "--keep-git-dir",
            "--chown --chmod --link --exclude",
            "credentials",
        ],
    ),
    (
        "6",
        &[
            "Local dir",
            "Dockerfile lookup",
            ".dockerignore order",
            "File format",
            "Matching",
            "Dockerfile and .dockerignore themselves",
            "Only needed paths transferred",
            "Incremental re-send",
            "Named contexts",
        ],
    ),
];

/// All rows as cases name them, `1.1 ${V:-w}`; the lint rules as `12 StageNameCasing`; the bad
/// inputs `D01` to `D34`, `M01` to `M14`, `X01` to `X12`.
pub(crate) fn all() -> BTreeSet<String> {
    let tables =
        ROWS.iter().flat_map(|(section, rows)| rows.iter().map(move |row| format!("{section} {row}")));
    let rules = kiln_frontend::Rule::ALL.iter().map(|rule| format!("12 {}", rule.name()));
    let inputs = [("D", 34), ("M", 14), ("X", 12)]
        .into_iter()
        .flat_map(|(letter, last)| (1..=last).map(move |number| format!("{letter}{number:02}")));
    tables.chain(rules).chain(inputs).collect()
}
