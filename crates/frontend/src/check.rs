//! The rules of `kiln build --check`: names, texts, and which of them are switched on.

use std::collections::BTreeSet;

/// One rule. All of them are warnings unless `# check=error=true` says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// A stage name has an upper-case letter.
    StageNameCasing,
    /// `FROM` and `as` are cased differently.
    FromAsCasing,
    /// A blank line inside a continued instruction.
    NoEmptyContinuation,
    /// A keyword is cased unlike the file's others.
    ConsistentInstructionCasing,
    /// Two stages have one name.
    DuplicateStageName,
    /// A stage is called `scratch` or `context`.
    ReservedStageName,
    /// CMD or ENTRYPOINT in shell form.
    JSONArgsRecommended,
    /// MAINTAINER is used.
    MaintainerDeprecated,
    /// FROM uses a variable that no global ARG declares.
    UndefinedArgInFrom,
    /// An instruction uses a variable that is not set.
    UndefinedVar,
    /// The first WORKDIR is relative.
    WorkdirRelativePath,
    /// A second CMD, ENTRYPOINT or HEALTHCHECK in a stage.
    MultipleInstructionsDisallowed,
    /// `ENV key value`.
    LegacyKeyValueFormat,
    /// The base image is for another platform.
    InvalidBaseImagePlatform,
    /// `--platform=$TARGETPLATFORM`.
    RedundantTargetPlatform,
    /// ARG or ENV holds a secret.
    SecretsUsedInArgOrEnv,
    /// Without build arguments FROM has no image.
    InvalidDefaultArgInFrom,
    /// `--platform` is a constant.
    FromPlatformFlagConstDisallowed,
    /// A COPY source is excluded by `.dockerignore`.
    CopyIgnoredFile,
    /// A comment above ARG or FROM is not its description.
    InvalidDefinitionDescription,
    /// EXPOSE has an upper-case protocol.
    ExposeProtoCasing,
    /// EXPOSE has an address or a host port.
    ExposeInvalidFormat,
}

impl Rule {
    /// All rules, in the order of docker's documentation.
    pub const ALL: [Rule; 22] = [
        Rule::StageNameCasing,
        Rule::FromAsCasing,
        Rule::NoEmptyContinuation,
        Rule::ConsistentInstructionCasing,
        Rule::DuplicateStageName,
        Rule::ReservedStageName,
        Rule::JSONArgsRecommended,
        Rule::MaintainerDeprecated,
        Rule::UndefinedArgInFrom,
        Rule::UndefinedVar,
        Rule::WorkdirRelativePath,
        Rule::MultipleInstructionsDisallowed,
        Rule::LegacyKeyValueFormat,
        Rule::InvalidBaseImagePlatform,
        Rule::RedundantTargetPlatform,
        Rule::SecretsUsedInArgOrEnv,
        Rule::InvalidDefaultArgInFrom,
        Rule::FromPlatformFlagConstDisallowed,
        Rule::CopyIgnoredFile,
        Rule::InvalidDefinitionDescription,
        Rule::ExposeProtoCasing,
        Rule::ExposeInvalidFormat,
    ];

