//! One pattern: its text becomes tokens, and the tokens walk over a path.
//!
//! A match keeps the set of places in the text that the tokens read so far can have reached, so
//! its time is at most the product of both lengths, whatever the pattern.

/// A text as Unicode scalar values; a byte that belongs to no character stands above all of them.
pub(super) type Units = Vec<u32>;

const SLASH: u32 = b'/' as u32;
const FIRST_BAD_BYTE: u32 = char::MAX as u32 + 1;

#[derive(Debug, Clone)]
enum Token {
    /// These characters.
    Text(Box<[u32]>),
    /// `?`: one character but `/`.
    Any,
    /// `*`: any number of characters but `/`.
    Star,
    /// `[a-z]`: one character, `/` as well if the class says so. That is what Go does.
    Class { negated: bool, ranges: Box<[(u32, u32)]> },
    /// `**` with something after it: nothing, or anything that ends in `/`.
    Dirs,
    /// `**` at the end: anything.
    Rest,
}

/// Whether `name`, one component of a path, matches `pattern` by Go's `filepath.Match`: `*`, `?`,
/// `[a-z]`, `[^a-z]`, `\x`; `None` for a malformed pattern, whatever the name. `*` and `?` do not
/// match `/`. Time is at most the product of both lengths.
pub fn glob(pattern: &[u8], name: &[u8]) -> Option<bool> {
    let tokens = tokens(pattern, Stars::OfNames)?;
    Some(walk(&tokens, &units(name), &mut Vec::new()))
}

/// Whether `path` as a whole matches `pattern` as a [`PathGlob`]; `None` for a malformed pattern.
pub fn glob_path(pattern: &[u8], path: &[u8]) -> Option<bool> {
    PathGlob::new(pattern).map(|glob| glob.matches(path))
}

/// A pattern over whole paths, as in `.dockerignore` and `COPY --parents`.
///
/// Besides what [`glob`] knows, `**` stands for any number of directories:
///
/// | pattern | matches |
/// |---|---|
/// | `**` at the end | anything, so `a/**` is all below `a` and `a**` all that begins with `a` |
/// | `**/x`, `a/**/x` | `x` at any depth, `a/x` included |
/// | `**x`, no other special character after it | what ends in `x` |
/// | `**x*`, `a**x` | as if a `/` stood behind the `**` |
#[derive(Debug, Clone)]
pub struct PathGlob {
    tokens: Box<[Token]>,
    /// The token whose text every match holds; `None` where looking for it would gain nothing.
    needle: Option<usize>,
}

