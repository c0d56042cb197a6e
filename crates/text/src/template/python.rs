//! What templates expect of Python: how values print, string methods, the date.

use minijinja::{Error, ErrorKind, Output, State, Value, value::ValueKind};

/// `{{ value }}` as jinja2 prints it.
pub(super) fn print(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    out.write_str(&display(value)).map_err(Error::from)
}

/// The `string` filter.
pub(super) fn to_string(value: Value) -> String {
    display(&value)
}

/// `str(value)`
fn display(value: &Value) -> String {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => value.to_string(),
        _ => repr(value),
    }
}

/// `repr(value)`
fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).to_owned(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
        }
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items: Vec<String> = value.try_iter().into_iter().flatten().map(|item| repr(&item)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            let items: Vec<String> = value.try_iter().into_iter().flatten().map(pair).collect();
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    }
}

/// A string as Python's `repr` quotes it.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            character if character == quote => out.extend(['\\', character]),
            character if character.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(character))),
            character => out.push(character),
        }
    }
    out.push(quote);
    out
}

/// A float as Python's `repr` writes it: the shortest digits, an exponent from 1e16 on and below 1e-4.
pub(super) fn float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "NaN" } else { "Infinity" };
        return format!("{}{name}", if value < 0.0 { "-" } else { "" });
    }
    if value == 0.0 || (1e-4..1e16).contains(&value.abs()) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}

/// Python's methods of strings, lists and dicts: those of minijinja's own collection, and what it lacks.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let text = value.as_str();
    let string = |at: usize| args.get(at).and_then(Value::as_str);
    match (name, text) {
        ("rsplit", Some(text)) => {
            Ok(rsplit(text, string(0), args.get(1).and_then(|n| usize::try_from(n.clone()).ok())))
        }
        ("removeprefix", Some(text)) => {
            Ok(Value::from(text.strip_prefix(string(0).unwrap_or("")).unwrap_or(text)))
        }
        ("removesuffix", Some(text)) => {
            Ok(Value::from(text.strip_suffix(string(0).unwrap_or("")).unwrap_or(text)))
        }
        ("partition" | "rpartition", Some(text)) => {
            let separator = string(0).unwrap_or(" ");
            let found =
                if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match (found, name) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Ok(parts.into_iter().map(Value::from).collect())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn rsplit(text: &str, separator: Option<&str>, limit: Option<usize>) -> Value {
    let mut parts: Vec<&str> = match (separator, limit) {
        (Some(separator), Some(limit)) => text.rsplitn(limit + 1, separator).collect(),
        (Some(separator), None) => text.rsplit(separator).collect(),
        (None, _) => text.split_whitespace().rev().collect(),
    };
    parts.reverse();
    parts.into_iter().map(Value::from).collect()
}

/// Python's `strftime` for what templates ask: the date.
pub(super) fn strftime(now: Option<&str>, format: &str) -> Result<String, Error> {
    let wrong = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let (year, month, day) = match now {
        Some(date) => {
            let parts: Vec<i64> = date.split('-').filter_map(|part| part.parse().ok()).collect();
            match parts[..] {
                [year, month @ 1..=12, day @ 1..=31] => (year, month, day),
                _ => return Err(wrong(format!("the date {date:?} is not of the form 2026-01-02"))),
            }
        }
        None => today()?,
    };
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
    let name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => out.push_str(&format!("{year:04}")),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('B') => out.push_str(name),
            Some('b' | 'h') => out.push_str(&name[..3]),
            Some('F') => out.push_str(&format!("{year:04}-{month:02}-{day:02}")),
            Some('%') => out.push('%'),
            other => return Err(wrong(format!("strftime_now cannot print %{}", other.unwrap_or(' ')))),
        }
    }
    Ok(out)
}

/// Year, month and day in UTC (days from civil, Howard Hinnant's algorithm).
fn today() -> Result<(i64, i64, i64), Error> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds =
        since.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?.as_secs();
    let z = (seconds / 86_400) as i64 + 719_468;
    let era = z / 146_097;
    let day_of_era = z - era * 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 { month_shifted + 3 } else { month_shifted - 9 };
    Ok((year_of_era + era * 400 + i64::from(month <= 2), month, day))
}