    /// As in `# check=skip=`.
    pub fn name(self) -> &'static str {
        match self {
            Rule::StageNameCasing => "StageNameCasing",
            Rule::FromAsCasing => "FromAsCasing",
            Rule::NoEmptyContinuation => "NoEmptyContinuation",
            Rule::ConsistentInstructionCasing => "ConsistentInstructionCasing",
            Rule::DuplicateStageName => "DuplicateStageName",
            Rule::ReservedStageName => "ReservedStageName",
            Rule::JSONArgsRecommended => "JSONArgsRecommended",
            Rule::MaintainerDeprecated => "MaintainerDeprecated",
            Rule::UndefinedArgInFrom => "UndefinedArgInFrom",
            Rule::UndefinedVar => "UndefinedVar",
            Rule::WorkdirRelativePath => "WorkdirRelativePath",
            Rule::MultipleInstructionsDisallowed => "MultipleInstructionsDisallowed",
            Rule::LegacyKeyValueFormat => "LegacyKeyValueFormat",
            Rule::InvalidBaseImagePlatform => "InvalidBaseImagePlatform",
            Rule::RedundantTargetPlatform => "RedundantTargetPlatform",
            Rule::SecretsUsedInArgOrEnv => "SecretsUsedInArgOrEnv",
            Rule::InvalidDefaultArgInFrom => "InvalidDefaultArgInFrom",
            Rule::FromPlatformFlagConstDisallowed => "FromPlatformFlagConstDisallowed",
            Rule::CopyIgnoredFile => "CopyIgnoredFile",
            Rule::InvalidDefinitionDescription => "InvalidDefinitionDescription",
            Rule::ExposeProtoCasing => "ExposeProtoCasing",
            Rule::ExposeInvalidFormat => "ExposeInvalidFormat",
        }
    }

    /// What the rule asks for, in one sentence.
    pub fn description(self) -> &'static str {
        match self {
            Rule::StageNameCasing => "Write stage names in lower case",
            Rule::FromAsCasing => "Write `as` in the same case as `from`",
            Rule::NoEmptyContinuation => "Leave no blank line inside a continued instruction",
            Rule::ConsistentInstructionCasing => "Write all instructions in the same case",
            Rule::DuplicateStageName => "Give every stage a name of its own",
            Rule::ReservedStageName => "Do not name a stage `scratch` or `context`",
            Rule::JSONArgsRecommended => {
                "Write CMD and ENTRYPOINT as JSON, so that the program gets signals itself"
            }
            Rule::MaintainerDeprecated => "Name the author in a label; MAINTAINER is deprecated",
            Rule::UndefinedArgInFrom => "Declare the variables that FROM uses by ARG before the first FROM",
            Rule::UndefinedVar => "Declare variables before they are used",
            Rule::WorkdirRelativePath => {
                "Begin with an absolute WORKDIR; a relative one depends on the base image"
            }
            Rule::MultipleInstructionsDisallowed => "Of several in one stage only the last one counts",
            Rule::LegacyKeyValueFormat => "Write `key=value`; the form with a blank is deprecated",
            Rule::InvalidBaseImagePlatform => "Use a base image of the platform that is built for",
            Rule::RedundantTargetPlatform => "Leave out --platform=$TARGETPLATFORM: it is the default",
            Rule::SecretsUsedInArgOrEnv => "Pass secrets by `RUN --mount=type=secret`, not by ARG or ENV",
            Rule::InvalidDefaultArgInFrom => "Give global ARGs defaults with which FROM names an image",
            Rule::FromPlatformFlagConstDisallowed => "Do not fix --platform of FROM to one platform",
            Rule::CopyIgnoredFile => "Do not copy what .dockerignore leaves out",
            Rule::InvalidDefinitionDescription => {
                "Begin the comment above an ARG or FROM with the name that it describes"
            }
            Rule::ExposeProtoCasing => "Write the protocol of EXPOSE in lower case",
            Rule::ExposeInvalidFormat => "Give EXPOSE ports only, no address and no host port",
        }
    }

    /// The page of docker's documentation that explains the rule; `None`: it has none.
    pub fn url(self) -> Option<String> {
        if self == Rule::InvalidBaseImagePlatform {
            return None;
        }
        let name = self.name().replace("JSON", "Json");
        let mut kebab = String::new();
        for c in name.chars() {
            if c.is_ascii_uppercase() && !kebab.is_empty() {
                kebab.push('-');
            }
            kebab.push(c.to_ascii_lowercase());
        }
        Some(format!("https://docs.docker.com/go/dockerfile/rule/{kebab}/"))
    }

    /// Only on when asked for by `experimental=`.
    fn is_experimental(self) -> bool {
        self == Rule::InvalidDefinitionDescription
    }
}

