//! Times as they stand in messages: ISO 8601 in Python's reading and writing.
//!
//! Answers for `dateutil.parser.isoparse` (with its error texts, which end up in logs) and
//! `datetime.isoformat`. A time without offset is UTC. Does not know what time it is.

use chrono::{
    DateTime, Datelike, Duration, FixedOffset, NaiveDate, NaiveDateTime, NaiveTime, TimeZone,
    Timelike,
};

/// A point in time together with the offset it was written with.
pub type Timestamp = DateTime<FixedOffset>;

/// Reads a time; the error is the text Python's reader gives.
pub fn parse_iso(text: &str) -> Result<Timestamp, String> {
    parse_iso_or_naive(text).map(|(time, _)| time)
}

/// The same, and whether the text has no offset.
pub fn parse_iso_or_naive(text: &str) -> Result<(Timestamp, bool), String> {
    if !text.is_ascii() {
        return Err("ISO-8601 strings should contain only ASCII characters".to_owned());
    }
    let bytes = text.as_bytes();
    // The calendar is asked last, as in Python, which matters for which error is shown.
    let (common, position) = match common_date(bytes) {
        Ok((numbers, position)) => (Ok(numbers), position),
        Err(_) => uncommon_date(bytes).map(|(date, position)| (Err(date), position))?,
    };
    let (time, offset, is_midnight) = match bytes.get(position + 1..) {
        Some(rest) => clock_time(rest)?,
        None => (NaiveTime::MIN, None, false),
    };
    let mut date = match common {
        Ok([year, month, day]) => calendar(year, month, day)?,
        Err(date) => date,
    };
    if is_midnight {
        date = date.succ_opt().ok_or("date value out of range")?;
    }
    local(date.and_time(time), offset.unwrap_or(0)).map(|time| (time, offset.is_none()))
}

/// Writes a time as `datetime.isoformat()` does: microseconds only when there are some.
pub fn format_iso(time: &Timestamp) -> String {
    let fraction = match time.nanosecond() / 1000 {
        0 => String::new(),
        micros => format!(".{:06}", micros % 1_000_000),
    };
    let offset = time.offset().local_minus_utc();
    let (sign, ahead) = if offset < 0 {
        ('-', -offset)
    } else {
        ('+', offset)
    };
    let seconds = match ahead % 60 {
        0 => String::new(),
        seconds => format!(":{seconds:02}"),
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{fraction}{sign}{:02}:{:02}{seconds}",
        time.year(),
        time.month(),
        time.day(),
        time.hour(),
        time.minute(),
        time.second(),
        ahead / 3600,
        ahead / 60 % 60,
    )
}

/// A moment in UTC, given as microseconds since 1970; `None` outside of the calendar.
pub fn from_unix_micros(micros: i64) -> Option<Timestamp> {
    DateTime::from_timestamp_micros(micros).map(|time| time.fixed_offset())
}

/// A time some seconds later, at most the calendar's end.
pub fn add_seconds(time: &Timestamp, seconds: f64) -> Timestamp {
    let last = NaiveDate::from_ymd_opt(9999, 12, 31)
        .expect("because the year 9999 is in the calendar")
        .and_time(NaiveTime::MIN)
        .and_utc()
        .with_timezone(time.offset());
    if seconds.is_nan() {
        return *time;
    }
    let micros = (seconds * 1e6).round().clamp(-9.2e18, 9.2e18) as i64;
    let beyond = if micros < 0 { *time } else { last };
    time.checked_add_signed(Duration::microseconds(micros))
        .map_or(beyond, |later| later.min(last))
}

fn local(time: NaiveDateTime, offset: i32) -> Result<Timestamp, String> {
    FixedOffset::east_opt(offset)
        .and_then(|zone| zone.from_local_datetime(&time).single())
        .ok_or_else(|| "date value out of range".to_owned())
}

/// `YYYY`, `YYYY-MM`, `YYYY-MM-DD`, `YYYYMMDD`; returns the numbers and where they end.
fn common_date(text: &[u8]) -> Result<([u32; 3], usize), String> {
    if text.len() < 4 {
        return Err("ISO string too short".to_owned());
    }
    let year = number(text, 0, 4)?;
    if text.len() == 4 {
        return Ok(([year, 1, 1], 4));
    }
    let dashed = text[4] == b'-';
    let mut position = 4 + usize::from(dashed);
    if text.len() - position < 2 {
        return Err("Invalid common month".to_owned());
    }
    let month = number(text, position, 2)?;
    position += 2;
    if position >= text.len() {
        if dashed {
            return Ok(([year, month, 1], position));
        }
        return Err("Invalid ISO format".to_owned());
    }
    if dashed {
        if text[position] != b'-' {
            return Err("Invalid separator in ISO string".to_owned());
        }
        position += 1;
    }
    if text.len() - position < 2 {
        return Err("Invalid common day".to_owned());
    }
    let day = number(text, position, 2)?;
    Ok(([year, month, day], position + 2))
}

