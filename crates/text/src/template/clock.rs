//! `strftime_now`: Python's `strftime` of a given day or of now, in UTC and in the C locale.

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A second of the calendar.
struct Time {
    year: i64,
    /// From 1 on, as the day.
    month: i64,
    day: i64,
    /// Since 1970-01-01.
    days: i64,
    /// Since midnight.
    seconds: i64,
}

/// `now` is a day, `2026-01-02`.
pub(super) fn strftime(now: Option<&str>, format: &str) -> Result<String, Error> {
    let wrong = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let time = match now {
        Some(day) => {
            of_day(day).ok_or_else(|| wrong(format!("the date {day:?} is not of the form 2026-01-02")))?
        }
        None => of_clock().map_err(wrong)?,
    };
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        // glibc's flag for numbers without padding.
        let unpadded = directive == Some('-');
        if unpadded {
            directive = characters.next();
        }
        let text = directive.and_then(|directive| time.directive(directive)).ok_or_else(|| {
            wrong(format!("strftime_now cannot print %{}", directive.map(String::from).unwrap_or_default()))
        })?;
        let digits = text.trim_start_matches(['0', ' ']);
        match unpadded {
            true if digits.is_empty() => out.push('0'),
            true => out.push_str(digits),
            false => out.push_str(&text),
        }
    }
    Ok(out)
}

impl Time {
    fn directive(&self, directive: char) -> Option<String> {
        let Self { year, month, day, days, seconds } = *self;
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let month_name = MONTHS[(month - 1) as usize];
        // The first of January 1970 was a Thursday.
        let weekday = (days + 4).rem_euclid(7);
        let weekday_name = WEEKDAYS[weekday as usize];
        let hour_12 = (hour + 11) % 12 + 1;
        Some(match directive {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'B' => month_name.to_owned(),
            'b' | 'h' => month_name[..3].to_owned(),
            'A' => weekday_name.to_owned(),
            'a' => weekday_name[..3].to_owned(),
            'w' => weekday.to_string(),
            'u' => ((weekday + 6) % 7 + 1).to_string(),
            'j' => format!("{:03}", days - days_of(year, 1, 1) + 1),
            'H' => format!("{hour:02}"),
            'I' => format!("{hour_12:02}"),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'p' => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'D' | 'x' => format!("{month:02}/{day:02}/{:02}", year % 100),
            'T' | 'X' => format!("{hour:02}:{minute:02}:{second:02}"),
            'R' => format!("{hour:02}:{minute:02}"),
            // As of a Python time that knows no zone.
            'Z' | 'z' => String::new(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

fn of_day(text: &str) -> Option<Time> {
    let mut parts = text.splitn(3, '-').map(|part| part.parse().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let exists = (1..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    exists.then(|| Time { year, month, day, days: days_of(year, month, day), seconds: 0 })
}

fn of_clock() -> Result<Time, String> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = since.map_err(|error| error.to_string())?.as_secs() as i64;
    Ok(of_days(seconds / 86_400, seconds % 86_400))
}

/// Days since 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn of_days(days: i64, seconds: i64) -> Time {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 { month_shifted + 3 } else { month_shifted - 9 };
    Time { year: year_of_era + era * 400 + i64::from(month <= 2), month, day, days, seconds }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_print_as_in_python() {
        let check = |day: &str, format: &str, expected: &str| {
            assert_eq!(strftime(Some(day), format).unwrap(), expected, "{day} {format}");
        };
        check("2026-01-02", "%Y-%m-%d, %d %B %b %e", "2026-01-02, 02 January Jan  2");
        check("2026-01-02", "%A %a %j %w %u %y %-d %-m %%", "Friday Fri 002 5 5 26 2 1 %");
        check("2024-12-31", "%j %F %D %T %I:%M %p%Z", "366 2024-12-31 12/31/24 00:00:00 12:00 AM");
        check("1999-02-28", "%A", "Sunday");
        assert!(strftime(Some("2026-13-01"), "%Y").is_err() && strftime(Some("today"), "%Y").is_err());
        assert!(strftime(Some("2026-01-02"), "%Q").is_err() && strftime(Some("2026-01-02"), "%").is_err());
    }

    #[test]
    fn days_come_back() {
        for days in (-800_000..800_000).step_by(97) {
            let time = of_days(days, 0);
            assert_eq!(days_of(time.year, time.month, time.day), days);
        }
    }
}
