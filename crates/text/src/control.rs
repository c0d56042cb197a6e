//! Control tokens: what a template may write and a request may not. A request's strings reach the model as text, whatever
//! they spell.
//!
//! Before a conversation is rendered, a mark (a character that the request does not hold) is put behind the first
//! character of everything in its strings that is a control token, or could become one together with what the template
//! puts behind it. In the rendered text only the template's own tokens are whole. Those get names that nobody can type,
//! the marks are removed, and a twin of the tokenizer that knows control tokens by these names alone encodes the result
//! in one piece, so that a prompt without anything to guard has the ids that it always had.

use std::collections::{HashMap, HashSet};

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::AddedToken;

use crate::{ChatInput, Error};

/// The first and last character of a control token's name in the twin: a noncharacter, which no text has a use for.
const NAME_MARK: char = '\u{10fffe}';

/// Tags that templates look for in an assistant's message: they reach the template whole.
const THINK_TAGS: [&str; 2] = ["<think>", "</think>"];

pub(crate) struct Control {
    tokens: Vec<String>,
    /// Finds the tokens as a tokenizer does: leftmost first, of those the longest.
    longest: AhoCorasick,
    /// Finds all of them, overlapping ones too.
    every: AhoCorasick,
    /// What a token may begin with.
    firsts: HashSet<char>,
    token_bytes_max: usize,
    twin: tokenizers::Tokenizer,
    /// The twin's ids of added tokens → the file's.
    ids: HashMap<u32, u32>,
    /// The file's ids of control tokens.
    own_ids: HashMap<u32, String>,
}

