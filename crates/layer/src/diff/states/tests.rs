use super::*;
use crate::index::Timestamp;
use crate::node::Xattrs;
use crate::tar_write::write_header;

/// A tar of so many empty files, with a state behind each, as bytes and as states.
fn states(files: u64) -> HashStates {
    let mut hash = Sha256Writer::new(io::sink());
    let (mut tar, mut chain, mut states) = (Vec::new(), Chain::new(), Vec::new());
    for nth in 0..files {
        let (path, xattrs) = (format!("f{nth}").into_bytes(), Xattrs::new());
        let header = Header { path: &path, ..header(&xattrs) };
        chain.add(&header, None);
        let begin = tar.len();
        write_header(&mut tar, &header).unwrap();
        hash.write_all(&tar[begin..]).unwrap();
        states.push(HashState {
            entries: nth + 1,
            size_bytes: tar.len() as u64,
            chain: chain.digest().unwrap(),
            sha256: hash.state(),
        });
    }
    tar.extend_from_slice(&END);
    HashStates::new(DiffId(Digest::of(&tar)), states).unwrap()
}

fn header(xattrs: &Xattrs) -> Header<'_> {
    Header {
        path: b"file",
        flag: b'0',
        link: b"",
        mode: 0o644,
        uid: 1,
        gid: 2,
        size: 0,
        mtime: Timestamp { secs: 3, nanos: 4 },
        device: (0, 0),
        xattrs,
    }
}

#[test]
fn states_come_back_and_those_that_lie_do_not_where_that_can_be_told() {
    let known = states(5);
    let bytes = known.to_bytes();
    assert_eq!(HashStates::from_bytes(&bytes), Some(known.clone()));
    for at in 0..bytes.len() {
        // Without the last state, the one before leads somewhere else.
        assert_eq!(HashStates::from_bytes(&bytes[..at]), None, "cut at {at}");
    }
    type Change = fn(&mut HashStates);
    let lies: [(&str, Change); 8] = [
        ("another diff ID", |known| known.diff_id = DiffId(Digest::of(b"another"))),
        ("another last hash", |known| known.states[4].sha256 = known.states[3].sha256.clone()),
        ("two in the wrong order", |known| known.states.swap(1, 2)),
        ("the same twice", |known| known.states[2] = known.states[1].clone()),
        ("half a block", |known| known.states[2].size_bytes += 1),
        ("more members than blocks", |known| known.states[4].entries = 100),
        ("a member of nothing", |known| known.states[0].entries = 0),
        ("none", |known| known.states.clear()),
    ];
    for (what, lie) in lies {
        let mut lying = known.clone();
        lie(&mut lying);
        assert_eq!(HashStates::from_bytes(&lying.to_bytes()), None, "{what}");
    }
    let mut other_version = bytes;
    other_version[0] ^= 1;
    assert_eq!(HashStates::from_bytes(&other_version), None);
}

#[test]
fn of_many_states_some_are_kept_and_the_last_one() {
    for count in [1, MOST as u64, MOST as u64 + 1, 1000] {
        let known = states(count);
        assert!(known.states.len() <= MOST && known.states.len() * 2 > MOST.min(count as usize));
        assert_eq!(known.states.last().map(|last| last.entries), Some(count));
        assert_eq!(HashStates::from_bytes(&known.to_bytes()), Some(known));
    }
}

#[test]
fn a_chain_tells_members_apart_by_each_of_their_parts() {
    let (none, some) = (Xattrs::new(), Xattrs::from([(b"user.a".to_vec(), b"1".to_vec())]));
    let other = Xattrs::from([(b"user.a".to_vec(), b"2".to_vec())]);
    let plain = || header(&none);
    let members = [
        (plain(), None),
        (Header { path: b"other", ..plain() }, None),
        (Header { flag: b'1', ..plain() }, None),
        (Header { link: b"to", ..plain() }, None),
        (Header { path: b"filet", link: b"o", ..plain() }, None),
        (Header { mode: 0o4644, ..plain() }, None),
        (Header { uid: 2, ..plain() }, None),
        (Header { gid: 1, ..plain() }, None),
        (Header { size: 1, ..plain() }, Some([1; 32])),
        (Header { size: 1, ..plain() }, Some([2; 32])),
        (Header { size: 2, ..plain() }, Some([1; 32])),
        (Header { mtime: Timestamp { secs: 4, nanos: 4 }, ..plain() }, None),
        (Header { mtime: Timestamp { secs: 3, nanos: 5 }, ..plain() }, None),
        (Header { device: (1, 0), ..plain() }, None),
        (Header { device: (0, 1), ..plain() }, None),
        (Header { xattrs: &some, ..plain() }, None),
        (Header { xattrs: &other, ..plain() }, None),
    ];
    let digest = |(header, content): &(Header<'_>, Option<[u8; 32]>)| {
        let mut chain = Chain::new();
        chain.add(header, content.as_ref());
        chain.digest().unwrap()
    };
    let digests: std::collections::HashSet<_> = members.iter().map(digest).collect();
    assert_eq!(digests.len(), members.len());
    assert_eq!(digest(&members[0]), digest(&(plain(), None)));
}

#[test]
fn without_the_content_of_a_file_there_is_no_chain() {
    let none = Xattrs::new();
    let mut chain = Chain::new();
    chain.add(&Header { size: 0, ..header(&none) }, None);
    assert!(chain.digest().is_some());
    chain.add(&Header { size: 1, ..header(&none) }, None);
    assert_eq!(chain.digest(), None);
    chain.add(&Header { size: 1, ..header(&none) }, Some(&[1; 32]));
    assert_eq!(chain.digest(), None);
}

/// Whoever changes what a tar is raises [`VERSION`], and writes the new digest here.
#[test]
fn the_bytes_of_a_tar_are_those_of_this_version() {
    let xattrs = Xattrs::from([(b"user.a".to_vec(), b"\n\0".to_vec())]);
    let (none, long) = (Xattrs::new(), [&b"d".repeat(120)[..], b"/", &b"f".repeat(150)[..]].concat());
    let mut tar = Vec::new();
    for header in [
        header(&none),
        Header { path: b"dir/", flag: b'5', mode: 0o1777, ..header(&none) },
        Header { path: &long, link: &long, flag: b'2', ..header(&none) },
        Header { path: &long[..200], flag: b'3', device: (5, 1), ..header(&none) },
        Header { uid: u32::MAX - 1, gid: 3_000_000, xattrs: &xattrs, size: 10 << 30, ..header(&none) },
        Header { mtime: Timestamp { secs: -2, nanos: 500_000_000 }, ..header(&none) },
        Header { mtime: Timestamp { secs: 1 << 34, nanos: 0 }, ..header(&none) },
    ] {
        write_header(&mut tar, &header).unwrap();
    }
    let expected = "24056be8ca74afa3de1c374f032939d78b7fbd7e83eae18be740758310c699da";
    assert_eq!((VERSION, Digest::of(&tar).hex().as_str()), (1, expected));
}
