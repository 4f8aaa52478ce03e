//! A container's output on disk: lines as docker's `json-file` driver writes them.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kiln_executor::Stream;
use serde::{Deserialize, Serialize};

use crate::{LogOptions, Time};

/// A longer line is cut into several records, as docker does.
const MAX_RECORD_BYTES: usize = 16 << 10;

#[derive(Serialize, Deserialize)]
struct Record<'a> {
    log: std::borrow::Cow<'a, str>,
    stream: std::borrow::Cow<'a, str>,
    time: String,
}

fn stream_name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    }
}

/// Writes a log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    path: PathBuf,
    options: LogOptions,
    file: File,
    size_bytes: u64,
    /// What has come of a line that has not ended.
    partial: [Vec<u8>; 2],
}

impl LogWriter {
    /// Goes on with the log in a container's directory.
    pub(crate) fn open(dir: &Path, options: LogOptions) -> io::Result<Self> {
        let path = dir.join("log");
        let file = append(&path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self { path, options, file, size_bytes, partial: Default::default() })
    }

    /// Takes output as it comes. A log that cannot be written loses it, and nobody waits.
    pub(crate) fn write(&mut self, stream: Stream, mut bytes: &[u8]) {
        let mut lines = Vec::new();
        let partial = &mut self.partial[usize::from(stream == Stream::Stderr)];
        while !bytes.is_empty() {
            let room = MAX_RECORD_BYTES - partial.len();
            let window = &bytes[..bytes.len().min(room)];
            let (taken, whole) = match window.iter().position(|&b| b == b'\n') {
                Some(at) => (at + 1, true),
                None => (window.len(), window.len() == room),
            };
            partial.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if whole {
                encode(stream, partial, &mut lines);
                partial.clear();
            }
        }
        self.append(&lines);
    }

    /// Writes what has come of lines that will not end.
    pub(crate) fn flush(&mut self) {
        let mut lines = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let partial = &mut self.partial[usize::from(stream == Stream::Stderr)];
            if !partial.is_empty() {
                encode(stream, partial, &mut lines);
                partial.clear();
            }
        }
        self.append(&lines);
    }

    fn append(&mut self, mut lines: &[u8]) {
        while !lines.is_empty() {
            let max = self.options.max_bytes.unwrap_or(u64::MAX);
            let room = match self.size_bytes >= max && self.rotate().is_err() {
                // It cannot be put aside: so it grows.
                true => u64::MAX,
                false => max.saturating_sub(self.size_bytes),
            };
            // The record that fills it is the last.
            let room = usize::try_from(room).unwrap_or(usize::MAX).clamp(1, lines.len());
            let end = lines[room - 1..].iter().position(|&b| b == b'\n').map_or(lines.len(), |at| room + at);
            let (now, later) = lines.split_at(end);
            match self.file.write_all(now) {
                Ok(()) => self.size_bytes += now.len() as u64,
                // A record that is there in part would take the next one with it.
                Err(_) => drop(self.file.set_len(self.size_bytes)),
            }
            lines = later;
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let aside = |nth: u32| self.path.with_file_name(format!("log.{nth}"));
        let kept = self.options.max_files.saturating_sub(1);
        for nth in (1..kept).rev() {
            let _ = fs::rename(aside(nth), aside(nth + 1));
        }
        if kept > 0 {
            fs::rename(&self.path, aside(1))?;
        } else {
            fs::remove_file(&self.path)?;
        }
        self.file = append(&self.path)?;
        self.size_bytes = 0;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn encode(stream: Stream, line: &[u8], out: &mut Vec<u8>) {
    let log = String::from_utf8_lossy(line);
    let record = Record { log, stream: stream_name(stream).into(), time: Time::now().to_string() };
    // Text into memory: nothing in it can fail.
    if serde_json::to_writer(&mut *out, &record).is_ok() {
        out.push(b'\n');
    }
}

/// A piece of output: a line, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Where it was printed to.
    pub stream: Stream,
    /// When: [`Time`] as text. All of a log are as long as each other and sort as what they stand for.
    pub time: String,
    /// What, its line feed included.
    pub text: String,
}

/// Reads a log from its beginning, and goes on as it grows.
#[derive(Debug)]
pub struct LogReader {
    dir: PathBuf,
    /// What comes behind the one that is read, the one that is written last.
    files: VecDeque<File>,
    open: Option<BufReader<File>>,
    line: Vec<u8>,
}

type FileId = (u64, u64);

fn id_of(file: &File) -> io::Result<FileId> {
    file.metadata().map(|file| (file.dev(), file.ino()))
}

impl LogReader {
    /// The log in a container's directory.
    ///
    /// # Errors
    /// When there is one and it cannot be read.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let files = files_in(dir)?;
        Ok(Self { dir: dir.to_owned(), files, open: None, line: Vec::new() })
    }

    /// The same from the last `count` pieces on. Costs what those are long, not what the log is.
    ///
    /// # Errors
    /// When there is one and it cannot be read.
    pub fn open_tail(dir: &Path, count: usize) -> io::Result<Self> {
        let mut files = files_in(dir)?;
        let mut left = count;
        let mut first = files.len();
        while first > 0 {
            first -= 1;
            let (start, found) = tail_of(&files[first], left)?;
            files[first].seek(SeekFrom::Start(start))?;
            left -= found;
            if left == 0 {
                break;
            }
        }
        files.drain(..first);
        Ok(Self { dir: dir.to_owned(), files, open: None, line: Vec::new() })
    }

    /// The next piece; `None`: there is none yet.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn next_line(&mut self) -> io::Result<Option<LogLine>> {
        loop {
            let Some(open) = &mut self.open else {
                if self.files.is_empty() {
                    self.files = files_in(&self.dir)?;
                }
                match self.files.pop_front() {
                    Some(file) => self.open = Some(BufReader::new(file)),
                    None => return Ok(None),
                }
                continue;
            };
            open.read_until(b'\n', &mut self.line)?;
            if self.line.ends_with(b"\n") {
                let parsed = parse(&self.line);
                self.line.clear();
                // What is no record was torn by a crash.
                if let Some(line) = parsed {
                    return Ok(Some(line));
                }
                continue;
            }
            if self.files.is_empty() {
                let here = id_of(open.get_ref())?;
                self.files = self.newer(here)?;
                if self.files.is_empty() {
                    return Ok(None);
                }
                // It may have grown between the last look and the moment it was put aside.
                continue;
            }
            self.open = None;
            self.line.clear();
        }
    }

    /// The files that came after `here`; all of them when that is gone.
    fn newer(&self, here: FileId) -> io::Result<VecDeque<File>> {
        let mut files = files_in(&self.dir)?;
        let mut known = None;
        for (at, file) in files.iter().enumerate() {
            if id_of(file)? == here {
                known = Some(at);
            }
        }
        files.drain(..known.map_or(0, |at| at + 1));
        Ok(files)
    }
}

