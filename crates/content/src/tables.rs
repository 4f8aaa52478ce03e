//! The tables of records, and the one way to change them: in the index and in the journal at once.

use kiln_oci::Digest;
use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};

use crate::journal;
use crate::packed::{KEPT, PACKED};
use crate::sidecars::{self, Notes};

/// A table of records. Each has, after these columns, `boot`: the boot in which a record was made
/// that may not have reached the disk yet; null once it has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) name: &'static str,
    /// The first is the primary key.
    pub(crate) columns: &'static [&'static str],
}

pub(crate) static IMAGE: Table =
    Table { name: "image", columns: &["config", "manifest", "snapshot", "size_bytes", "created_unix"] };
pub(crate) static NAME: Table = Table { name: "name", columns: &["reference", "config"] };
pub(crate) static LAYER: Table = Table {
    name: "layer",
    columns: &["snapshot", "diff_id", "size_bytes", "blob", "media_type", "blob_bytes"],
};
pub(crate) static CHAIN: Table = Table { name: "chain", columns: &["chain", "snapshot"] };
pub(crate) static CACHE: Table =
    Table { name: "cache", columns: &["key", "canonical", "snapshot", "created_unix", "description"] };
pub(crate) static SOURCE: Table = Table {
    name: "source",
    columns: &["key", "snapshot", "content", "etag", "last_modified", "created_unix"],
};

/// All of them. Whatever is in one of these is in the journal too.
pub(crate) static TABLES: [&Table; 8] = [&IMAGE, &NAME, &LAYER, &CHAIN, &CACHE, &SOURCE, &PACKED, &KEPT];

/// Finds a table and one of its columns by name; the answers are our own words, fit for SQL.
pub(crate) fn find(table: &str, column: &str) -> Option<(&'static Table, &'static str)> {
    let table = TABLES.into_iter().find(|known| known.name == table)?;
    let column = table.columns.iter().find(|known| **known == column)?;
    Some((table, column))
}

/// What to do about a record with the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    Replace,
    Keep,
}

/// A write transaction. What it changes goes to the journal before it is committed.
pub(crate) struct Writer<'a> {
    db: &'a Connection,
    boot: &'a str,
    lines: Vec<u8>,
    renews: bool,
    notes: Notes,
}

/// What a transaction leaves outside the index.
pub(crate) struct Written {
    /// The journal's lines.
    pub(crate) lines: Vec<u8>,
    /// The journal is to be written anew.
    pub(crate) renews: bool,
    /// What is to be written beside snapshots.
    pub(crate) notes: Notes,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(db: &'a Connection, boot: &'a str) -> Self {
        Self { db, boot, lines: Vec::new(), renews: false, notes: Notes::default() }
    }

    /// What is to be written for what was changed so far.
    pub(crate) fn into_written(self) -> Written {
        let Self { lines, renews, notes, .. } = self;
        Written { lines, renews, notes }
    }

    /// Lets what is written beside a snapshot go with its records.
    pub(crate) fn forget_notes(&mut self, snapshot: &str) {
        self.notes.forget(snapshot);
    }

    /// Lets the journal be written anew, because what has changed is no line.
    pub(crate) fn renew_journal(&mut self) {
        self.renews = true;
    }

    /// Says in the journal that its first so many bytes have reached the disk.
    pub(crate) fn barrier(&mut self, covered_bytes: u64) {
        journal::write_barrier(&mut self.lines, covered_bytes, self.boot);
    }

    /// For reading inside the transaction.
    pub(crate) fn db(&self) -> &'a Connection {
        self.db
    }

    /// Puts a record of this boot, its values in the order of the table's columns; whether anything
    /// has changed.
    pub(crate) fn put<const N: usize>(
        &mut self,
        table: &'static Table,
        existing: Existing,
        values: [Value; N],
    ) -> Result<bool, rusqlite::Error> {
        debug_assert_eq!(N, table.columns.len(), "{} has other columns", table.name);
        let changed = insert(self.db, table, existing, &values, Some(self.boot))? > 0;
        if changed {
            journal::write_put(&mut self.lines, table, &values, Some(self.boot));
            if let Some(snapshot) = self.snapshot_of(table, &values)? {
                journal::write_put_at(self.notes.about(snapshot), table, &values, sidecars::now());
            }
        }
        Ok(changed)
    }

    /// The snapshot that a record is about.
    fn snapshot_of(&self, table: &Table, values: &[Value]) -> Result<Option<String>, rusqlite::Error> {
        if let Some(at) = table.columns.iter().position(|column| *column == "snapshot") {
            return Ok(Some(match &values[at] {
                Value::Text(snapshot) => snapshot.clone(),
                _ => sidecars::NONE.to_owned(),
            }));
        }
        if table != &NAME {
            return Ok(None);
        }
        Ok(self.snapshots_of("image", "config", &values[1])?.pop())
    }

    fn snapshots_of(&self, from: &str, column: &str, value: &Value) -> Result<Vec<String>, rusqlite::Error> {
        let sql = format!("SELECT coalesce(image.snapshot, ?2) FROM {from} WHERE {column} = ?1");
        let mut query = self.db.prepare_cached(&sql)?;
        query.query_map(rusqlite::params![value, sidecars::NONE], |row| row.get(0))?.collect()
    }

    /// Removes all records with this value in a column; how many that were.
    pub(crate) fn delete(
        &mut self,
        table: &'static Table,
        column: &'static str,
        value: &str,
    ) -> Result<usize, rusqlite::Error> {
        let key = Value::Text(value.to_owned());
        let about = match (table.name, column) {
            ("name", "reference") => {
                self.snapshots_of("name JOIN image USING (config)", "reference", &key)?
            }
            ("name" | "image", "config") => self.snapshots_of("image", "config", &key)?,
            _ => Vec::new(),
        };
        let removed = delete(self.db, table, column, value)?;
        if removed > 0 {
            journal::write_delete(&mut self.lines, table, column, value, None);
            for snapshot in about {
                let now = Some(sidecars::now());
                journal::write_delete(self.notes.about(snapshot), table, column, value, now);
            }
        }
        Ok(removed)
    }
}

pub(crate) fn insert(
    db: &Connection,
    table: &Table,
    existing: Existing,
    values: &[Value],
    boot: Option<&str>,
) -> Result<usize, rusqlite::Error> {
    let how = if existing == Existing::Replace { "REPLACE" } else { "IGNORE" };
    let (name, columns, marks) = (table.name, table.columns.join(", "), "?, ".repeat(values.len()));
    let sql = format!("INSERT OR {how} INTO {name} ({columns}, boot) VALUES ({marks}?)");
    let boot = boot.map_or(Value::Null, |boot| Value::Text(boot.to_owned()));
    db.prepare_cached(&sql)?.execute(params_from_iter(values.iter().chain([&boot])))
}

pub(crate) fn delete(
    db: &Connection,
    table: &Table,
    column: &str,
    value: &str,
) -> Result<usize, rusqlite::Error> {
    let sql = format!("DELETE FROM {} WHERE {column} = ?1", table.name);
    db.prepare_cached(&sql)?.execute([value])
}

/// A digest as it stands in a column.
pub(crate) fn text(value: impl std::fmt::Display) -> Value {
    Value::Text(value.to_string())
}

pub(crate) fn optional(value: Option<impl std::fmt::Display>) -> Value {
    value.map_or(Value::Null, text)
}

pub(crate) fn number(value: u64) -> Value {
    Value::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}

/// The beginning of the digest of a line: enough to tell a torn one.
pub(crate) fn checksum(bytes: &[u8]) -> String {
    Digest::of(bytes).hex()[..16].to_owned()
}
