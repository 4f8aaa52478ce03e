//! Instructions: keyword, flags, and what each of them says.

use std::sync::Arc;

use nom::bytes::complete::take_while1;
use nom::character::complete::multispace0;
use nom::sequence::terminated;
use nom::{IResult, Parser};

use crate::ast::{Ast, Body, Command, Definition, Files, From, Instruction, Kind, Pair, Text};
use crate::flags::flags;
use crate::healthcheck::{Healthcheck, parse_interval};
use crate::heredoc::opener;
use crate::lexer::{Lexed, Line, lex};
use crate::suggest::did_you_mean;
use crate::words::{Piece, is_blank, split_blanks, split_quoted};
use crate::{Diagnostic, Span, mount};

/// Parses a Dockerfile. The tree is of use only when no diagnostic is an error.
///
/// Costs time in proportion to the text.
pub fn parse(text: &str) -> (Ast, Vec<Diagnostic>) {
    parse_as(text, None)
}

/// Parses `text`; with `stands_for`, everything about it is reported there.
pub(crate) fn parse_as(text: &str, stands_for: Option<Span>) -> (Ast, Vec<Diagnostic>) {
    let lexed = match lex(text, stands_for) {
        Ok(lexed) => lexed,
        Err(diagnostic) => return (empty(), vec![diagnostic]),
    };
    let Lexed { directives, lines } = lexed;
    let (mut instructions, mut diagnostics) = (Vec::new(), Vec::new());
    let mut glued = None;
    for line in &lines {
        match instruction(line, 0, directives.escape, glued.take()) {
            Ok(instruction) => {
                diagnostics.extend(almost_json(&instruction));
                diagnostics.extend(undeclared(&instruction, directives.cache_ttl));
                glued = glued_heredoc(&instruction);
                instructions.push(instruction);
            }
            Err(diagnostic) => diagnostics.push(*diagnostic),
        }
    }
    if lines.is_empty() {
        let span = stands_for.unwrap_or(Span { start: 0, end: 1 });
        let message = if text.trim().is_empty() {
            "the Dockerfile has no instructions: it is empty"
        } else {
            "the Dockerfile has no instructions, only comments"
        };
        let hint = "begin with `FROM image`".to_owned();
        diagnostics.push(Diagnostic::error(span, message).with_hint(Some(hint)));
    }
    (Ast { directives, instructions }, diagnostics)
}

/// What looks like a heredoc in RUN, COPY or ADD and is none, for it is part of a word: `cat<<EOF`.
fn glued_heredoc(instruction: &Instruction) -> Option<String> {
    if !matches!(instruction.kind, Kind::Run | Kind::Copy | Kind::Add)
        || !instruction.line.heredocs.is_empty()
    {
        return None;
    }
    let is_name = |text: &str| text.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
    let word = instruction.line.text.split_whitespace().find(|word| {
        let opened = word.split_once("<<").filter(|(before, _)| !before.is_empty() && !before.ends_with('<'));
        opened.is_some_and(|(_, name)| is_name(name.trim_start_matches('-').trim_matches(['"', '\''])))
    })?;
    Some(word.to_owned())
}

/// `--cache-ttl` where nothing says that this is kiln's language, and not only docker's. A trigger is for whoever
/// builds on the image, with whatever tool.
fn undeclared(instruction: &Instruction, cache_ttl: bool) -> Option<Diagnostic> {
    let (instruction, in_trigger) = match &instruction.body {
        Body::Onbuild(trigger, _) => (&**trigger, true),
        _ => (instruction, false),
    };
    let flag = instruction.flag("cache-ttl").filter(|_| in_trigger || !cache_ttl)?;
    let span = instruction.line.span(flag.piece.start, flag.piece.end);
    let (message, hint) = match in_trigger {
        true => ("`--cache-ttl` does not belong into an image", "leave it out of ONBUILD"),
        false => {
            let hint = "write `# kiln: cache-ttl` above the first instruction, behind other directives";
            ("`--cache-ttl` is kiln's own, and not switched on", hint)
        }
    };
    Some(Diagnostic::error(span, message).with_hint(Some(hint.to_owned())))
}

fn empty() -> Ast {
    Ast { directives: crate::directive::Directives::default(), instructions: Vec::new() }
}

