//! A file from a web server becomes a snapshot that holds it.

use std::time::Duration;

use jiff::civil::DateTime;
use jiff::fmt::{rfc2822, strtime};
use jiff::tz::TimeZone;
use kiln_content::SourceRecord;
use kiln_llb as llb;
use kiln_oci::{Digest, Sha256Writer, SnapshotId};

use super::http_client::{Answer, Conditions, HttpClient};
use super::{Fetcher, SourceError, check_file_name, key_of};
use crate::engine::now_unix;

/// How long to wait before each new try of a transfer that broke off.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];

/// A downloaded file in a snapshot of its own, under the name the op gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Downloaded {
    /// Where it is.
    pub(crate) snapshot: SnapshotId,
    /// Digest of its bytes.
    pub(crate) content: Digest,
    /// When the server says it was changed; seconds since 1970.
    pub(crate) modified_unix: Option<i64>,
}

/// What the store has of a URL.
struct Known {
    file: Downloaded,
    conditions: Conditions,
}

impl Fetcher<'_> {
    /// Downloads a file, or finds that the one in the store is still the newest.
    ///
    /// Costs one conditional request when the file is known, and none when its checksum is.
    /// Transfers that break off are tried three times.
    ///
    /// # Errors
    /// [`SourceError::Checksum`] when it is not the expected one; nothing is kept then.
    pub(crate) fn http(&self, op: &llb::Http) -> Result<Downloaded, SourceError> {
        check_file_name(&op.filename)?;
        let key = key_of(&["http", &op.url, &op.filename, &format!("{:o}", op.mode)]);
        let known = match self.known(&key)? {
            Some(SourceRecord { snapshot, content: Some(content), etag, last_modified, .. }) => {
                let modified_unix = last_modified.as_deref().and_then(http_date);
                let file = Downloaded { snapshot, content, modified_unix };
                Some(Known { file, conditions: Conditions { etag, last_modified } })
            }
            _ => None,
        };
        if let (Some(expected), Some(known)) = (op.checksum, &known)
            && known.file.content == expected
        {
            return Ok(known.file.clone());
        }
        let client = HttpClient::new(self, &op.url)?;
        for pause in PAUSES {
            match self.download(op, &key, known.as_ref(), &client) {
                Err(error) if is_transient(&error) => client.pause(pause)?,
                other => return other,
            }
        }
        self.download(op, &key, known.as_ref(), &client)
    }

    fn download(
        &self,
        op: &llb::Http,
        key: &Digest,
        known: Option<&Known>,
        client: &HttpClient<'_>,
    ) -> Result<Downloaded, SourceError> {
        let answer = client.get(known.map(|known| &known.conditions))?;
        let mut body = match (answer, known) {
            (Answer::NotModified, Some(known)) => {
                self.check_sum(op, client, known.file.content)?;
                return Ok(known.file.clone());
            }
            (Answer::NotModified, None) => return Err(client.status(304)),
            (Answer::Body(body), _) => body,
        };
        let conditions = body.conditions();
        let modified_unix = conditions.last_modified.as_deref().and_then(http_date);
        let mut content = None;
        let fresh = self.one_file(&op.filename, op.mode, |file| {
            let mut out = Sha256Writer::new(file);
            body.copy_to(&mut out, self.options.max_download_bytes)?;
            let actual = out.finish().1;
            self.check_sum(op, client, actual)?;
            content = Some(actual);
            // A server without ETags sends the same file again and again: the known one stays.
            let same = known.is_some_and(|known| {
                known.file.content == actual && known.conditions.last_modified == conditions.last_modified
            });
            // BuildKit's choice for servers that do not say.
            Ok((!same).then_some(modified_unix.unwrap_or(0)))
        })?;
        let file = match (fresh, content, known) {
            (Some(snapshot), Some(content), _) => Downloaded { snapshot, content, modified_unix },
            (_, _, Some(known)) => known.file.clone(),
            (_, _, None) => {
                let what = "a file that is neither new nor known".to_owned();
                return Err(crate::BuildError::Bug { what }.into());
            }
        };
        let record = SourceRecord {
            snapshot: file.snapshot.clone(),
            content: Some(file.content),
            etag: conditions.etag,
            last_modified: conditions.last_modified,
            created_unix: now_unix(),
        };
        self.remember(key, &record)?;
        Ok(file)
    }

    fn check_sum(&self, op: &llb::Http, client: &HttpClient<'_>, actual: Digest) -> Result<(), SourceError> {
        match op.checksum {
            Some(expected) if expected != actual => {
                Err(SourceError::Checksum { url: client.shown().to_owned(), expected, actual })
            }
            _ => Ok(()),
        }
    }
}

/// What may go away by itself.
fn is_transient(error: &SourceError) -> bool {
    match error {
        SourceError::Status { status, .. } => matches!(status, 500 | 502 | 503 | 504),
        // Whoever is not there will not be there in a second either.
        SourceError::Transfer { source, .. } => !source.is_connect() && !source.is_builder(),
        _ => false,
    }
}

/// Seconds since 1970 of an HTTP date, in any of the three forms of RFC 9110, section 5.6.7.
fn http_date(text: &str) -> Option<i64> {
    if let Ok(date) = rfc2822::parse(text) {
        return Some(date.timestamp().as_second());
    }
    let forms = ["%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"];
    forms.iter().find_map(|form| {
        let date: DateTime = strtime::parse(form, text).ok()?.to_datetime().ok()?;
        Some(date.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second())
    })
}

#[cfg(test)]
mod tests {
    use super::http_date;

    #[test]
    fn all_three_forms_of_http_dates_are_read() {
        // RFC 9110's own example.
        for text in
            ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
        {
            assert_eq!(http_date(text), Some(784_111_777), "{text}");
        }
        assert_eq!(http_date("yesterday"), None);
    }
}
