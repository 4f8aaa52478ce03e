//! What makes records survive a power cut: `syncfs`, then the records are marked.

use std::sync::atomic::Ordering;

use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};
use rustix::fs::syncfs;

use crate::journal::{Position, remember_covered};
use crate::tables::{TABLES, Table};
use crate::{Error, Store};

impl Store {
    /// Makes all changes of records survive a power cut, for whoever removes data next: what is
    /// forgotten must not come back without it. Two `fdatasync`.
    ///
    /// # Errors
    /// [`Error::Db`], [`Error::Host`].
    pub fn settle(&self) -> Result<(), Error> {
        self.journal().sync()?;
        self.synced(|| {
            self.write_aside(|db| {
                db.execute("INSERT OR REPLACE INTO state VALUES ('settled', 1)", []).map(drop)
            })
        })
    }

    /// Runs `work` so that its commit, and with it all before it, reaches the disk.
    pub(super) fn synced<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.read(|db| db.pragma_update(None, "synchronous", "FULL"))?;
        let done = work();
        self.read(|db| db.pragma_update(None, "synchronous", "NORMAL"))?;
        done
    }

    /// Makes everything this handle wrote survive a power cut: one `syncfs`, then the records are
    /// marked. Costs nothing when it wrote no record. Sets space aside afterwards, for whoever fills a
    /// disk has to be able to clear it.
    ///
    /// # Errors
    /// [`Error::Host`] when the disk failed; the records stay of this boot only then.
    pub fn barrier(&self) -> Result<(), Error> {
        if !self.dirty.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let covered = self.cover();
        // What another thread wrote meanwhile has said so itself.
        self.dirty.fetch_or(covered.is_err(), Ordering::Relaxed);
        covered?;
        self.keep_reserve();
        Ok(())
    }

    fn cover(&self) -> Result<(), Error> {
        // What another process records during the sync is not covered by it: it stands behind this,
        // and is none of these rows, or not as they are now.
        let loose = self.loose()?;
        syncfs(&self.directory).map_err(Error::host("syncfs", &self.root))?;
        self.mark_durable(&loose)
    }

    /// What a sync that begins now is going to cover.
    pub(super) fn loose(&self) -> Result<Loose, Error> {
        let reached = self.journal().position()?;
        let rows = |table| Ok((table, self.read(|db| loose_rows(db, table))?));
        Ok(Loose { reached, rows: TABLES.into_iter().map(rows).collect::<Result<_, Error>>()? })
    }

    pub(super) fn mark_durable(&self, loose: &Loose) -> Result<(), Error> {
        // This transaction alone is synced itself: without it all others would count for nothing.
        self.synced(|| {
            self.write_at(|writer, generation| {
                for (table, rows) in &loose.rows {
                    let same = table.columns.iter().enumerate();
                    let same: Vec<String> =
                        same.map(|(at, column)| format!("{column} IS ?{}", at + 1)).collect();
                    let (name, same) = (table.name, same.join(" AND "));
                    let mut query =
                        writer.db().prepare(&format!("UPDATE {name} SET boot = NULL WHERE {same}"))?;
                    for row in rows {
                        query.execute(params_from_iter(row))?;
                    }
                }
                match loose.reached.filter(|reached| reached.generation == generation) {
                    Some(reached) => {
                        writer.barrier(reached.bytes);
                        remember_covered(writer.db(), &self.boot, reached.bytes)?;
                    }
                    // Somebody has written it anew meanwhile: it does not know that they are durable.
                    None => writer.renew_journal(),
                }
                Ok(())
            })
        })
        .map(drop)
    }
}

/// What is not known to be durable.
pub(super) struct Loose {
    /// Where the journal stands.
    reached: Option<Position>,
    rows: Vec<(&'static Table, Vec<Vec<Value>>)>,
}

/// The records that are not known to be durable.
pub(super) fn loose_rows(db: &Connection, table: &Table) -> Result<Vec<Vec<Value>>, rusqlite::Error> {
    let columns = table.columns.join(", ");
    let sql = format!("SELECT {columns} FROM {} WHERE boot IS NOT NULL", table.name);
    let values = |row: &rusqlite::Row<'_>| (0..table.columns.len()).map(|at| row.get(at)).collect();
    db.prepare_cached(&sql)?.query_map([], values)?.collect()
}
