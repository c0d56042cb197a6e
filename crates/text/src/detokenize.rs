//! Ids → text, never half a character. Bytes of an unfinished character are held until the token that completes it; all
//! pieces joined are what decoding all ids at once gives.

use std::sync::Arc;

use crate::{Error, TextModel, Tokenizer};

/// Tokens of one character: it has at most four bytes, and a token at least one.
const CHARACTER_TOKENS_MAX: usize = 4;

/// Held tokens from which on the certain part of them is given out, in the case of bytes that never become characters.
const HELD_MAX: usize = 16;

/// The replacement character: what a decoder makes of bytes that are no character, or not yet.
const REPLACEMENT: char = '\u{fffd}';

/// The text of one answer as its ids come. A prompt's text is never part of it; a character that the prompt's last ids
/// begin and the answer completes is, once.
pub struct Detokenizer {
    model: Arc<TextModel>,
    /// Ids since the last but one border at which text was whole: a piece of context, since decoders treat the beginning
    /// of a text differently, and what is held.
    ids: Vec<u32>,
    /// How many of `ids` are context: their text was given out.
    n_done: usize,
    /// Special tokens that are given out as text: think tags, for whoever splits reasoning.
    keep: Vec<u32>,
}

impl Detokenizer {
    /// `prompt` is what the answer continues. `keep_tags`: `<think>` and `</think>` are given out even where they are
    /// special tokens.
    pub fn new(model: Arc<TextModel>, prompt: &[u32], keep_tags: bool) -> Result<Self, Error> {
        let tokenizer = model.tokenizer();
        let tags = ["<think>", "</think>"].into_iter().filter(|_| keep_tags);
        let keep = tags
            .filter_map(|tag| tokenizer.token_to_id(tag))
            .filter(|id| tokenizer.special(*id).is_some())
            .collect();
        let tail = &prompt[prompt.len().saturating_sub(2 * CHARACTER_TOKENS_MAX)..];
        let whole = |n: &usize| Ok::<_, Error>(!tokenizer.decode(&tail[..*n])?.ends_with(REPLACEMENT));
        let mut n_done = tail.len();
        while n_done > 0 && tail.len() - n_done < CHARACTER_TOKENS_MAX && !whole(&n_done)? {
            n_done -= 1;
        }
        // Without an unfinished character at its end a prompt is no context: the answer is decoded as it is alone.
        let ids = if n_done == tail.len() { Vec::new() } else { tail.to_vec() };
        let n_done = n_done.min(ids.len());
        Ok(Self { model, ids, n_done, keep })
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.model.tokenizer()
    }

    /// The text that `id` completes.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        if self.keep.contains(&id) {
            let mut text = self.finish()?;
            text.push_str(self.tokenizer().special(id).unwrap_or_default());
            return Ok(text);
        }
        self.ids.push(id);
        let all = self.tokenizer().decode(&self.ids)?;
        if !all.ends_with(REPLACEMENT) {
            return self.give_out(self.ids.len(), &all);
        }
        if self.ids.len() - self.n_done < HELD_MAX {
            return Ok(String::new());
        }
        // No character is open longer than its tokens: what lies before is certain, up to a border between characters.
        let mut border = self.ids.len() - CHARACTER_TOKENS_MAX;
        while border > self.n_done {
            let certain = self.tokenizer().decode(&self.ids[..border])?;
            if all.starts_with(&certain) {
                return self.give_out(border, &certain);
            }
            border -= 1;
        }
        Ok(String::new())
    }

    /// What `text`, of the first `n` ids, has beyond the context. These ids are the context from now on.
    fn give_out(&mut self, n: usize, text: &str) -> Result<String, Error> {
        let before = self.tokenizer().decode(&self.ids[..self.n_done])?;
        self.ids.drain(..self.n_done);
        self.n_done = n - self.n_done;
        Ok(beyond(&before, text).to_owned())
    }

    /// What was held back when the answer ended; an unfinished character shows as U+FFFD.
    pub fn finish(&mut self) -> Result<String, Error> {
        let all = self.tokenizer().decode(&self.ids)?;
        let text = self.give_out(self.ids.len(), &all)?;
        self.ids.clear();
        self.n_done = 0;
        Ok(text)
    }
}

/// `text` behind what it has in common with `before`.
fn beyond<'t>(before: &str, text: &'t str) -> &'t str {
    let common =
        before.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    &text[common..]
}
