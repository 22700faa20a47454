//! The zone in which an application shows times.
//!
//! Celery has two of them, which differ only while `timezone` is not set: times that the worker
//! makes itself (when a task ended, when a retry is due) are in UTC or, without `enable_utc`, in
//! the machine's zone; times that came without an offset are UTC either way. Zones are those of
//! the IANA database, which is part of the binary, for an image may have none. Does not know
//! what time it is. Answers for `Celery.timezone` and `celery.utils.time.maybe_make_aware`.

use chrono::{DateTime, FixedOffset, Local, Offset, TimeZone as _, Utc};
use jiff::tz::{TimeZone, TimeZoneDatabase};

use super::time::Timestamp;

/// A zone, and with it for every moment the offset from UTC.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Zone {
    /// Coordinated universal time.
    #[default]
    Utc,
    /// What the machine says, by `TZ` or /etc/localtime.
    Machine,
    /// A zone of the IANA database.
    Named(TimeZone),
}

/// Both zones of an application.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Zones {
    /// For times that are made here.
    pub own: Zone,
    /// For times that came without an offset, and are in UTC.
    pub naive: Zone,
}

impl Zone {
    /// The zone of this name; the error says what would do.
    pub fn named(name: &str) -> Result<Self, String> {
        if name == "UTC" {
            return Ok(Self::Utc);
        }
        let found = TimeZoneDatabase::bundled().get(name).ok();
        // Names are told apart by case, as on the file systems Python reads them from.
        let found = found.filter(|zone| zone.iana_name() == Some(name));
        found.map(Self::Named).ok_or_else(|| {
            format!(
                "there is no time zone '{name}'; zones are named as in the IANA database, such as \
                 UTC or Asia/Seoul"
            )
        })
    }

    /// A moment as it is shown here.
    pub fn show(&self, moment: &DateTime<Utc>) -> Timestamp {
        let utc = moment.naive_utc();
        let offset = match self {
            Self::Utc => Utc.fix(),
            Self::Machine => Local.offset_from_utc_datetime(&utc).fix(),
            Self::Named(zone) => offset_of(zone, moment),
        };
        moment.with_timezone(&offset)
    }
}

/// The offset of a zone; a moment beyond the calendar of the database is shown in UTC.
fn offset_of(zone: &TimeZone, moment: &DateTime<Utc>) -> FixedOffset {
    let moment = jiff::Timestamp::from_second(moment.timestamp()).ok();
    let seconds = moment.map(|moment| zone.to_offset(moment).seconds());
    seconds
        .and_then(FixedOffset::east_opt)
        .unwrap_or_else(|| Utc.fix())
}

impl Zones {
    /// The zones by the settings `timezone` and `enable_utc`.
    pub fn new(timezone: Option<&str>, enable_utc: bool) -> Result<Self, String> {
        match timezone.filter(|name| !name.is_empty()) {
            Some(name) => {
                let zone = Zone::named(name)?;
                let (own, naive) = (zone.clone(), zone);
                Ok(Self { own, naive })
            }
            None => Ok(Self {
                own: if enable_utc { Zone::Utc } else { Zone::Machine },
                naive: Zone::Utc,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::time::format_iso;
    use super::*;

    fn shown(zone: &str, moment: &str) -> String {
        let moment: DateTime<Utc> = moment.parse().unwrap();
        format_iso(&Zone::named(zone).unwrap().show(&moment))
    }

    #[test]
    fn a_moment_has_the_offset_that_its_zone_has_then() {
        let cases = [
            ("UTC", "2026-07-01T12:00:00Z", "2026-07-01T12:00:00+00:00"),
            (
                "Asia/Seoul",
                "2026-07-01T12:00:00Z",
                "2026-07-01T21:00:00+09:00",
            ),
            // The hour before and the hour after summer time ends.
            (
                "Europe/Berlin",
                "2026-10-25T00:30:00Z",
                "2026-10-25T02:30:00+02:00",
            ),
            (
                "Europe/Berlin",
                "2026-10-25T01:30:00Z",
                "2026-10-25T02:30:00+01:00",
            ),
            // An offset of whole seconds, before there were zones.
            (
                "Europe/Berlin",
                "1890-01-01T00:00:00Z",
                "1890-01-01T00:53:28+00:53:28",
            ),
        ];
        for (zone, moment, expected) in cases {
            assert_eq!(shown(zone, moment), expected, "{zone} {moment}");
        }
        let error = Zone::named("Mars/Olympus").unwrap_err();
        assert!(error.contains("'Mars/Olympus'") && error.contains("Asia/Seoul"));
        assert!(Zone::named("asia/seoul").is_err());
    }

    #[test]
    fn without_a_name_enable_utc_decides_for_times_made_here_alone() {
        let zones = |name, utc| Zones::new(name, utc).unwrap();
        assert_eq!(zones(None, true), Zones::default());
        assert_eq!(zones(None, false).own, Zone::Machine);
        assert_eq!(zones(None, false).naive, Zone::Utc);
        let seoul = Zone::named("Asia/Seoul").unwrap();
        for utc in [true, false] {
            let zones = zones(Some("Asia/Seoul"), utc);
            assert_eq!((&zones.own, &zones.naive), (&seoul, &seoul));
        }
    }
}
