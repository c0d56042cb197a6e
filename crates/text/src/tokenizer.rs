//! Text → ids, and what single ids mean.

use std::{collections::HashMap, path::Path};

use serde_json::{Map, Value};

use crate::{Error, control::Control, read, read_json};

pub struct Tokenizer {
    own: tokenizers::Tokenizer,
    pub(crate) control: Control,
    /// Tokens that decoding leaves out.
    special: HashMap<u32, String>,
    /// Put before a prompt that is plain text.
    prefix: Vec<u32>,
    allow_special: bool,
}

impl Tokenizer {
    /// `literals`: text that the chat format itself writes; see [`Control`].
    pub(crate) fn load(dir: &Path, literals: &str, allow_special: bool) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let wrong = |what: String| Error::Checkpoint(format!("{}: {what}", path.display()));
        let bytes = read(&path)?.ok_or_else(|| wrong("does not exist".to_owned()))?;
        let mut own = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| wrong(error.to_string()))?;
        // Some files remember the limits of a training run. A prompt is never cut in silence.
        own.with_truncation(None).map_err(|error| wrong(error.to_string()))?.with_padding(None);
        let control = Control::new(&own, literals).map_err(wrong)?;
        let special = own
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (id, token.content))
            .collect();

        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let mut prefix = processed_prefix(&own).map_err(wrong)?;
        if prefix.is_empty() && config["add_bos_token"] == Value::Bool(true) {
            let bos = token_text(&config["bos_token"]);
            prefix.extend(bos.and_then(|bos| own.token_to_id(bos)));
        }
        Ok(Self { own, control, special, prefix, allow_special })
    }

    #[must_use]
    pub fn allows_special(&self) -> bool {
        self.allow_special
    }

    /// Ids of a raw prompt, behind the checkpoint's beginning-of-sequence token where it wants one. Exactly one: text
    /// that spells the token out stays text, or, where special tokens are allowed, counts as the one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let ids = if self.allow_special {
            self.encode_as_given(text)?
        } else if self.control.occurs_in(text) {
            self.control.encode_text(text).map_err(|what| Error::messages("prompt", what))?
        } else {
            self.encode_as_given(text)?
        };
        if self.allow_special && !self.prefix.is_empty() && ids.starts_with(&self.prefix) {
            return Ok(ids);
        }
        Ok([self.prefix.clone(), ids].concat())
    }

    /// As transformers' `encode(text, add_special_tokens=False)`: special tokens in the text become control tokens.
    pub fn encode_as_given(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.own.encode_fast(text, false);
        Ok(encoding.map_err(|error| Error::messages("prompt", error.to_string()))?.get_ids().to_vec())
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.own.decode(ids, true).map_err(|error| Error::messages("ids", error.to_string()))
    }

    /// The special token that `id` is, if it is one.
    #[must_use]
    pub fn special(&self, id: u32) -> Option<&str> {
        self.special.get(&id).map(String::as_str)
    }

    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.own.token_to_id(token)
    }

    /// The text of one token as it reads inside a text; parts of characters show as U+FFFD.
    #[must_use]
    pub fn token_text(&self, id: u32) -> String {
        let alone = self.own.decode(&[id], false).unwrap_or_default();
        // Decoders that take the first space of a text away must not take the token's.
        let twice = self.own.decode(&[id, id], false).unwrap_or_default();
        twice.strip_prefix(&alone).map_or(alone.clone(), str::to_owned)
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

/// The tokens that templates name (`bos_token`, …), as variables.
pub(crate) fn named_tokens(dir: &Path) -> Result<Map<String, Value>, Error> {
    let mut named = Map::new();
    // Older checkpoints have them in a file of their own.
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        if let Some(Value::Object(config)) = read_json(&dir.join(file))? {
            let tokens = config.iter().filter(|(key, _)| key.ends_with("_token"));
            for (key, text) in tokens.filter_map(|(key, value)| Some((key, token_text(value)?))) {
                named.entry(key.as_str()).or_insert_with(|| text.into());
            }
        }
    }
    Ok(named)
}

/// A token in a config: its text, or an object that has it.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// What the file's post-processor puts before a text.
fn processed_prefix(own: &tokenizers::Tokenizer) -> Result<Vec<u32>, String> {
    let encode = |special| own.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    let plain = encode(false).map_err(|error| error.to_string())?;
    let mut processed = encode(true).map_err(|error| error.to_string())?;
    let start = (0..processed.len()).find(|start| processed[*start..].starts_with(&plain));
    processed.truncate(start.unwrap_or(0));
    Ok(processed)
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