/// `YYYY-Www-D`, `YYYYWwwD` and `YYYY-DDD`, `YYYYDDD`.
fn uncommon_date(text: &[u8]) -> Result<(NaiveDate, usize), String> {
    if text.len() < 4 {
        return Err("ISO string too short".to_owned());
    }
    let year = number(text, 0, 4)?;
    let dashed = text.get(4) == Some(&b'-');
    let mut position = 4 + usize::from(dashed);
    if text.get(position) == Some(&b'W') {
        let week = number(text, position + 1, 2)?;
        position += 3;
        let mut day = 1;
        if text.len() > position {
            if (text[position] == b'-') != dashed {
                return Err("Inconsistent use of dash separator".to_owned());
            }
            position += usize::from(dashed);
            day = number(text, position, 1)?;
            position += 1;
        }
        if !(1..=53).contains(&week) {
            return Err(format!("Invalid week: {week}"));
        }
        if !(1..=7).contains(&day) {
            return Err(format!("Invalid weekday: {day}"));
        }
        // Week 53 of a year that has 52 runs on into the next year, as in Python's arithmetic.
        let fourth = calendar(year, 1, 4)?;
        let monday = i64::from(fourth.weekday().num_days_from_monday());
        let days = i64::from(week - 1) * 7 + i64::from(day - 1) - monday;
        let date = fourth
            .checked_add_signed(Duration::days(days))
            .ok_or_else(|| "date value out of range".to_owned())?;
        return Ok((date, position));
    }
    if text.len() < position + 3 {
        return Err("Invalid ordinal day".to_owned());
    }
    let ordinal = number(text, position, 3)?;
    i32::try_from(year)
        .ok()
        .and_then(|year| NaiveDate::from_yo_opt(year, ordinal))
        .filter(|date| date.year() > 0)
        .map(|date| (date, position + 3))
        .ok_or_else(|| format!("Invalid ordinal day {ordinal} for year {year}"))
}

fn calendar(year: u32, month: u32, day: u32) -> Result<NaiveDate, String> {
    if year == 0 {
        return Err(format!("year {year} is out of range"));
    }
    if !(1..=12).contains(&month) {
        return Err("month must be in 1..12".to_owned());
    }
    i32::try_from(year)
        .ok()
        .and_then(|year| NaiveDate::from_ymd_opt(year, month, day))
        .ok_or_else(|| "day is out of range for month".to_owned())
}

/// The part after the separator: time, offset in seconds if any, and whether it was 24:00.
fn clock_time(text: &[u8]) -> Result<(NaiveTime, Option<i32>, bool), String> {
    if text.len() < 2 {
        return Err("ISO time too short".to_owned());
    }
    let (mut parts, mut micros, mut offset) = ([0u32; 3], 0u32, None);
    let (mut position, mut colons) = (0, false);
    for component in 0..5 {
        let Some(&byte) = text.get(position) else {
            break;
        };
        if matches!(byte, b'-' | b'+' | b'Z' | b'z') {
            offset = Some(zone(&text[position..])?);
            position = text.len();
            break;
        }
        if component == 1 && byte == b':' {
            colons = true;
            position += 1;
        } else if component == 2 && colons {
            if byte != b':' {
                return Err("Inconsistent use of colon separator".to_owned());
            }
            position += 1;
        }
        if let Some(part) = parts.get_mut(component) {
            *part = number(text, position, 2)?;
            position += 2;
        } else if component == 3 && matches!(byte, b'.' | b',') {
            let digits: Vec<u8> = text[position + 1..]
                .iter()
                .copied()
                .take_while(u8::is_ascii_digit)
                .collect();
            if digits.is_empty() {
                continue;
            }
            position += 1 + digits.len();
            micros = (0..6).fold(0, |sum, index| {
                sum * 10 + digits.get(index).map_or(0, |digit| u32::from(digit - b'0'))
            });
        }
    }
    if position < text.len() {
        return Err("Unused components in ISO string".to_owned());
    }
    let [hour, minute, second] = parts;
    if hour == 24 {
        if minute != 0 || second != 0 || micros != 0 {
            return Err("Hour may only be 24 at 24:00:00.000".to_owned());
        }
        return Ok((NaiveTime::MIN, offset, true));
    }
    for (value, most, what) in [
        (hour, 23, "hour"),
        (minute, 59, "minute"),
        (second, 59, "second"),
    ] {
        if value > most {
            return Err(format!("{what} must be in 0..{most}"));
        }
    }
    NaiveTime::from_hms_micro_opt(hour, minute, second, micros)
        .map(|time| (time, offset, false))
        .ok_or_else(|| "time value out of range".to_owned())
}

