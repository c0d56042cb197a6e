//! Answers cases of golden text: `cases DIR IN.jsonl [FORMAT]`.
use std::{io::Write as _, path::Path, sync::Arc};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let chat_format = args.get(3).map(|name| name.parse()).transpose()?;
    let options = text::Options { chat_format, allow_special: true, ..text::Options::default() };
    let model = Arc::new(text::TextModel::load(Path::new(&args[1]), &options)?);
    let mut out = std::io::stdout().lock();
    for line in std::fs::read_to_string(&args[2])?.lines() {
        writeln!(out, "{}", text::cases::answer(&model, &serde_json::from_str(line)?))?;
    }
    Ok(())
}
