//! Answers cases of golden text: `cases DIR IN.jsonl [FORMAT|- [TEMPLATE|- [strict]]]`. With `strict`, special tokens in a
//! request stay text.
use std::{io::Write as _, path::Path, sync::Arc};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let chat_format = args.get(3).filter(|name| *name != "-").map(|name| name.parse()).transpose()?;
    let options = text::Options {
        chat_format,
        allow_special: args.get(5).is_none(),
        chat_template: args.get(4).filter(|path| *path != "-").map(Into::into),
    };
    let model = Arc::new(text::TextModel::load(Path::new(&args[1]), &options)?);
    let mut out = std::io::stdout().lock();
    for line in std::fs::read_to_string(&args[2])?.lines() {
        writeln!(out, "{}", text::cases::answer(&model, &serde_json::from_str(line)?))?;
    }
    Ok(())
}