/// `Z`, `±hh`, `±hhmm`, `±hh:mm`, in seconds east of UTC.
fn zone(text: &[u8]) -> Result<i32, String> {
    if matches!(text, b"Z" | b"z") {
        return Ok(0);
    }
    if ![3, 5, 6].contains(&text.len()) {
        return Err("Time zone offset must be 1, 3, 5 or 6 characters".to_owned());
    }
    let sign = match text[0] {
        b'-' => -1,
        b'+' => 1,
        _ => return Err("Time zone offset requires sign".to_owned()),
    };
    let hours = number(text, 1, 2)?;
    let minutes = if text.len() == 3 {
        0
    } else {
        let start = if text[3] == b':' { 4 } else { 3 };
        number(text, start, text.len() - start)?
    };
    if minutes > 59 {
        return Err("Invalid minutes in time zone offset".to_owned());
    }
    if hours > 23 {
        return Err("Invalid hours in time zone offset".to_owned());
    }
    i32::try_from(hours * 3600 + minutes * 60)
        .map(|seconds| sign * seconds)
        .map_err(|_| "Invalid hours in time zone offset".to_owned())
}

/// At most `length` digits from `start`, as `int(text[start:start + length])` reads them.
fn number(text: &[u8], start: usize, length: usize) -> Result<u32, String> {
    let end = text.len().min(start + length);
    let digits = text.get(start..end).unwrap_or_default();
    let bad = || {
        let shown: String = digits
            .iter()
            .flat_map(|byte| std::ascii::escape_default(*byte))
            .map(char::from)
            .collect();
        format!("invalid literal for int() with base 10: b'{shown}'")
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    digits
        .iter()
        .try_fold(0u32, |sum, digit| {
            sum.checked_mul(10)?.checked_add(u32::from(digit - b'0'))
        })
        .ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::{add_seconds, format_iso, parse_iso};

    #[test]
    fn times_are_read_and_written_as_python_does() {
        for (text, expected) in [
            (
                "2026-11-22T23:37:07.520266+00:00",
                "2026-11-22T23:37:07.520266+00:00",
            ),
            ("2030-01-02T03:04:05", "2030-01-02T03:04:05+00:00"),
            ("2020-01-01", "2020-01-01T00:00:00+00:00"),
            ("2020-01-01 00:00:00+00:00", "2020-01-01T00:00:00+00:00"),
            ("2020-01-01T00:00:00Z", "2020-01-01T00:00:00+00:00"),
            ("2020-01-01T00:00:00z", "2020-01-01T00:00:00+00:00"),
            (
                "2020-01-01T05:06:07.5-09:30",
                "2020-01-01T05:06:07.500000-09:30",
            ),
            (
                "2020-01-01T05:06:07,123456789+0900",
                "2020-01-01T05:06:07.123456+09:00",
            ),
            ("20200229T0506+09", "2020-02-29T05:06:00+09:00"),
            ("2020-12-31T24:00", "2021-01-01T00:00:00+00:00"),
            ("2020", "2020-01-01T00:00:00+00:00"),
            ("2020-02", "2020-02-01T00:00:00+00:00"),
            ("2020-W10-3", "2020-03-04T00:00:00+00:00"),
            ("2020W10", "2020-03-02T00:00:00+00:00"),
            ("2020366", "2020-12-31T00:00:00+00:00"),
            ("2020-060T12", "2020-02-29T12:00:00+00:00"),
        ] {
            let time = parse_iso(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(format_iso(&time), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused_in_pythons_words() {
        for (text, expected) in [
            (
                "tomorrow",
                "invalid literal for int() with base 10: b'tomo'",
            ),
            ("", "ISO string too short"),
            ("202", "ISO string too short"),
            ("2020-13-01", "month must be in 1..12"),
            ("2021-02-29", "day is out of range for month"),
            ("2020-01-01T25:00", "hour must be in 0..23"),
            ("2020-01-01T24:01", "Hour may only be 24 at 24:00:00.000"),
            (
                "2020-01-01T10:00:00+25:00",
                "Invalid hours in time zone offset",
            ),
            (
                "2020-01-01T10:00:00+0",
                "Time zone offset must be 1, 3, 5 or 6 characters",
            ),
            ("2020-01-01T", "ISO time too short"),
            (
                "2020-01-01T1é",
                "ISO-8601 strings should contain only ASCII characters",
            ),
            ("2020-01-01T10:0000", "Inconsistent use of colon separator"),
            ("2020-01-01T10:00:00.1.2", "Unused components in ISO string"),
        ] {
            assert_eq!(parse_iso(text).expect_err(text), expected, "{text}");
        }
    }

    #[test]
    fn adding_any_number_of_seconds_stays_in_the_calendar() {
        let time = parse_iso("2026-11-22T23:37:07").expect("valid");
        assert_eq!(
            format_iso(&add_seconds(&time, 1.5)),
            "2026-11-22T23:37:08.500000+00:00"
        );
        for seconds in [f64::MAX, f64::INFINITY, f64::NAN, f64::MIN, 1e300] {
            format_iso(&add_seconds(&time, seconds));
        }
        assert_eq!(
            format_iso(&add_seconds(&time, 1e15)),
            "9999-12-31T00:00:00+00:00"
        );
    }
}