type Result<T, E = Box<Diagnostic>> = std::result::Result<T, E>;

fn wrong<T>(span: Span, message: impl Into<String>) -> Result<T> {
    Err(Box::new(Diagnostic::error(span, message)))
}

/// A keyword and the blanks behind it.
fn keyword(input: &str) -> IResult<&str, &str> {
    terminated(take_while1(|c: char| !c.is_whitespace()), multispace0).parse(input)
}

/// Reads the instruction that begins at byte `from` of a line. `glued`: what looks like a heredoc in
/// the instruction before.
fn instruction(line: &Arc<Line>, from: usize, escape: char, glued: Option<String>) -> Result<Instruction> {
    let text = line.text.as_str();
    let (after, word) = keyword(&text[from..])
        .map_err(|_| Box::new(Diagnostic::error(line.whole(), "an instruction is missing")))?;
    let known = Kind::ALL.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
    let Some((_, kind)) = known.copied() else {
        let hint = did_you_mean(word, Kind::ALL.iter().map(|(name, _)| *name));
        let begin = |word| format!("put a blank in front of `<<` in `{word}` to begin a heredoc there");
        // Most of the time the line before was to go on.
        let hint = glued.map(begin).or(hint).or_else(|| {
            let follows = from == 0 && line.first_line > 1;
            follows.then(|| {
                let go_on = format!("end the line before with `{escape}` if this belongs to it");
                format!("{go_on}; otherwise begin with an instruction such as RUN")
            })
        });
        let message = format!("unknown instruction `{}`", shorten(word));
        return Err(Box::new(Diagnostic::error(line.span(from, from + word.len()), message).with_hint(hint)));
    };
    let (flags, start) = flags(line, text.len() - after.len(), kind, escape)?;
    let rest = Piece { start, end: text.len() };
    let mut found = Instruction {
        kind,
        keyword: word.to_owned(),
        flags,
        // Replaced below; a value that needs no text.
        body: Body::Shell(Vec::new()),
        rest,
        line: line.clone(),
    };
    if start == text.len() {
        return wrong(line.whole(), format!("{} needs at least one argument", kind.name()));
    }
    found.body = Reader { line, rest, kind, escape, instruction: &found }.body()?;
    Ok(found)
}

fn shorten(word: &str) -> String {
    let short: String = word.chars().take(40).collect();
    if short.len() < word.len() { format!("{short}…") } else { short }
}

struct Reader<'a> {
    line: &'a Arc<Line>,
    rest: Piece,
    kind: Kind,
    escape: char,
    instruction: &'a Instruction,
}

