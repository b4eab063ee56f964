//! Sizes and rates as people write them.

/// Reads bytes: `4096`, `10G`, `10GiB`, `1.5T` (powers of 1024), `10Gi` as Kubernetes writes them, and `MB` and the like
/// (powers of 1000).
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| "write a number with a unit, such as 512M or 10GiB".to_owned())?;
    let unit = unit.trim().to_ascii_lowercase();
    let (prefix, base) = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')) {
        Some(prefix) if unit.ends_with("ib") => (prefix, 1024_f64),
        Some(prefix) if !prefix.is_empty() => (prefix, 1000.0),
        Some(prefix) => (prefix, 1024.0),
        None => (unit.strip_suffix('i').unwrap_or(&unit), 1024.0),
    };
    let power = match prefix {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(format!("unknown unit `{unit}`; use K, M, G, T (powers of 1024) or KB, MB, GB, TB")),
    };
    let bytes = number * base.powi(power);
    if (0.0..9e18).contains(&bytes) {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
        Ok(bytes as u64)
    } else {
        Err("too large".into())
    }
}

/// Reads bytes per second: a size, with or without `/s`.
pub(super) fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text.trim().trim_end_matches("/s"))? {
        0 => Err("a rate of 0 would never end".into()),
        rate => Ok(rate),
    }
}

/// Bytes for people.
pub(super) fn show_size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("10Gi", 10 << 30),
            ("1.5m", 3 << 19),
            ("5MB", 5_000_000),
            ("7b", 7),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "x", "i", "5Q", "-1", "1e99T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_rate("5MiB/s"), Ok(5 << 20));
        assert!(parse_rate("0").is_err());
    }
}