/// Where the last `count` lines of a file begin, and how many there are at most so many. What has no line
/// feed behind it counts for nothing: it is being written.
fn tail_of(file: &File, count: usize) -> io::Result<(u64, usize)> {
    const BLOCK: usize = 64 << 10;
    let mut block = vec![0; BLOCK];
    let mut at = file.metadata()?.len();
    // Line feeds met so far; that of the last line is the first.
    let mut met = 0;
    while at > 0 {
        let length = usize::try_from(at).unwrap_or(BLOCK).min(BLOCK);
        at -= length as u64;
        let block = &mut block[..length];
        file.read_exact_at(block, at)?;
        for (nth, _) in block.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            if met == count {
                return Ok((at + nth as u64 + 1, count));
            }
            met += 1;
        }
    }
    Ok((0, met))
}

/// The files of the log, oldest first. Looks until nothing is put aside meanwhile.
fn files_in(dir: &Path) -> io::Result<VecDeque<File>> {
    let look = || -> io::Result<(Vec<FileId>, VecDeque<File>)> {
        let (mut ids, mut files) = (Vec::new(), VecDeque::new());
        let names = std::iter::once("log".to_owned()).chain((1..).map(|nth| format!("log.{nth}")));
        for name in names {
            match File::open(dir.join(&name)) {
                Ok(file) => {
                    ids.push(id_of(&file)?);
                    files.push_front(file);
                }
                // Between two names of the newest there is none for a moment.
                Err(error) if error.kind() == io::ErrorKind::NotFound && name == "log" => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            }
        }
        Ok((ids, files))
    };
    let mut last = look()?;
    for _ in 0..100 {
        let again = look()?;
        if again.0 == last.0 {
            break;
        }
        last = again;
    }
    Ok(last.1)
}