/// `# check=skip=A,B;error=true;experimental=C`: which rules count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckOptions {
    skip: Names,
    experimental: Names,
    /// Warnings end the build.
    pub error: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Names {
    all: bool,
    names: BTreeSet<String>,
}

impl Names {
    fn parse(text: &str) -> Self {
        let text = text.trim();
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        Self { all: text == "all", names: names.map(str::to_ascii_lowercase).collect() }
    }

    fn contains(&self, rule: Rule) -> bool {
        self.all || self.names.contains(&rule.name().to_ascii_lowercase())
    }
}

impl CheckOptions {
    /// Reads the text behind `check=`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut options = Self::default();
        for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("check option {part:?} is not of the form key=value"))?;
            match key.trim() {
                "skip" => options.skip = Names::parse(value),
                "experimental" => options.experimental = Names::parse(value),
                "error" => {
                    options.error = match value.trim() {
                        "true" | "1" | "t" | "T" | "TRUE" | "True" => true,
                        "false" | "0" | "f" | "F" | "FALSE" | "False" => false,
                        other => {
                            return Err(format!("check option error={other:?}: true or false is expected"));
                        }
                    };
                }
                other => {
                    let hint = crate::suggest::did_you_mean(other, ["skip", "error", "experimental"]);
                    let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
                    return Err(format!("unknown check option {other:?}{hint}"));
                }
            }
        }
        Ok(options)
    }

    /// These options and what a `# check=` comment above one instruction adds.
    pub(crate) fn with_comments(&self, comments: &[String]) -> Self {
        let mut merged = self.clone();
        for comment in comments {
            let Some((name, value)) = comment.split_once('=') else { continue };
            if !name.trim().eq_ignore_ascii_case("check") {
                continue;
            }
            if let Ok(own) = Self::parse(value) {
                merged.skip.all |= own.skip.all;
                merged.skip.names.extend(own.skip.names);
                merged.experimental.all |= own.experimental.all;
                merged.experimental.names.extend(own.experimental.names);
            }
        }
        merged
    }

    /// Whether `rule` is to be reported.
    pub(crate) fn reports(&self, rule: Rule) -> bool {
        let on = !rule.is_experimental() || self.experimental.contains(rule);
        on && !self.skip.contains(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_switch_rules_off_and_on() {
        let options = CheckOptions::parse("skip=StageNameCasing, fromascasing;error=true").unwrap();
        assert!(!options.reports(Rule::StageNameCasing) && !options.reports(Rule::FromAsCasing));
        assert!(options.reports(Rule::UndefinedVar) && options.error);
        assert!(!options.reports(Rule::InvalidDefinitionDescription));
        let all = CheckOptions::parse("experimental=all").unwrap();
        assert!(all.reports(Rule::InvalidDefinitionDescription));
        assert!(!CheckOptions::parse("skip=all").unwrap().reports(Rule::UndefinedVar));
    }

    #[test]
    fn unknown_options_are_refused() {
        assert!(CheckOptions::parse("skp=all").unwrap_err().contains("did you mean `skip`?"));
        assert!(CheckOptions::parse("error=maybe").is_err());
        assert!(CheckOptions::parse("skip").is_err());
    }

    #[test]
    fn a_comment_above_an_instruction_counts_for_it() {
        let merged = CheckOptions::default().with_comments(&["check=skip=UndefinedVar".to_owned()]);
        assert!(!merged.reports(Rule::UndefinedVar));
    }

    #[test]
    fn pages_are_named_after_the_rules() {
        let url = Rule::JSONArgsRecommended.url().unwrap();
        assert_eq!(url, "https://docs.docker.com/go/dockerfile/rule/json-args-recommended/");
        assert_eq!(Rule::InvalidBaseImagePlatform.url(), None);
    }
}
