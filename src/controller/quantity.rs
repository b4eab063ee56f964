//! Bytes for people, as Kubernetes writes quantities.

/// Such as `734Mi` or `1.2Ti`: two or three digits that count, rounded, powers of 1024.
pub(super) fn quantity(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut value = bytes as f64;
    // What would be shown as 1024 is shown as one of the next unit.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let tenths = (value * 10.0).round() / 10.0;
    if unit > 0 && tenths < 10.0 && tenths.fract() != 0.0 {
        format!("{tenths:.1}{}", UNITS[unit])
    } else {
        format!("{value:.0}{}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_are_shown_as_quantities() {
        let cases = [
            (0, "0"),
            (1, "1"),
            (1023, "1023"),
            (1024, "1Ki"),
            (1536, "1.5Ki"),
            (734 << 20, "734Mi"),
            ((1 << 30) - 1, "1Gi"),
            (1_319_413_953_331, "1.2Ti"),
            (10 << 40, "10Ti"),
            (u64::MAX, "16Ei"),
        ];
        for (bytes, text) in cases {
            assert_eq!(super::quantity(bytes), text, "{bytes}");
        }
    }
}
