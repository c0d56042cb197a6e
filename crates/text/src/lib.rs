//! Tokens and strings of one checkpoint: tokenizer, chat template, detokenizer, stop strings, reasoning. Knows no
//! tensors and no network.

pub mod cases;
mod chat;
mod control;
mod detokenize;
mod formats;
mod reasoning;
mod stop;
mod template;
mod tokenizer;

use std::path::{Path, PathBuf};

pub use chat::{ChatFormat, ChatInput, Prompt};
pub use detokenize::Detokenizer;
pub use formats::FormatName;
pub use reasoning::{Reasoning, Split};
pub use stop::{StopOutcome, StopStrings};
pub use tokenizer::Tokenizer;

/// What is wrong with a text file of a checkpoint, a template, or the messages given to it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A file of the checkpoint.
    #[error("{0}")]
    Checkpoint(String),
    /// The caller's messages; `param` is the field at fault.
    #[error("{message}")]
    Messages { param: String, message: String },
    /// The template refused the messages, or took too long.
    #[error("the chat template refused the messages: {0}")]
    Template(String),
    /// The checkpoint has no chat template, or none that can be read.
    #[error("{0}")]
    NoTemplate(String),
}

impl Error {
    pub(crate) fn messages(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Messages { param: param.into(), message: message.into() }
    }
}

/// How text is read and written for one checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A template file that goes before the checkpoint's own.
    pub chat_template: Option<PathBuf>,
    /// A format that exists only as code.
    pub chat_format: Option<FormatName>,
    /// Special tokens in a request's strings become control tokens, as in transformers. Otherwise they stay text.
    pub allow_special: bool,
}

/// Everything about text of one checkpoint.
pub struct TextModel {
    tokenizer: Tokenizer,
    chat: Result<ChatFormat, Error>,
}

impl TextModel {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the chat template. A checkpoint without a template, or with
    /// one that cannot be read, loads; [`TextModel::chat`] says so.
    pub fn load(dir: &Path, options: &Options) -> Result<Self, Error> {
        let chat = match ChatFormat::load(dir, options) {
            Err(error @ Error::Checkpoint(_)) => return Err(error),
            result => result,
        };
        let literals = chat.as_ref().map(ChatFormat::literals).unwrap_or_default();
        let tokenizer = Tokenizer::load(dir, &literals, options.allow_special)?;
        Ok(Self { tokenizer, chat })
    }

    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub fn chat(&self) -> Result<&ChatFormat, Error> {
        self.chat.as_ref().map_err(Clone::clone)
    }

    /// Renders a conversation and turns it into ids. Special tokens come from the template alone, unless the options
    /// allow them in the request.
    pub fn prompt(&self, input: &ChatInput) -> Result<Prompt, Error> {
        let chat = self.chat()?;
        let input = chat.prepare(input)?;
        if self.tokenizer.allows_special() {
            let text = chat.render(&input)?;
            let ids = self.tokenizer.encode_as_given(&text)?;
            return Ok(Prompt { starts_in_reasoning: reasoning::ends_open(&text), ids, text });
        }
        let control = &self.tokenizer.control;
        let mark = control.mark(&input)?;
        let marked = chat.render(&control.put_marks(&input, mark))?;
        let ids = control.encode_marked(&marked, mark).map_err(|what| Error::messages("messages", what))?;
        // Of the marked text: a tag that the user typed opens nothing.
        let starts_in_reasoning = reasoning::ends_open(&marked);
        Ok(Prompt { text: mark.remove(&marked), ids, starts_in_reasoning })
    }
}

pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::Checkpoint(format!("cannot read {}: {error}", path.display()))),
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Option<serde_json::Value>, Error> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::Checkpoint(format!("{} is not JSON: {error}", path.display())))
}
