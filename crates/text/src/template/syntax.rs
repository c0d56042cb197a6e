//! What templates write and minijinja does not parse, in words that it does: transformers' `{% generation %}` and
//! Python's `'…' % x`.

/// The source without either.
pub(super) fn without_extensions(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        let (text, tag) = rest.split_at(start);
        out.push_str(text);
        let Some(len) = tag_len(tag) else {
            rest = tag;
            break;
        };
        let (tag, behind) = tag.split_at(len);
        rest = behind;
        match tag_name(tag) {
            _ if tag.starts_with("{#") => out.push_str(tag),
            // A scope of its own that prints what is in it.
            "generation" => out.push_str(&tag.replacen("generation", "with", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            "raw" => {
                out.push_str(tag);
                let raw = raw_len(rest);
                out.push_str(&rest[..raw]);
                rest = &rest[raw..];
            }
            _ => out.push_str(&with_format_filters(tag)),
        }
    }
    out.push_str(rest);
    out
}

/// The first word of a block tag.
fn tag_name(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").unwrap_or_default().trim_start_matches(['-', '+']).trim_start();
    &inner[..inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len())]
}

/// Bytes of the tag at the start of `rest`, its end included. Strings in it may hold what looks like an end.
fn tag_len(rest: &str) -> Option<usize> {
    let end = match &rest[..2] {
        "{{" => "}}",
        "{%" => "%}",
        _ => return rest.find("#}").map(|at| at + 2),
    };
    let mut at = 2;
    // `}}` also ends two nested objects: `{{ {'a': {}}}}`.
    let mut open = 0_usize;
    while at < rest.len() {
        match rest.as_bytes()[at] {
            b'\'' | b'"' => at += string_len(&rest[at..])?,
            b'}' if end == "}}" && open > 0 => {
                open -= 1;
                at += 1;
            }
            b'{' => {
                open += 1;
                at += 1;
            }
            _ if rest[at..].starts_with(end) => return Some(at + end.len()),
            _ => at += char_len(&rest[at..]),
        }
    }
    None
}

fn raw_len(rest: &str) -> usize {
    let ends = rest.match_indices("{%").map(|(at, _)| at);
    ends.into_iter().find(|at| tag_name(&rest[*at..]) == "endraw").unwrap_or(rest.len())
}

/// Bytes of the string literal at the start of `text`; None if it does not end.
fn string_len(text: &str) -> Option<usize> {
    let quote = text.chars().next()?;
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn char_len(text: &str) -> usize {
    text.chars().next().map_or(1, char::len_utf8)
}

/// `'…' % x` → `('…'|format(x))`, in a tag or an expression.
fn with_format_filters(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let len = if rest.starts_with(['\'', '"']) { string_len(rest) } else { None };
        let Some(len) = len else {
            let len = char_len(rest);
            out.push_str(&rest[..len]);
            at += len;
            continue;
        };
        let (literal, behind) = rest.split_at(len);
        let operator = behind.trim_start();
        at += len;
        if !operator.starts_with('%') || operator.starts_with("%}") {
            out.push_str(literal);
            continue;
        }
        let operand = operator[1..].trim_start();
        let len = operand_len(operand);
        let value = &operand[..len];
        // A tuple is several values.
        let inner = value.strip_prefix('(').filter(|_| brackets_len(value) == Some(value.len()));
        let values = inner.and_then(|inner| inner.strip_suffix(')')).unwrap_or(value);
        let values = values.trim_end().trim_end_matches(',');
        out.push_str(&format!("({literal}|format({}))", with_format_filters(values)));
        at = text.len() - operand.len() + len;
    }
    out
}

/// Bytes of the operand at the start of `text`: a literal, a name or something in brackets, with what is called on it.
fn operand_len(text: &str) -> usize {
    let mut at = primary_len(text);
    loop {
        let rest = &text[at..];
        let padded = rest.len() - rest.trim_start().len();
        let next = &rest[padded..];
        at += match next.chars().next() {
            Some('.') => padded + 1 + word_len(&next[1..]),
            Some('[' | '(') => match brackets_len(next) {
                Some(len) => padded + len,
                None => return at,
            },
            Some('|') => {
                let spaces = next[1..].len() - next[1..].trim_start().len();
                padded + 1 + spaces + word_len(next[1..].trim_start())
            }
            _ => return at,
        };
    }
}

fn primary_len(text: &str) -> usize {
    let sign = text.len() - text.trim_start_matches(['-', '+']).len();
    let text = &text[sign..];
    let len = match text.chars().next() {
        Some('(' | '[' | '{') => brackets_len(text),
        Some('\'' | '"') => string_len(text),
        _ => Some(word_len(text)),
    };
    sign + len.unwrap_or(0)
}

fn word_len(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())
}

/// Bytes up to the bracket that closes the one at the start of `text`.
fn brackets_len(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        match text.as_bytes()[at] {
            b'\'' | b'"' => {
                at += string_len(&text[at..])?;
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
        at += char_len(&text[at..]);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, expected: &str) {
        assert_eq!(without_extensions(source), expected, "{source}");
    }

    #[test]
    fn generation_is_a_scope() {
        check("a{% generation %}b{%- endgeneration -%}c", "a{% with %}b{%- endwith -%}c");
        check(
            "{# {% generation %} #}{{ '{% generation %}' }}",
            "{# {% generation %} #}{{ '{% generation %}' }}",
        );
        check(
            "{% raw %}{% generation %}{{ '%s' % x }}{% endraw %}{% generation %}",
            "{% raw %}{% generation %}{{ '%s' % x }}{% endraw %}{% with %}",
        );
        check("{% generations %}", "{% generations %}");
    }

    #[test]
    fn percent_formats_a_literal() {
        check("{{ '%s' % x }}", "{{ ('%s'|format(x)) }}");
        check("{{ '%s-%s' % (a.b, c[0]) ~ 'z' }}", "{{ ('%s-%s'|format(a.b, c[0])) ~ 'z' }}");
        check("{{ '%s' % (s,) }}", "{{ ('%s'|format(s)) }}");
        check("{% set y = \"%d\" % x|length + 1 %}", "{% set y = (\"%d\"|format(x|length)) + 1 %}");
        check(
            "{{ '%s' % f('%d' % n) }}",
            "{{ ('%s'|format(f('%d' % n))) }}".replace("'%d' % n", "('%d'|format(n))").as_str(),
        );
        check(
            "{{ 'it''s %' }}{{ a % 2 }}{% if x == 'a' %}y{% endif %}",
            "{{ 'it''s %' }}{{ a % 2 }}{% if x == 'a' %}y{% endif %}",
        );
        check("{{ {'a': {'b': '}}'}} }}{{ '%s' % x", "{{ {'a': {'b': '}}'}} }}{{ '%s' % x");
        check("{{ 'é %s' % 'ü' }} é", "{{ ('é %s'|format('ü')) }} é");
    }
}