impl PathGlob {
    /// Reads a pattern. Leading, trailing and doubled `/`, `.` and `..` mean what they mean in a
    /// path that starts at the root. `None` for a malformed pattern.
    pub fn new(pattern: &[u8]) -> Option<Self> {
        let mut kept: Vec<&[u8]> = Vec::new();
        for component in pattern.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => drop(kept.pop()),
                component => kept.push(component),
            }
        }
        Self::compile(&kept.join(&b'/'))
    }

    /// Reads a pattern that is a clean path already.
    pub(super) fn compile(pattern: &[u8]) -> Option<Self> {
        let tokens = tokens(pattern, Stars::OfPaths)?;
        // Go's regular expressions refuse them, so there is no such rule.
        let reversed = |token: &Token| matches!(token, Token::Class { ranges, .. } if ranges.iter().any(|(low, high)| low > high));
        if tokens.iter().any(reversed) {
            return None;
        }
        let length = |token: &Token| if let Token::Text(text) = token { text.len() } else { 0 };
        let longest = (0..tokens.len()).max_by_key(|at| length(&tokens[*at]));
        let needle = longest.filter(|_| !matches!(tokens.first(), Some(Token::Text(_))));
        Some(Self { tokens: tokens.into(), needle })
    }

    /// Whether the whole path (relative, `/` between components) matches.
    pub fn matches(&self, path: impl AsRef<[u8]>) -> bool {
        walk(&self.tokens, &units_of_path(path.as_ref()), &mut Vec::new())
    }

    /// Whether something below the directory `dir` may match: if not, a walk can leave it out.
    /// The root is "".
    pub fn may_match_below(&self, dir: impl AsRef<[u8]>) -> bool {
        let mut text = units_of_path(dir.as_ref());
        if !text.is_empty() {
            text.push(SLASH);
        }
        self.may_continue(&text)
    }

    /// Whether the path or a directory above it matches. `at` is scratch space.
    pub(super) fn matches_path_or_parent(&self, path: &Units, at: &mut Vec<usize>) -> bool {
        if let Some(Token::Text(text)) = self.needle.map(|at| &self.tokens[at])
            && !path.windows(text.len()).any(|window| *window == **text)
        {
            return false;
        }
        walk(&self.tokens, path, at) || at.iter().any(|&place| path.get(place) == Some(&SLASH))
    }

    /// Whether some text that begins with `text` and is longer matches.
    pub(super) fn may_continue(&self, text: &Units) -> bool {
        let mut at = vec![0];
        self.tokens.iter().any(|token| {
            let open = match token {
                Token::Text(wanted) => at.iter().any(|&place| {
                    let rest = &text[place..];
                    rest.len() < wanted.len() && wanted.starts_with(rest)
                }),
                // They go on from anywhere.
                Token::Dirs | Token::Rest => !at.is_empty(),
                // Places ascend: the last one is at the end if any is.
                _ => at.last() == Some(&text.len()),
            };
            step(token, text, &mut at);
            open
        })
    }
}

/// Decodes a text.
fn units(text: &[u8]) -> Units {
    let mut units = Vec::with_capacity(text.len());
    push_units(&mut units, text);
    units
}

/// Decodes a path without leading, trailing and doubled `/`, nor `.`.
pub(super) fn units_of_path(path: &[u8]) -> Units {
    let mut units = Vec::with_capacity(path.len() + 1);
    let named = |component: &&[u8]| !matches!(*component, b"" | b".");
    for component in path.split(|byte| *byte == b'/').filter(named) {
        if !units.is_empty() {
            units.push(SLASH);
        }
        push_units(&mut units, component);
    }
    units
}

fn push_units(units: &mut Units, text: &[u8]) {
    for chunk in text.utf8_chunks() {
        units.extend(chunk.valid().chars().map(u32::from));
        units.extend(chunk.invalid().iter().map(|byte| FIRST_BAD_BYTE + u32::from(*byte)));
    }
}

/// Leaves in `at`, ascending, every place where the tokens can end; says whether the text's end is
/// one of them.
fn walk(tokens: &[Token], text: &[u32], at: &mut Vec<usize>) -> bool {
    at.clear();
    at.push(0);
    for token in tokens {
        step(token, text, at);
        if at.is_empty() {
            return false;
        }
    }
    at.last() == Some(&text.len())
}

/// Moves the places over one token. They stay ascending and without doubles.
fn step(token: &Token, text: &[u32], at: &mut Vec<usize>) {
    match token {
        Token::Text(wanted) => keep(at, wanted.len(), |place| text[place..].starts_with(wanted)),
        Token::Any => keep(at, 1, |place| text.get(place).is_some_and(|unit| *unit != SLASH)),
        Token::Class { negated, ranges } => keep(at, 1, |place| {
            text.get(place).is_some_and(|unit| {
                // Go decodes a bad byte as U+FFFD before it looks at the class.
                let unit =
                    if *unit < FIRST_BAD_BYTE { *unit } else { u32::from(char::REPLACEMENT_CHARACTER) };
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&unit)) != *negated
            })
        }),
        Token::Star => spread(at, text, |place| text[place] != SLASH),
        Token::Rest => spread(at, text, |_| true),
        Token::Dirs => {
            let Some(&first) = at.first() else { return };
            at.extend((first..text.len()).filter(|place| text[*place] == SLASH).map(|place| place + 1));
            at.sort_unstable();
            at.dedup();
        }
    }
}