fn parse(line: &[u8]) -> Option<LogLine> {
    let record: Record<'_> = serde_json::from_slice(line).ok()?;
    let stream = if record.stream == "stderr" { Stream::Stderr } else { Stream::Stdout };
    Some(LogLine { stream, time: record.time, text: record.log.into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut LogReader) -> Vec<(Stream, String)> {
        let mut lines = Vec::new();
        while let Some(line) = reader.next_line().unwrap() {
            lines.push((line.stream, line.text));
        }
        lines
    }

    #[test]
    fn lines_come_back_and_later_ones_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        assert!(all(&mut reader).is_empty());
        let mut log = LogWriter::open(dir.path(), LogOptions::default()).unwrap();
        log.write(Stream::Stdout, b"one\ntw");
        log.write(Stream::Stderr, b"oops\n");
        let text = |text: &str| text.to_owned();
        assert_eq!(all(&mut reader), [(Stream::Stdout, text("one\n")), (Stream::Stderr, text("oops\n"))]);
        log.write(Stream::Stdout, b"o\nend");
        log.flush();
        assert_eq!(all(&mut reader), [(Stream::Stdout, text("two\n")), (Stream::Stdout, text("end"))]);
        let first = fs::read_to_string(dir.path().join("log")).unwrap();
        assert!(first.starts_with(r#"{"log":"one\n","stream":"stdout","time":"2"#), "{first}");
    }

    #[test]
    fn long_lines_are_cut_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path(), LogOptions::default()).unwrap();
        log.write(Stream::Stdout, &[b'x'; 40_000]);
        log.write(Stream::Stdout, b"\n");
        let lines = all(&mut LogReader::open(dir.path()).unwrap());
        assert_eq!(lines.len(), 3);
        assert_eq!(lines.iter().map(|(_, text)| text.len()).sum::<usize>(), 40_001);
    }

    #[test]
    fn a_full_log_is_put_aside_and_readers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let options = LogOptions { none: false, max_bytes: Some(300), max_files: 3 };
        let mut log = LogWriter::open(dir.path(), options).unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        let mut seen = Vec::new();
        for nth in 0..40 {
            log.write(Stream::Stdout, format!("{nth}\n").as_bytes());
            seen.extend(all(&mut reader));
        }
        assert_eq!(seen.len(), 40);
        assert!(dir.path().join("log.2").exists() && !dir.path().join("log.3").exists());
        let kept = all(&mut LogReader::open(dir.path()).unwrap());
        assert!(kept.len() < 40 && kept.last().unwrap().1 == "39\n", "{kept:?}");
    }

    #[test]
    fn the_last_lines_are_those_at_the_end_whatever_the_files_are() {
        let dir = tempfile::tempdir().unwrap();
        let options = LogOptions { none: false, max_bytes: Some(20_000), max_files: 50 };
        let mut log = LogWriter::open(dir.path(), options).unwrap();
        let tail = |count| all(&mut LogReader::open_tail(dir.path(), count).unwrap());
        assert!(tail(3).is_empty());
        let long = "x".repeat(3000);
        for nth in 0..2000 {
            log.write(
                Stream::Stdout,
                format!("{nth}{}\n", if nth % 50 == 0 { &*long } else { "" }).as_bytes(),
            );
        }
        // What is being written is no line yet.
        File::options().append(true).open(dir.path().join("log")).unwrap().write_all(b"{\"log\":").unwrap();
        let whole = all(&mut LogReader::open(dir.path()).unwrap());
        assert!(whole.len() == 2000 && dir.path().join("log.5").exists());
        for count in [0, 1, 2, 49, 50, 51, 700, 1999, 2000, 2001, usize::MAX] {
            assert_eq!(tail(count), whole[2000 - count.min(2000)..], "{count}");
        }
    }

    #[test]
    fn one_write_fills_several_files_and_none_beyond_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let options = LogOptions { none: false, max_bytes: Some(1000), max_files: 50 };
        let mut log = LogWriter::open(dir.path(), options).unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        log.write(Stream::Stdout, b"first\n");
        assert_eq!(all(&mut reader).len(), 1);
        log.write(Stream::Stdout, &b"\n".repeat(200));
        let record = fs::read(dir.path().join("log")).unwrap().split_inclusive(|&b| b == b'\n').count();
        assert!(record > 0 && dir.path().join("log.9").exists());
        for nth in 1..10 {
            let size = fs::metadata(dir.path().join(format!("log.{nth}"))).unwrap().len();
            assert!((1000..1100).contains(&size), "{size}");
        }
        // A reader that looks only now misses nothing of what was put aside.
        assert_eq!(all(&mut reader).len(), 200);
    }

    #[test]
    fn a_torn_record_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("log"), "{\"log\":\"half\n{\"x\":1}\n").unwrap();
        let mut log = LogWriter::open(dir.path(), LogOptions::default()).unwrap();
        log.write(Stream::Stdout, b"whole\n");
        assert_eq!(all(&mut LogReader::open(dir.path()).unwrap()), [(Stream::Stdout, "whole\n".to_owned())]);
    }
}
