//! Text → ids. Two tokenizers of one file: the file's own, and one without its added tokens, for text that must not
//! become control tokens.

use std::path::Path;

use serde_json::Value;

use crate::{Error, read, read_json};

/// The tokens that templates name.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamedTokens {
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
    pub(crate) pad: Option<String>,
}

pub struct Tokenizer {
    own: tokenizers::Tokenizer,
    plain: tokenizers::Tokenizer,
    /// Added tokens, longest first: (text, id, special).
    added: Vec<(String, u32, bool)>,
    /// Put before a prompt that is plain text.
    prefix: Vec<u32>,
    pub(crate) named: NamedTokens,
    allow_special: bool,
}

impl Tokenizer {
    pub(crate) fn load(dir: &Path, allow_special: bool) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let wrong = |what: String| Error::Checkpoint(format!("{}: {what}", path.display()));
        let bytes = read(&path)?.ok_or_else(|| wrong("does not exist".to_owned()))?;
        let own = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| wrong(error.to_string()))?;
        let mut file: Value = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        file["added_tokens"] = Value::Array(Vec::new());
        file["post_processor"] = Value::Null;
        let plain: tokenizers::Tokenizer =
            serde_json::from_value(file).map_err(|error| wrong(error.to_string()))?;
        let mut added: Vec<(String, u32, bool)> = own
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| (token.content, id, token.special))
            .filter(|(text, ..)| !text.is_empty())
            .collect();
        added.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));

        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let named = |key: &str| match &config[key] {
            Value::String(text) => Some(text.clone()),
            Value::Object(token) => token.get("content").and_then(Value::as_str).map(str::to_owned),
            _ => None,
        };
        let named = NamedTokens { bos: named("bos_token"), eos: named("eos_token"), pad: named("pad_token") };
        let mut prefix =
            own.encode_fast("", true).map_err(|error| wrong(error.to_string()))?.get_ids().to_vec();
        if prefix.is_empty() && config["add_bos_token"] == Value::Bool(true) {
            prefix.extend(named.bos.as_deref().and_then(|bos| own.token_to_id(bos)));
        }
        Ok(Self { own, plain, added, prefix, named, allow_special })
    }

    #[must_use]
    pub fn allows_special(&self) -> bool {
        self.allow_special
    }

    /// Ids of a raw prompt, behind the checkpoint's beginning-of-sequence token where it wants one. Exactly one: text
    /// that spells the token out stays text, or, where special tokens are allowed, counts as the one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let ids = if self.allow_special { self.encode_as_given(text)? } else { self.encode_plain(text)? };
        if self.allow_special && !self.prefix.is_empty() && ids.starts_with(&self.prefix) {
            return Ok(ids);
        }
        Ok([self.prefix.clone(), ids].concat())
    }

    /// As transformers' `encode(text, add_special_tokens=False)`: special tokens in the text become control tokens.
    pub fn encode_as_given(&self, text: &str) -> Result<Vec<u32>, Error> {
        encode(&self.own, text)
    }

    /// No part of the text becomes a control token.
    pub(crate) fn encode_plain(&self, text: &str) -> Result<Vec<u32>, Error> {
        // The file's own tokenizer wherever both agree: it is the one that the model was trained with.
        if self.added.iter().any(|(token, ..)| text.contains(token)) {
            encode(&self.plain, text)
        } else {
            encode(&self.own, text)
        }
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.own.decode(ids, true).map_err(|error| Error::messages("ids", error.to_string()))
    }

    /// Added tokens, longest first: (text, id, special).
    pub(crate) fn added(&self) -> &[(String, u32, bool)] {
        &self.added
    }

    /// The special token that `id` is, if it is one.
    #[must_use]
    pub fn special(&self, id: u32) -> Option<&str> {
        self.added.iter().find(|(_, added, special)| *special && *added == id).map(|(text, ..)| text.as_str())
    }

    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.own.token_to_id(token)
    }

    /// The text of one token alone; parts of characters show as U+FFFD.
    #[must_use]
    pub fn token_text(&self, id: u32) -> String {
        self.own.decode(&[id], false).unwrap_or_default()
    }

    /// The bytes of one token: of a byte-level vocabulary entry the bytes it stands for, else its text.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let text = self.token_text(id);
        if !text.contains('\u{fffd}') {
            return text.into_bytes();
        }
        let entry = self.own.id_to_token(id).unwrap_or_default();
        if let Some(hex) = entry.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
            return u8::from_str_radix(hex, 16).map_or_else(|_| text.into_bytes(), |byte| vec![byte]);
        }
        entry.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| text.into_bytes())
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    let encoding = tokenizer.encode_fast(text, false);
    Ok(encoding.map_err(|error| Error::messages("prompt", error.to_string()))?.get_ids().to_vec())
}

/// The byte that a character of a byte-level vocabulary stands for (GPT-2's table): printable Latin-1 is itself, the
/// others follow from U+0100 in order.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(character) {
        code @ 0..=0xff => u8::try_from(code).ok().filter(|byte| printable(*byte)),
        code => (0..=u8::MAX).filter(|byte| !printable(*byte)).nth(code.checked_sub(0x100)? as usize),
    }
}
