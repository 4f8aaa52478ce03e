//! The nearest known word to an unknown one.

/// No more names than this are compared: files by machines declare thousands.
const MOST: usize = 1000;
/// Nothing farther away is a typing mistake.
const FARTHEST: usize = 3;

/// The one of `known` that is close to `word`, if any.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower: Vec<char> = word.to_lowercase().chars().take(64).collect();
    let most = ((word.len() + 1) / 3).clamp(1, FARTHEST);
    let distance = |name: &str| {
        // Upper case may be longer or shorter by a few bytes; four bytes are one character at least.
        let lengths_differ =
            name.len() > 4 * (word.len() + FARTHEST) || word.len() > 4 * (name.len() + FARTHEST);
        if lengths_differ { None } else { distance(&lower, &name.to_lowercase(), most) }
    };
    let near = known.into_iter().take(MOST).filter_map(|name| Some((distance(name)?, name)));
    let (far, name) = near.min_by_key(|(far, _)| *far)?;
    (far < word.len() && name != word).then_some(name)
}

/// [`nearest`] as a hint.
pub(crate) fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(word, known).map(|name| format!("did you mean `{name}`?"))
}

/// Edit distance where swapping two neighbours counts once; `None`: more than `most`.
fn distance(a: &[char], b: &str, most: usize) -> Option<usize> {
    let b: Vec<char> = b.chars().take(64).collect();
    if a.len().abs_diff(b.len()) > most {
        return None;
    }
    let (mut before, mut above) = (Vec::new(), (0..=b.len()).collect::<Vec<usize>>());
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (above[j] + 1).min(row[j - 1] + 1).min(above[j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                let swapped: &Vec<usize> = &before;
                best = best.min(swapped[j - 2] + 1);
            }
            row.push(best);
        }
        if row.iter().chain(&above).min().is_some_and(|least| *least > most) {
            return None;
        }
        before = std::mem::replace(&mut above, row);
    }
    Some(above[b.len()]).filter(|far| *far <= most)
}
