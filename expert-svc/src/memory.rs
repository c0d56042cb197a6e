//! How many bytes of experts this machine should be asked to hold.

use std::fs;

/// Of the memory available at the start: the rest is for activations, sockets and whatever else runs here.
const SHARE_PERCENT: u64 = 80;

/// The default of `--memory-max`; None where the system does not tell.
pub(crate) fn default_bytes_max() -> Option<u64> {
    available(&fs::read_to_string("/proc/meminfo").ok()?).map(share)
}

const fn share(bytes: u64) -> u64 {
    bytes / 100 * SHARE_PERCENT
}

/// `MemAvailable` in bytes: what new work can use without swapping, page cache included.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// `1073741824`, `1GiB` and `1024 MiB` are the same.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim().find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.trim().len());
    let (number, unit) = text.trim().split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err("not a number of bytes, such as 48GiB; units are KiB, MiB, GiB and TiB".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "not a number of bytes, such as 48GiB".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "more than 64 bits of bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_and_without_units() {
        let check = |text, expected: Option<u64>| assert_eq!(parse_bytes(text).ok(), expected, "{text:?}");
        check("0", Some(0));
        check("123", Some(123));
        check("8B", Some(8));
        check(" 3KiB ", Some(3 << 10));
        check("48GiB", Some(48 << 30));
        check("1 TiB", Some(1 << 40));
        for bad in ["", "GiB", "8GB", "8 gib", "-1", "1.5GiB", "99999999999999999999", "99999999999TiB"] {
            check(bad, None);
        }
    }

    #[test]
    fn available_memory_is_found() {
        let meminfo = "MemTotal:       16 kB\nMemFree:        1 kB\nMemAvailable:   10 kB\n";
        assert_eq!(available(meminfo), Some(10 << 10));
        assert_eq!(available("MemTotal: 16 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
        assert_eq!(share(1000), 800);
    }
}
