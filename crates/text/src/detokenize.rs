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
        let (ids, n_done) = context(tokenizer, prompt)?;
        Ok(Self { model, ids, n_done, keep })
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.model.tokenizer()
    }

    /// The text that `id` completes.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        if self.keep.contains(&id) {
            let held = if self.n_done < self.ids.len() { self.finish()? } else { String::new() };
            return Ok(held + self.tokenizer().special(id).unwrap_or_default());
        }
        // Decoding leaves it out, and it would not do as context.
        if self.tokenizer().special(id).is_some() {
            return Ok(String::new());
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
        // Behind a context that ends inside a character, `text` has the character where the context has not.
        let completed = || text.strip_prefix(before.trim_end_matches(REPLACEMENT));
        let beyond = match text.strip_prefix(before.as_str()).or_else(completed) {
            Some(beyond) => beyond.to_owned(),
            // Byte tokens are characters as a run or not at all: a broken one spoils what was given out before it.
            None => self.tokenizer().decode(&self.ids[self.n_done..n])?,
        };
        self.ids.drain(..self.n_done);
        self.n_done = n - self.n_done;
        Ok(beyond)
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

/// The ids at the end of a prompt that say how an answer begins, and how many of them are whole characters: text behind
/// text keeps its first space, behind a special token it is a text of its own.
fn context(tokenizer: &Tokenizer, prompt: &[u32]) -> Result<(Vec<u32>, usize), Error> {
    let tail = &prompt[prompt.len().saturating_sub(2 * CHARACTER_TOKENS_MAX)..];
    let text_from = tail.iter().rposition(|id| tokenizer.special(*id).is_some()).map_or(0, |at| at + 1);
    let mut tail = &tail[text_from..];
    let mut n_done = tail.len();
    while n_done > 0
        && tail.len() - n_done < CHARACTER_TOKENS_MAX
        && tokenizer.decode(&tail[..n_done])?.ends_with(REPLACEMENT)
    {
        n_done -= 1;
    }
    // The cut through the prompt may have left the end of a character at the front.
    while n_done > 0 && tokenizer.decode(&tail[..n_done])?.starts_with(REPLACEMENT) {
        tail = &tail[1..];
        n_done -= 1;
    }
    Ok((tail.to_vec(), n_done))
}