impl Reader<'_> {
    fn body(&self) -> Result<Body> {
        Ok(match self.kind {
            Kind::Add => Body::Add(self.files()?),
            Kind::Arg => Body::Arg(self.definitions()?),
            Kind::Cmd => Body::Cmd(self.command()?),
            Kind::Copy => Body::Copy(self.files()?),
            Kind::Entrypoint => Body::Entrypoint(self.command()?),
            Kind::Env => Body::Env(self.pairs()?),
            Kind::Expose => Body::Expose(self.words()),
            Kind::From => Body::From(self.from()?),
            Kind::Healthcheck => Body::Healthcheck(self.healthcheck()?),
            Kind::Label => Body::Label(self.pairs()?),
            Kind::Maintainer => Body::Maintainer(self.text(self.rest)),
            Kind::Onbuild => self.onbuild()?,
            Kind::Run => self.run()?,
            Kind::Shell => match self.json()? {
                Some(words) if !words.is_empty() => Body::Shell(words),
                _ => {
                    let hint = "write it like SHELL [\"/bin/bash\", \"-c\"]".to_owned();
                    let message = "SHELL needs a JSON list";
                    return Err(Box::new(
                        Diagnostic::error(self.span(self.rest), message).with_hint(Some(hint)),
                    ));
                }
            },
            Kind::Stopsignal => Body::Stopsignal(self.text(self.rest)),
            Kind::User => Body::User(self.text(self.rest)),
            Kind::Volume => Body::Volume(self.json_or_words()?),
            Kind::Workdir => Body::Workdir(self.text(self.rest)),
        })
    }

    fn span(&self, piece: Piece) -> Span {
        self.line.span(piece.start, piece.end)
    }

    fn slice(&self, piece: Piece) -> &str {
        &self.line.text[piece.start..piece.end]
    }

    fn text(&self, piece: Piece) -> Text {
        Text { value: self.slice(piece).to_owned(), piece, exact: true }
    }

    fn words(&self) -> Vec<Text> {
        split_blanks(&self.line.text, self.rest.start).into_iter().map(|piece| self.text(piece)).collect()
    }

    fn json(&self) -> Result<Option<Vec<String>>> {
        json_list(self.slice(self.rest)).or_else(|message| wrong(self.span(self.rest), message))
    }

    fn json_or_words(&self) -> Result<Vec<Text>> {
        let Some(words) = self.json()? else { return Ok(self.words()) };
        Ok(words.into_iter().map(|value| Text { value, piece: self.rest, exact: false }).collect())
    }

    fn command(&self) -> Result<Command> {
        Ok(match self.json()? {
            Some(words) => Command::Exec(words),
            None => Command::Shell(self.text(self.rest)),
        })
    }

    fn run(&self) -> Result<Body> {
        for flag in &self.instruction.flags {
            let Some(value) = &flag.value else { continue };
            let span = self.instruction.text_span(value);
            let known: &[&str] = match flag.name.as_str() {
                "network" => &["default", "none", "host"],
                "security" => &["sandbox", "insecure"],
                "mount" => {
                    mount::fields(&value.value).map_err(|error| error.at(self.instruction, value))?;
                    continue;
                }
                _ => continue,
            };
            if !known.contains(&value.value.as_str()) {
                let hint = did_you_mean(&value.value, known.iter().copied());
                let message = format!(
                    "--{} takes {}, not {:?}",
                    flag.name,
                    known.join(", ").replacen(", ", if known.len() == 2 { " or " } else { ", " }, 1),
                    value.value
                );
                return Err(Box::new(Diagnostic::error(span, message).with_hint(hint)));
            }
        }
        let command = self.command()?;
        if let Command::Exec(words) = &command
            && words.first().is_none_or(String::is_empty)
        {
            return wrong(self.span(self.rest), "RUN needs a program to run");
        }
        Ok(Body::Run(command))
    }

    fn files(&self) -> Result<Files> {
        let name = self.kind.name();
        let mut words = self.json_or_words()?;
        let destination = words.pop().filter(|_| !words.is_empty());
        let Some(destination) = destination else {
            let hint = format!("write `{name} source destination`");
            let message = format!("{name} needs a source and a destination");
            return Err(Box::new(Diagnostic::error(self.span(self.rest), message).with_hint(Some(hint))));
        };
        let heredoc = |text: &Text| text.exact && opener(&self.line.text, text.piece, self.escape).is_some();
        if heredoc(&destination) {
            return wrong(
                self.instruction.text_span(&destination),
                format!("the destination of {name} cannot be a heredoc"),
            );
        }
        let mut files = Files { paths: Vec::new(), heredocs: Vec::new(), destination };
        for word in words {
            if word.exact && matches!(word.value.as_str(), "<<" | "<<-") {
                let message =
                    format!("in {name} the word of a heredoc follows `{}` without a blank", word.value);
                return wrong(self.instruction.text_span(&word), message);
            }
            let at = self.line.heredocs.iter().position(|known| known.word == word.piece);
            match at.filter(|_| heredoc(&word)) {
                Some(at) => files.heredocs.push(at),
                None => files.paths.push(word),
            }
        }
        Ok(files)
    }

    fn from(&self) -> Result<From> {
        let words = self.words();
        let (image, name) = match words.as_slice() {
            [image] => (image.clone(), None),
            [image, word, name] if word.value.eq_ignore_ascii_case("AS") => {
                (image.clone(), Some((word.value.clone(), name.clone())))
            }
            [_, word, _] => {
                let hint = did_you_mean(&word.value, ["AS"]);
                let message = format!("`AS` is expected here, not {:?}", shorten(&word.value));
                return Err(Box::new(
                    Diagnostic::error(self.instruction.text_span(word), message).with_hint(hint),
                ));
            }
            _ => {
                let span = self.span(self.rest);
                return wrong(span, "FROM takes an image and, if wanted, `AS name`: one or three words");
            }
        };
        if let Some((_, name)) = &name {
            let lower = name.value.to_lowercase();
            let valid = lower.starts_with(|c: char| c.is_ascii_lowercase())
                && lower.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c));
            if !valid {
                let message = format!(
                    "invalid stage name {:?}: it begins with a letter and has only letters, digits, `-`, `_`, `.`",
                    shorten(&name.value)
                );
                return wrong(self.instruction.text_span(name), message);
            }
        }
        Ok(From { image, name })
    }

    fn definitions(&self) -> Result<Vec<Definition>> {
        let words = split_quoted(&self.line.text, self.rest.start, self.escape);
        words
            .into_iter()
            .map(|word| {
                let (name, default) = self.split_pair(word);
                if name.value.is_empty() {
                    return wrong(self.span(word), "ARG needs a name in front of `=`");
                }
                Ok(Definition { name, default })
            })
            .collect()
    }

    /// `name=value` at the first equals sign.
    fn split_pair(&self, word: Piece) -> (Text, Option<Text>) {
        match self.slice(word).find('=') {
            None => (self.text(word), None),
            Some(at) => (
                self.text(Piece { start: word.start, end: word.start + at }),
                Some(self.text(Piece { start: word.start + at + 1, end: word.end })),
            ),
        }
    }

    fn pairs(&self) -> Result<Vec<Pair>> {
        let name = self.kind.name();
        let words = split_quoted(&self.line.text, self.rest.start, self.escape);
        let first = words.first().copied().unwrap_or(self.rest);
        if !self.slice(first).contains('=') {
            let text = self.slice(self.rest);
            let Some(blank) = text.find(is_blank) else {
                let hint = format!("write {name} {text}=value");
                let message = format!("{name} {text} has no value");
                return Err(Box::new(Diagnostic::error(self.span(self.rest), message).with_hint(Some(hint))));
            };
            let value = text[blank..].trim_start_matches(is_blank);
            let value_at = self.rest.end - value.len();
            return Ok(vec![Pair {
                name: self.text(Piece { start: self.rest.start, end: self.rest.start + blank }),
                value: self.text(Piece { start: value_at, end: self.rest.end }),
                legacy: true,
            }]);
        }
        words
            .into_iter()
            .map(|word| match self.split_pair(word) {
                (_, None) => {
                    let hint = "quote values that contain blanks".to_owned();
                    let message = format!("{:?} is not of the form name=value", shorten(self.slice(word)));
                    Err(Box::new(Diagnostic::error(self.span(word), message).with_hint(Some(hint))))
                }
                (name, _) if name.value.is_empty() => {
                    wrong(self.span(word), "a name is missing in front of `=`")
                }
                (name, Some(value)) => Ok(Pair { name, value, legacy: false }),
            })
            .collect()
    }

    fn healthcheck(&self) -> Result<Healthcheck> {
        let text = self.slice(self.rest);
        let (kind, command) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let command = command.trim_start();
        let mut health = Healthcheck::default();
        match kind.to_ascii_uppercase().as_str() {
            "NONE" if command.is_empty() => {
                if let Some(flag) = self.instruction.flags.first() {
                    let message = format!("`--{}` means nothing beside NONE", flag.name);
                    return wrong(self.span(flag.piece), message);
                }
                health.test = vec!["NONE".to_owned()];
            }
            "NONE" => return wrong(self.span(self.rest), "HEALTHCHECK NONE takes no arguments"),
            "CMD" => {
                let piece = Piece { start: self.rest.end - command.len(), end: self.rest.end };
                let words = json_list(command).or_else(|message| wrong(self.span(piece), message))?;
                match words {
                    Some(words) if !words.is_empty() => {
                        health.test = std::iter::once("CMD".to_owned()).chain(words).collect();
                    }
                    None if !command.is_empty() => {
                        health.test = vec!["CMD-SHELL".to_owned(), command.to_owned()];
                    }
                    _ => return wrong(self.span(self.rest), "HEALTHCHECK CMD needs a command"),
                }
            }
            _ => {
                let span = self.line.span(self.rest.start, self.rest.start + kind.len());
                let hint =
                    did_you_mean(kind, ["CMD", "NONE"]).or(Some("write `HEALTHCHECK CMD …`".to_owned()));
                let message = format!("HEALTHCHECK takes CMD or NONE, not {:?}", shorten(kind));
                return Err(Box::new(Diagnostic::error(span, message).with_hint(hint)));
            }
        }
        for flag in &self.instruction.flags {
            let Some(value) = &flag.value else { continue };
            let span = self.instruction.text_span(value);
            if flag.name == "retries" {
                health.retries = match value.value.parse::<i32>() {
                    Ok(retries) if retries >= 0 => retries.into(),
                    Ok(_) => return wrong(span, "--retries cannot be negative"),
                    Err(_) => return wrong(span, format!("--retries takes a number, not {:?}", value.value)),
                };
                continue;
            }
            let interval = parse_interval(&value.value)
                .or_else(|message| wrong(span, format!("--{}: {message}", flag.name)))?;
            match flag.name.as_str() {
                "interval" => health.interval = interval,
                "timeout" => health.timeout = interval,
                "start-period" => health.start_period = interval,
                _ => health.start_interval = interval,
            }
        }
        Ok(health)
    }

    fn onbuild(&self) -> Result<Body> {
        let trigger = instruction(self.line, self.rest.start, self.escape, None)?;
        match trigger.kind {
            Kind::Onbuild => {
                return wrong(
                    trigger.keyword_span(),
                    "ONBUILD ONBUILD is not allowed: triggers do not chain",
                );
            }
            Kind::From | Kind::Maintainer => {
                let message = format!("{} is not allowed as an ONBUILD trigger", trigger.kind.name());
                return wrong(
                    self.line.span(self.rest.start, self.rest.start + trigger.keyword.len()),
                    message,
                );
            }
            _ => {}
        }
        let mut stored = self.slice(self.rest).to_owned();
        for heredoc in &self.line.heredocs {
            stored.push('\n');
            stored.push_str(&heredoc.body);
            stored.push_str(&heredoc.name);
        }
        Ok(Body::Onbuild(Box::new(trigger), stored))
    }
}