impl Control {
    /// `literals` is the text that the chat format itself can write.
    pub(crate) fn new(own: &tokenizers::Tokenizer, literals: &str) -> Result<Self, String> {
        let mut added: Vec<(u32, AddedToken)> = own.get_added_tokens_decoder().into_iter().collect();
        added.retain(|(_, token)| !token.content.is_empty());
        added.sort_by_key(|(id, _)| *id);
        let mut tokens = Vec::new();
        let mut twins = Vec::new();
        let mut own_ids = HashMap::new();
        let mut by_name = HashMap::new();
        for (id, mut token) in added {
            if is_control(&token, literals) {
                own_ids.insert(id, token.content.clone());
                let name = name(tokens.len());
                tokens.push(std::mem::replace(&mut token.content, name));
                token.normalized = false;
            }
            by_name.insert(token.content.clone(), id);
            twins.push(token);
        }
        let mut twin = own.clone();
        twin.with_added_vocabulary(tokenizers::AddedVocabulary::new());
        twin.add_tokens(twins).map_err(|error| error.to_string())?;
        let ids = twin
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| Some((id, *by_name.get(&token.content)?)))
            .collect();
        let search = |kind| {
            let built = AhoCorasick::builder().match_kind(kind).build(&tokens);
            built.map_err(|error| format!("its added tokens cannot be searched for: {error}"))
        };
        Ok(Self {
            longest: search(MatchKind::LeftmostLongest)?,
            every: search(MatchKind::Standard)?,
            firsts: tokens.iter().filter_map(|token| token.chars().next()).collect(),
            token_bytes_max: tokens.iter().map(String::len).max().unwrap_or(0),
            tokens,
            twin,
            ids,
            own_ids,
        })
    }

    pub(crate) fn occurs_in(&self, text: &str) -> bool {
        self.longest.is_match(text)
    }

    /// Ids of a text without any control token, whatever it spells. Errors say why that cannot be.
    pub(crate) fn encode_text(&self, text: &str) -> Result<Vec<u32>, String> {
        self.encode(text, str::to_owned)
    }

    /// Ids of a rendered text in which everything but the template's own control tokens bears marks.
    pub(crate) fn encode_marked(&self, marked: &str, mark: Mark) -> Result<Vec<u32>, String> {
        self.encode(marked, |piece| {
            let mut named = String::with_capacity(piece.len());
            self.longest.replace_all_with(piece, &mut named, |found, _, named| {
                named.push_str(&name(found.pattern().as_usize()));
                true
            });
            mark.remove(&named)
        })
    }

    fn encode(&self, text: &str, name_tokens: impl Fn(&str) -> String) -> Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        // A typed name mark is a piece of its own: next to nothing it is no part of a name.
        for (at, piece) in text.split(NAME_MARK).enumerate() {
            if at > 0 {
                self.encode_named(&NAME_MARK.to_string(), &mut ids)?;
            }
            if !piece.is_empty() {
                self.encode_named(&name_tokens(piece), &mut ids)?;
            }
        }
        Ok(ids)
    }

    fn encode_named(&self, named: &str, ids: &mut Vec<u32>) -> Result<(), String> {
        let encoding = self.twin.encode_fast(named, false).map_err(|error| error.to_string())?;
        for id in encoding.get_ids() {
            match (self.ids.get(id), self.own_ids.get(id)) {
                (Some(own), _) => ids.push(*own),
                // A vocabulary that holds the token as an ordinary piece, too.
                (None, Some(token)) => {
                    return Err(format!("this tokenizer cannot read {token:?} as text"));
                }
                (None, None) => ids.push(*id),
            }
        }
        Ok(())
    }

    /// A character that `input` does not hold.
    pub(crate) fn mark(&self, input: &ChatInput) -> Result<Mark, Error> {
        let mut taken = HashSet::new();
        let private = '\u{f0000}'..='\u{ffffd}';
        let mut note =
            |text: &str| taken.extend(text.chars().filter(|character| private.contains(character)));
        each_string(&input.messages, &mut note);
        each_string(&input.tools, &mut note);
        input.kwargs.values().for_each(|value| each_string(value, &mut note));
        let free = private.clone().find(|character| !taken.contains(character));
        free.map(Mark).ok_or_else(|| Error::messages("messages", "every private-use character is taken"))
    }

    /// The conversation with marks.
    pub(crate) fn put_marks(&self, input: &ChatInput, mark: Mark) -> ChatInput {
        let mut marked = input.clone();
        for message in marked.messages.as_array_mut().into_iter().flatten() {
            let assistant = message["role"] == "assistant";
            for (key, value) in message.as_object_mut().into_iter().flatten() {
                // A role is a word that templates compare with theirs.
                if key == "role" && value.as_str().is_some_and(is_word) {
                    continue;
                }
                let keep = assistant && matches!(key.as_str(), "content" | "reasoning_content");
                self.mark_value(value, mark, keep);
            }
        }
        self.mark_value(&mut marked.tools, mark, false);
        marked.kwargs.values_mut().for_each(|value| self.mark_value(value, mark, false));
        marked
    }

    fn mark_value(&self, value: &mut Value, mark: Mark, keep_think_tags: bool) {
        match value {
            Value::String(text) => {
                if let Some(marked) = self.mark_text(text, mark, keep_think_tags) {
                    *text = marked;
                }
            }
            Value::Array(items) => {
                items.iter_mut().for_each(|item| self.mark_value(item, mark, keep_think_tags));
            }
            Value::Object(fields) => {
                if fields.keys().any(|key| self.mark_text(key, mark, false).is_some()) {
                    let old = std::mem::take(fields);
                    fields.extend(
                        old.into_iter()
                            .map(|(key, value)| (self.mark_text(&key, mark, false).unwrap_or(key), value)),
                    );
                }
                fields.values_mut().for_each(|item| self.mark_value(item, mark, keep_think_tags));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// None if there is nothing to mark.
    fn mark_text(&self, text: &str, mark: Mark, keep_think_tags: bool) -> Option<String> {
        let kept = |pattern: usize| keep_think_tags && THINK_TAGS.contains(&self.tokens[pattern].as_str());
        let whole = self.every.find_overlapping_iter(text);
        let mut places: Vec<usize> =
            whole.filter(|found| !kept(found.pattern().as_usize())).map(|found| found.start()).collect();
        // Beginnings of tokens at the end, which what follows in the prompt could complete.
        let from = text.ceil_char_boundary(text.len().saturating_sub(self.token_bytes_max));
        let tails = text[from..].char_indices().filter(|(_, character)| self.firsts.contains(character));
        places.extend(tails.map(|(at, _)| from + at).filter(|at| {
            let tail = &text[*at..];
            self.tokens.iter().any(|token| token.len() > tail.len() && token.starts_with(tail))
        }));
        if places.is_empty() {
            return None;
        }
        places.sort_unstable();
        places.dedup();
        let mut marked = String::with_capacity(text.len() + 4 * places.len());
        let mut done = 0;
        for at in places {
            let behind = at + text[at..].chars().next().map_or(0, char::len_utf8);
            marked.push_str(&text[done..behind]);
            marked.push(mark.0);
            done = behind;
        }
        marked.push_str(&text[done..]);
        Some(marked)
    }
}

/// Special tokens, what the chat format writes itself, and whatever looks like `<|this|>`. Other added tokens are words
/// of the language (runs of spaces, HTML tags) that text is full of.
fn is_control(token: &AddedToken, literals: &str) -> bool {
    let is_space = token.content.trim().is_empty();
    token.special || !is_space && (token.content.contains(['|', '｜']) || literals.contains(&token.content))
}

fn is_word(text: &str) -> bool {
    text.chars().all(|character| character.is_alphanumeric() || matches!(character, '_' | '-'))
}

fn name(index: usize) -> String {
    format!("{NAME_MARK}{index}{NAME_MARK}")
}

/// The character that breaks control tokens in a request's strings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(char);

impl Mark {
    pub(crate) fn remove(self, marked: &str) -> String {
        let text = marked.replace(self.0, "");
        // A template may have printed JSON in ASCII.
        let escaped: String =
            self.0.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect();
        if text.contains(&escaped) { text.replace(&escaped, "") } else { text }
    }
}

fn each_string(value: &Value, note: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => note(text),
        Value::Array(items) => items.iter().for_each(|item| each_string(item, note)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            note(key);
            each_string(value, note);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
