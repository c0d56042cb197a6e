//! What templates expect of Python: how values print, string methods, the date.

use minijinja::{Error, Output, State, Value, value::ValueKind};

/// Characters that a template can pad a text to.
const WIDTH_MAX: usize = 1 << 16;

/// `{{ value }}` as jinja2 prints it.
pub(super) fn print(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    out.write_str(&display(value)).map_err(Error::from)
}

/// The `string` filter.
pub(super) fn to_string(value: Value) -> String {
    display(&value)
}

/// The `escape` filter: HTML as Python's markupsafe writes it.
pub(super) fn escape(value: Value) -> Value {
    if value.is_safe() {
        return value;
    }
    let mut out = String::new();
    for character in display(&value).chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            other => out.push(other),
        }
    }
    Value::from_safe_string(out)
}

/// The `sequence` test. In Python, strings and dicts have a length and items, too.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
}

/// The `iterable` test. In Python, nothing and numbers are not.
pub(super) fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
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
            character if is_printable(character) => out.push(character),
            character => match u32::from(character) {
                code @ ..=0xff => out.push_str(&format!("\\x{code:02x}")),
                code @ ..=0xffff => out.push_str(&format!("\\u{code:04x}")),
                code => out.push_str(&format!("\\U{code:08x}")),
            },
        }
    }
    out.push(quote);
    out
}

/// Python's `isprintable`, but for what Unicode has not assigned.
fn is_printable(character: char) -> bool {
    !character.is_control()
        && (character == ' ' || !character.is_whitespace())
        && !matches!(u32::from(character), 0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x180e | 0x200b..=0x200f
            | 0x202a..=0x202e | 0x2060..=0x206f | 0xe000..=0xf8ff | 0xfeff | 0xfff9..=0xfffb | 0xe0001..=0xe007f)
}

/// A float as Python's `repr` writes it: the shortest digits, of those the nearest, and an exponent from 1e16 on and
/// below 1e-4.
pub(super) fn float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "NaN" } else { "Infinity" };
        return format!("{}{name}", if value < 0.0 { "-" } else { "" });
    }
    let n_digits =
        format!("{value:e}").bytes().take_while(|byte| *byte != b'e').filter(u8::is_ascii_digit).count();
    // With the precision given, a tie goes to the even digit, as in Python.
    let text = format!("{value:.*e}", n_digits - 1);
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let decimals = usize::try_from(n_digits as i32 - 1 - exponent).unwrap_or(0).max(1);
        return format!("{value:.decimals$}");
    }
    format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// Python's methods of strings, lists and dicts: those of minijinja's own collection, and what it lacks.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let known = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), name, args),
        ValueKind::Map if name == "copy" && args.is_empty() => Some(value.clone()),
        ValueKind::Seq if name == "index" => {
            value.try_iter()?.position(|item| Some(&item) == args.first()).map(Value::from)
        }
        _ => None,
    };
    match known {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// None for a method that is not here, or arguments that it does not take.
fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Value> {
    let string = |at: usize| args.get(at).and_then(Value::as_str);
    let number = |at: usize| args.get(at).and_then(|n| usize::try_from(n.clone()).ok());
    Some(match name {
        "rsplit" => rsplit(text, string(0), number(1)),
        "removeprefix" => text.strip_prefix(string(0)?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(string(0)?).unwrap_or(text).into(),
        "partition" | "rpartition" => {
            let separator = string(0)?;
            let first = name == "partition";
            let found = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            parts.into_iter().map(Value::from).collect()
        }
        "index" | "rindex" => {
            let needle = string(0)?;
            let at = if name == "index" { text.find(needle) } else { text.rfind(needle) };
            text[..at?].chars().count().into()
        }
        "casefold" => text.to_lowercase().into(),
        "swapcase" => {
            let swap = |c: char| match c.is_uppercase() {
                true => c.to_lowercase().to_string(),
                false => c.to_uppercase().to_string(),
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "zfill" => {
            let digits = text.trim_start_matches(['+', '-']);
            let sign = &text[..text.len() - digits.len()];
            format!("{sign}{}{digits}", padding(text, number(0)?, "0")).into()
        }
        "ljust" => format!("{text}{}", padding(text, number(0)?, string(1).unwrap_or(" "))).into(),
        "rjust" => format!("{}{text}", padding(text, number(0)?, string(1).unwrap_or(" "))).into(),
        "center" => {
            let padding = padding(text, number(0)?, string(1).unwrap_or(" "));
            let n = padding.chars().count();
            // Python puts the odd one to the left of a text of even length, and to the right otherwise.
            let left = n / 2 + (n & number(0)? & 1);
            let left: String = padding.chars().take(left).collect();
            format!("{left}{text}{}", padding.strip_prefix(&left)?).into()
        }
        _ => return None,
    })
}

/// What makes `text` as wide as `width` characters.
fn padding(text: &str, width: usize, with: &str) -> String {
    with.repeat(width.min(WIDTH_MAX).saturating_sub(text.chars().count()))
}

fn rsplit(text: &str, separator: Option<&str>, limit: Option<usize>) -> Value {
    let mut parts: Vec<&str> = match (separator, limit) {
        (Some(separator), Some(limit)) => text.rsplitn(limit + 1, separator).collect(),
        (Some(separator), None) => text.rsplit(separator).collect(),
        (None, limit) => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while limit.is_none_or(|limit| parts.len() < limit)
                && let Some((before, word)) = rest.rsplit_once(char::is_whitespace)
            {
                parts.push(word);
                rest = before.trim_end();
            }
            parts.extend(Some(rest).filter(|rest| !rest.is_empty()));
            parts
        }
    };
    parts.reverse();
    parts.into_iter().map(Value::from).collect()
}
