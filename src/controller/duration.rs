//! Durations as our custom resources write them, and as people read them.

use std::time::Duration;

/// Reads a duration such as `2h`, `1h30m`, `1.5h` (Go's `time.ParseDuration`, which the rules of the definitions check
/// with). `None`: it is none, negative or too long to count.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let after = &rest[number..];
        let unit = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let seconds = match &after[..unit] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += rest[..number].parse::<f64>().ok()? * seconds;
        rest = &after[unit..];
    }
    Duration::try_from_secs_f64(total).ok()
}

/// For people: `45 s`, `10 min`, `2 h`.
pub(super) fn show(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        let cases = [
            ("2h", Some(7200.0)),
            ("45m", Some(2700.0)),
            ("1h30m", Some(5400.0)),
            ("1.5h", Some(5400.0)),
            ("300ms", Some(0.3)),
            ("1m0.5s", Some(60.5)),
            ("0", Some(0.0)),
            ("+1s", Some(1.0)),
            ("", None),
            ("5", None),
            ("h", None),
            ("-1h", None),
            ("1d", None),
            ("1h 30m", None),
            ("1..5h", None),
            ("99999999999999999999h", None),
        ];
        for (text, seconds) in cases {
            assert_eq!(parse(text), seconds.map(Duration::from_secs_f64), "{text}");
        }
    }

    #[test]
    fn durations_are_shown_in_whole_units() {
        let cases = [(0, "0 s"), (90, "90 s"), (600, "10 min"), (7200, "2 h"), (86_400, "24 h")];
        for (seconds, text) in cases {
            assert_eq!(show(Duration::from_secs(seconds)), text);
        }
    }
}
