//! Heredocs: `<<EOF`, `<<-"EOF"`, `3<<EOF`.

use crate::words::{Piece, Quotes, expand, split_quoted};

/// A heredoc's word and body.
#[derive(Debug, Clone)]
pub(crate) struct Heredoc {
    /// The word in the instruction's text.
    pub(crate) word: Piece,
    /// What closes it, without quotes.
    pub(crate) name: String,
    /// Lines between the instruction and the name, as they stand there.
    pub(crate) body: String,
    /// No part of the word is quoted: variables in the body are replaced.
    pub(crate) expand: bool,
    /// `<<-`: leading tabs of every line do not count.
    pub(crate) strip_tabs: bool,
}

impl Heredoc {
    /// The body as the reader of the heredoc sees it.
    pub(crate) fn content(&self) -> String {
        if !self.strip_tabs {
            return self.body.clone();
        }
        self.body.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

/// The heredocs that an instruction opens, in order, without bodies.
///
/// RUN, COPY and ADD have them, and ONBUILD in front of these; the JSON form has none.
pub(crate) fn openers(text: &str, escape: char) -> Vec<Heredoc> {
    if !text.contains("<<") {
        return Vec::new();
    }
    let words = split_quoted(text, 0, '\\');
    let word = |at: usize| words.get(at).map_or("", |piece| &text[piece.start..piece.end]);
    let mut at = 0;
    if word(at).eq_ignore_ascii_case("ONBUILD") {
        at += 1;
    }
    let is_run = word(at).eq_ignore_ascii_case("RUN");
    if !is_run && !["COPY", "ADD"].iter().any(|keyword| word(at).eq_ignore_ascii_case(keyword)) {
        return Vec::new();
    }
    at += 1;
    while word(at).starts_with("--") {
        at += 1;
    }
    let rest = words.get(at).map_or("", |piece| &text[piece.start..]);
    if rest.starts_with('[') && serde_json::from_str::<Vec<serde_json::Value>>(rest).is_ok() {
        return Vec::new();
    }
    let mut found = Vec::new();
    while let Some(piece) = words.get(at) {
        let mut piece = *piece;
        // `cat << EOF`: the shell takes a blank there, COPY does not.
        let bare = word(at).trim_start_matches(|c: char| c.is_ascii_digit()) == "<<";
        if bare
            && is_run
            && let Some(next) = words.get(at + 1)
        {
            piece.end = next.end;
            at += 1;
        }
        found.extend(opener(text, piece, escape));
        at += 1;
    }
    found
}

/// Reads one word as a heredoc's opening; `None` when it is none.
pub(crate) fn opener(text: &str, piece: Piece, escape: char) -> Option<Heredoc> {
    let word = &text[piece.start..piece.end];
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (strip_tabs, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
    let quoted_name = if strip_tabs { rest } else { rest.trim_start() };
    if quoted_name.is_empty() || quoted_name.contains('<') {
        return None;
    }
    let keep = |name: &str| Some(format!("${name}"));
    let name = expand(quoted_name, escape, Quotes::Remove, &keep).ok()?.text;
    if name.is_empty() || name.chars().any(char::is_whitespace) && !quoted_name.contains(['"', '\'']) {
        return None;
    }
    let expand = name == quoted_name;
    Some(Heredoc { word: piece, name, body: String::new(), expand, strip_tabs })
}
