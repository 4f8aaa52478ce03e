//! Which ids a user namespace has.

/// A map of ids as `/proc/PID/uid_map` and `gid_map` have it (user_namespaces(7)): what is an id inside, and what
/// it is outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    parts: Vec<Part>,
}

/// Ids that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    inside: u32,
    outside: u32,
    /// At least one, and so many are there, inside and outside.
    count: u32,
}

impl Part {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_whitespace().map(|field| field.parse().ok());
        let (inside, outside, count) = (fields.next()??, fields.next()??, fields.next()??);
        let beyond = u32::checked_sub(count, 1)?;
        u32::checked_add(inside, beyond)?;
        u32::checked_add(outside, beyond)?;
        Some(Self { inside, outside, count })
    }

    fn last(self) -> u32 {
        self.inside + (self.count - 1)
    }

    fn has(self, id: u32) -> bool {
        (self.inside..=self.last()).contains(&id)
    }
}

impl IdMap {
    /// What a file says; a line that makes no sense is left out.
    pub fn parse(text: &str) -> Self {
        Self { parts: text.lines().filter_map(Part::parse).collect() }
    }

    /// Whether it has no ids: nobody has written it, or nobody could read it.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Whether it is that of the host, which has all ids.
    pub fn is_whole(&self) -> bool {
        self.parts == [Part { inside: 0, outside: 0, count: u32::MAX }]
    }

    /// Whether it has one id only.
    pub fn is_single(&self) -> bool {
        matches!(self.parts.as_slice(), [Part { count: 1, .. }])
    }

    /// Whether an id is one inside.
    pub fn has(&self, id: u32) -> bool {
        self.parts.iter().any(|part| part.has(id))
    }

    /// The highest id inside.
    pub fn last(&self) -> Option<u32> {
        self.parts.iter().map(|part| part.last()).max()
    }

    /// What an id inside is outside; `None`: it is none.
    pub fn outside(&self, id: u32) -> Option<u32> {
        let part = self.parts.iter().find(|part| part.has(id))?;
        Some(part.outside + (id - part.inside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "         0          0 4294967295\n";
    const SINGLE: &str = "         0       1000          1\n";
    const RANGE: &str = "         0       1000          1\n         1     100000      65536\n";

    #[test]
    fn a_map_tells_how_many_ids_there_are() {
        let told = |text| {
            let map = IdMap::parse(text);
            [map.is_empty(), map.is_single(), map.is_whole()]
        };
        assert_eq!(told(""), [true, false, false]);
        assert_eq!(told(SINGLE), [false, true, false]);
        assert_eq!(told(RANGE), [false, false, false]);
        assert_eq!(told(WHOLE), [false, false, true]);
        // All ids, but others than the host's.
        assert_eq!(told("0 1 1\n1 0 1\n2 2 4294967293\n"), [false, false, false]);
    }

    #[test]
    fn ids_inside_are_ids_outside() {
        let map = IdMap::parse(RANGE);
        assert_eq!([0, 1, 65536, 65537].map(|id| map.has(id)), [true, true, true, false]);
        assert_eq!(
            [0, 1, 65536, 65537].map(|id| map.outside(id)),
            [Some(1000), Some(100_000), Some(165_535), None]
        );
        assert_eq!(map.last(), Some(65536));
        assert_eq!((IdMap::default().last(), IdMap::parse(WHOLE).last()), (None, Some(u32::MAX - 1)));
    }

    #[test]
    fn lines_that_make_no_sense_are_left_out() {
        let nonsense = "x\n\n1 2\n0 0 0\n-1 0 1\n5 5 4294967295\n0 5 4294967295\n0 0 4294967296\n";
        assert_eq!(IdMap::parse(nonsense), IdMap::default());
        assert_eq!(IdMap::parse(&format!("{nonsense}{SINGLE}")), IdMap::parse(SINGLE));
    }
}
