//! Folders with tokenizers that need no download: one token a byte, so that every character can be cut anywhere, and one
//! in the manner of sentencepiece.

use std::{path::Path, sync::Arc};

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use text::{ChatInput, Options, Prompt, TextModel};

pub(crate) const IM_START: u32 = 256;
pub(crate) const IM_END: u32 = 257;
pub(crate) const BOS: u32 = 258;
pub(crate) const END_THINK: u32 = 259;
/// Two spaces: an added token that is a word and no control token.
pub(crate) const SPACES: u32 = 261;

pub(crate) const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub(crate) struct Folder(TempDir);

impl Folder {
    /// With the byte tokenizer.
    pub(crate) fn new(config: &Value) -> Self {
        Self::of(&byte_tokenizer(), config)
    }

    pub(crate) fn of(tokenizer: &Value, config: &Value) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let folder = folder.with("tokenizer.json", &tokenizer.to_string());
        folder.with("tokenizer_config.json", &config.to_string())
    }

    pub(crate) fn template(template: &str) -> Self {
        Self::new(&json!({ "chat_template": template }))
    }

    pub(crate) fn with(self, file: &str, text: &str) -> Self {
        let path = self.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn load(&self) -> Arc<TextModel> {
        Arc::new(TextModel::load(self.path(), &Options::default()).unwrap())
    }

    pub(crate) fn prompt(&self, messages: Value) -> Prompt {
        self.load().prompt(&ask(messages)).unwrap()
    }
}

pub(crate) fn ask(messages: Value) -> ChatInput {
    ChatInput {
        messages,
        tools: Value::Null,
        kwargs: Map::new(),
        add_generation_prompt: true,
        now: None,
        as_given: false,
    }
}

pub(crate) fn user(content: impl Into<Value>) -> Value {
    json!([{ "role": "user", "content": content.into() }])
}

pub(crate) fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// GPT-2's table: the character that stands for a byte.
fn character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|byte| !printable(*byte)).count() as u32;
    char::from_u32(0x100 + nth).unwrap()
}

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special })
}

/// Byte values are ids; behind them come special tokens, and one that is none.
pub(crate) fn byte_tokenizer() -> Value {
    let vocab: Map<String, Value> =
        (0..=255_u8).map(|byte| (character(byte).to_string(), json!(byte))).collect();
    let special = ["<|im_start|>", "<|im_end|>", "<bos>", "</think>", "<think>"];
    let mut added: Vec<Value> =
        special.iter().enumerate().map(|(i, content)| self::added(256 + i, content, true)).collect();
    added.push(self::added(SPACES as usize, "  ", false));
    let level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    })
}

/// What puts `<bos>` before a text.
pub(crate) fn bos_processor() -> Value {
    json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<bos>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<bos>": { "id": "<bos>", "ids": [BOS], "tokens": ["<bos>"] } } })
}

/// Pieces with `▁` for a space, bytes for what has no piece, and a decoder that takes the first space away. Returns the
/// ids of pieces by name, too.
pub(crate) fn sentencepiece() -> (Value, impl Fn(&str) -> u32) {
    let mut pieces: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    pieces.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    pieces.extend(["▁", "a", "b", "▁a", "▁b"].map(str::to_owned));
    let vocab: Map<String, Value> =
        pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    let replace =
        |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": { "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, replace(" ", "▁")] },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [replace("▁", " "), { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": [["▁", "a"], ["▁", "b"]] },
    });
    let id = move |name: &str| pieces.iter().position(|piece| piece == name).unwrap() as u32;
    (tokenizer, id)
}
