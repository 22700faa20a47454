//! Rate limits per task type: Celery's strings and its token bucket of capacity one.

use std::time::Duration;

use tokio::time::Instant;

/// Reads `10/s`, `5/m`, `2/h`, a number (per second), and 0 or nothing for no limit. The error
/// is the text of the Python exception that Celery would show.
pub fn parse(text: &str) -> Result<Option<f64>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let (count, unit) = text.split_once('/').unwrap_or((text, "s"));
    let count: f64 = count.trim().parse().map_err(|_| {
        let shown = crate::protocol::saferepr::repr_str(count);
        crate::protocol::exception::Exception::builtin(
            "ValueError",
            format!("could not convert string to float: {shown}"),
        )
        .repr()
    })?;
    let seconds = match unit {
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => {
            let shown = crate::protocol::saferepr::repr_str(other);
            return Err(format!("KeyError({shown})"));
        }
    };
    Ok((count > 0.0 && count.is_finite()).then_some(count / seconds))
}

/// The same text as so many in a time: `10/m` is 10 in a minute, `0.5/s` is 1 in two seconds.
pub fn parse_count(text: &str) -> Result<Option<(u64, Duration)>, String> {
    let Some(rate) = parse(text.trim())? else {
        return Ok(None);
    };
    let unit = match text.rsplit_once('/').map(|(_, unit)| unit.trim()) {
        Some("m") => 60.0,
        Some("h") => 3600.0,
        _ => 1.0,
    };
    let count = rate * unit;
    if count < 1.0 {
        return Ok(Some((1, interval(rate))));
    }
    // Rounded before it is cut: 1/60 * 60 is not quite 1.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at least 1; beyond u64 is as good as no limit"
    )]
    let whole = (count + 1e-9).floor() as u64;
    Ok(Some((whole, Duration::from_secs_f64(unit))))
}

/// Lets one request pass each `1 / rate` seconds; no bursts.
#[derive(Debug)]
pub struct Bucket {
    interval: Duration,
    next: Instant,
}

impl Bucket {
    /// A bucket whose first request may pass now.
    pub fn new(rate: f64, now: Instant) -> Self {
        Self {
            interval: interval(rate),
            next: now,
        }
    }

    /// Changes the rate; what passed already still counts.
    pub fn set_rate(&mut self, rate: f64) {
        let earlier = self.interval;
        self.interval = interval(rate);
        if self.interval < earlier {
            self.next = self
                .next
                .checked_sub(earlier - self.interval)
                .unwrap_or(self.next);
        }
    }

    /// When the next request may pass.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Lets a request pass, or says when one may.
    pub fn take(&mut self, now: Instant) -> Result<(), Instant> {
        if now < self.next {
            return Err(self.next);
        }
        self.next = now + self.interval;
        Ok(())
    }
}

fn interval(rate: f64) -> Duration {
    // A year is as good as never, and no rate overflows the clock.
    Duration::try_from_secs_f64(1.0 / rate)
        .unwrap_or(Duration::MAX)
        .min(Duration::from_secs(365 * 86_400))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_celery_reads_them() {
        assert_eq!(parse("10/s"), Ok(Some(10.0)));
        assert_eq!(parse("6/m"), Ok(Some(0.1)));
        assert_eq!(parse("36/h"), Ok(Some(0.01)));
        assert_eq!(parse("0"), Ok(None));
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("2.5"), Ok(Some(2.5)));
        assert_eq!(parse("2/"), Ok(Some(2.0)));
        assert_eq!(parse("1/x"), Err("KeyError('x')".to_owned()));
        assert_eq!(parse("1 / m"), Err("KeyError(' m')".to_owned()));
        let error = parse("abc").unwrap_err();
        assert_eq!(
            error,
            "ValueError(\"could not convert string to float: 'abc'\")"
        );
    }

    #[test]
    fn a_rate_is_so_many_in_a_time() {
        let seconds = Duration::from_secs;
        assert_eq!(parse_count("10/m"), Ok(Some((10, seconds(60)))));
        assert_eq!(parse_count("1/m"), Ok(Some((1, seconds(60)))));
        assert_eq!(parse_count("7/h"), Ok(Some((7, seconds(3600)))));
        assert_eq!(parse_count("3"), Ok(Some((3, seconds(1)))));
        assert_eq!(parse_count("0.5/s"), Ok(Some((1, seconds(2)))));
        assert_eq!(parse_count(""), Ok(None));
    }

    #[test]
    fn a_bucket_spaces_requests_and_saves_nothing_up() {
        let start = Instant::now();
        let mut bucket = Bucket::new(2.0, start);
        assert_eq!(bucket.take(start), Ok(()));
        let half = start + Duration::from_millis(500);
        assert_eq!(bucket.take(start), Err(half));
        let later = start + Duration::from_secs(60);
        assert_eq!(bucket.take(later), Ok(()));
        assert!(bucket.take(later).is_err());
        bucket.set_rate(1e9);
        assert_eq!(bucket.take(later + Duration::from_millis(1)), Ok(()));
    }
}