/// Keeps the places where a token of `length` matches, moved behind it.
fn keep(at: &mut Vec<usize>, length: usize, matches: impl Fn(usize) -> bool) {
    at.retain_mut(|place| {
        let matches = matches(*place);
        *place += length;
        matches
    });
}

/// Adds to each place those behind it up to the first one that cannot be `passed`.
fn spread(at: &mut Vec<usize>, text: &[u32], passed: impl Fn(usize) -> bool) {
    let mut reached = Vec::with_capacity(at.len());
    for &place in at.iter() {
        let mut place = place;
        if reached.last().is_some_and(|last| place <= *last) {
            continue;
        }
        reached.push(place);
        while place < text.len() && passed(place) {
            place += 1;
            reached.push(place);
        }
    }
    *at = reached;
}

/// Which stars a pattern knows.
#[derive(Clone, Copy, PartialEq)]
enum Stars {
    /// `*` only.
    OfNames,
    /// `*` and `**`.
    OfPaths,
}

fn tokens(pattern: &[u8], stars: Stars) -> Option<Vec<Token>> {
    let units = units(pattern);
    let mut rest = units.iter().copied().peekable();
    let mut tokens = Vec::new();
    let mut text = Vec::new();
    while let Some(unit) = rest.next() {
        let token = match char::from_u32(unit) {
            Some('*') if stars == Stars::OfPaths && rest.next_if_eq(&u32::from('*')).is_some() => {
                rest.next_if_eq(&SLASH);
                if rest.peek().is_none() { Token::Rest } else { Token::Dirs }
            }
            Some('*') => Token::Star,
            Some('?') => Token::Any,
            Some('[') => class(&mut rest)?,
            Some('\\') => {
                text.push(rest.next()?);
                continue;
            }
            _ => {
                text.push(unit);
                continue;
            }
        };
        flush(&mut tokens, &mut text);
        // A second one of these adds nothing, however many a hostile pattern has.
        let again = match token {
            Token::Star => matches!(tokens.last(), Some(Token::Star)),
            Token::Dirs => matches!(tokens.last(), Some(Token::Dirs)),
            _ => false,
        };
        if !again {
            tokens.push(token);
        }
    }
    flush(&mut tokens, &mut text);
    if stars == Stars::OfPaths && is_plain_suffix(&units) {
        tokens[0] = Token::Rest;
    }
    Some(tokens)
}

fn flush(tokens: &mut Vec<Token>, text: &mut Units) {
    if !text.is_empty() {
        tokens.push(Token::Text(std::mem::take(text).into()));
    }
}

/// `**file`: with nothing special behind them, the stars may end within a name.
fn is_plain_suffix(pattern: &[u32]) -> bool {
    let special = |unit: &u32| br"*?[]\".iter().any(|byte| u32::from(*byte) == *unit);
    match pattern {
        [first, second, next, ..] => {
            let stars = [*first, *second] == [u32::from('*'); 2];
            stars && *next != SLASH && !pattern[2..].iter().any(special)
        }
        _ => false,
    }
}

/// The class behind a `[`, which is malformed when it is empty or does not end.
fn class(rest: &mut std::iter::Peekable<impl Iterator<Item = u32>>) -> Option<Token> {
    let negated = rest.next_if_eq(&u32::from('^')).is_some();
    let mut ranges = Vec::new();
    while ranges.is_empty() || rest.next_if_eq(&u32::from(']')).is_none() {
        let low = bound(rest)?;
        let high = if rest.next_if_eq(&u32::from('-')).is_some() { bound(rest)? } else { low };
        ranges.push((low, high));
    }
    Some(Token::Class { negated, ranges: ranges.into() })
}

/// One end of a range; `]` and `-` need an escape there, and a bad byte has no place in an order.
fn bound(rest: &mut impl Iterator<Item = u32>) -> Option<u32> {
    let unit = match char::from_u32(rest.next()?)? {
        '\\' => rest.next()?,
        ']' | '-' => return None,
        plain => u32::from(plain),
    };
    (unit < FIRST_BAD_BYTE).then_some(unit)
}