/// A warning for `RUN ["a",` and `VOLUME ['a']`: what was meant as a list is none, as in docker.
fn almost_json(instruction: &Instruction) -> Option<Diagnostic> {
    let not_json = |words: &[Text]| words.iter().all(|word| word.exact);
    let (message, hint) = match &instruction.body {
        Body::Run(Command::Shell(_)) | Body::Cmd(Command::Shell(_)) | Body::Entrypoint(Command::Shell(_)) => {
            ("this is no valid JSON list, so it is a command for the shell", "[\"program\", \"argument\"]")
        }
        Body::Copy(files) | Body::Add(files) if files.destination.exact => {
            ("this is no valid JSON list, so each word is a path", "[\"source\", \"destination\"]")
        }
        Body::Volume(words) if not_json(words) => {
            ("this is no valid JSON list, so each word is a path", "[\"/path\", \"/other\"]")
        }
        _ => return None,
    };
    let text = &instruction.line.text[instruction.rest.start..instruction.rest.end];
    let list = text.strip_prefix('[')?;
    // `[ "$A" = b ]` is a test of the shell.
    let list = if instruction.kind == Kind::Run { list } else { list.trim_start() };
    let quote = list.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let hint = match quote {
        '\'' => format!("JSON has double quotes: {hint}"),
        _ => format!("a list looks like {hint}"),
    };
    Some(Diagnostic::warning(instruction.rest_span(), None, message).with_hint(Some(hint)))
}

/// The exec form. Text that only looks like JSON is shell form, as in docker; a list that holds
/// something other than strings is an error.
fn json_list(text: &str) -> Result<Option<Vec<String>>, String> {
    if !text.trim_start().starts_with('[') {
        return Ok(None);
    }
    let Ok(list) = serde_json::from_str::<Vec<serde_json::Value>>(text) else { return Ok(None) };
    let strings: Option<Vec<String>> = list.iter().map(|value| value.as_str().map(str::to_owned)).collect();
    strings.map(Some).ok_or_else(|| "only strings are allowed in the JSON list".to_owned())
}
