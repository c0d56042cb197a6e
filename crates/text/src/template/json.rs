//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it: order kept, a space behind commas and colons, no
//! HTML escapes, Python's floats.

use std::fmt::Write as _;

use minijinja::{Error, ErrorKind, Value, value::Kwargs};

use super::python::float;

/// The `tojson` filter with the arguments that transformers gives it.
pub(super) fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let json: serde_json::Value = serde_json::to_value(&value)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}")))?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are not a pair")),
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ensure_ascii: ensure_ascii.unwrap_or(false),
        indent,
        item,
        key,
        sort_keys: sort_keys.unwrap_or(false),
    };
    let mut out = String::new();
    style.write(&json, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

/// The text of a value in the default style.
pub(crate) fn dumps(value: &serde_json::Value) -> String {
    let style = Style {
        ensure_ascii: false,
        indent: None,
        item: ", ".to_owned(),
        key: ": ".to_owned(),
        sort_keys: false,
    };
    let mut out = String::new();
    style.write(value, 0, &mut out);
    out
}

struct Style {
    ensure_ascii: bool,
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Style {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Null => out.push_str("null"),
            serde_json::Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            serde_json::Value::Number(number) => match number.as_f64() {
                Some(value) if number.is_f64() => out.push_str(&float(value)),
                Some(_) | None => out.push_str(&number.to_string()),
            },
            serde_json::Value::String(text) => self.string(text, out),
            serde_json::Value::Array(items) => {
                self.list(('[', ']'), items.iter(), depth, out, |item, out| self.write(item, depth + 1, out));
            }
            serde_json::Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_by_key(|(key, _)| key.as_str());
                }
                self.list(('{', '}'), fields.into_iter(), depth, out, |(key, value), out| {
                    self.string(key, out);
                    out.push_str(&self.key);
                    self.write(value, depth + 1, out);
                });
            }
        }
    }

    fn list<T>(
        &self,
        brackets: (char, char),
        items: impl ExactSizeIterator<Item = T>,
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(T, &mut String),
    ) {
        out.push(brackets.0);
        let empty = items.len() == 0;
        let newline = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.push_str(&" ".repeat(indent * depth));
            }
        };
        for (at, item) in items.enumerate() {
            if at > 0 {
                out.push_str(&self.item);
            }
            newline(depth + 1, out);
            write(item, out);
        }
        if !empty {
            newline(depth, out);
        }
        out.push(brackets.1);
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                control if u32::from(control) < 0x20 => escape(u32::from(control), out),
                other if self.ensure_ascii && !other.is_ascii() => {
                    other.encode_utf16(&mut [0; 2]).iter().for_each(|unit| escape(u32::from(*unit), out));
                }
                other => out.push(other),
            }
        }
        out.push('"');
    }
}

fn escape(unit: u32, out: &mut String) {
    // Writing to a string cannot fail.
    let _infallible = write!(out, "\\u{unit:04x}");
}
