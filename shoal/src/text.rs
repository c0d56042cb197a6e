//! `shoal text`: answers cases of golden text, to compare tokenizer and templates with another engine.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::PathBuf,
    sync::Arc,
};

use anyhow::Context as _;
use indicatif::ProgressBar;
use text::{FormatName, Options, TextModel};

/// Answer cases of golden text: tokenizer, detokenizer, chat template.
///
/// Each line of IN is a case: {"kind": "encode", "text"} gives {"ids"}; {"kind": "decode", "ids"} gives {"text"}, decoded
/// one id at a time; {"kind": "chat", "messages", "tools", "kwargs"} gives {"prompt", "ids"}; whatever cannot be done
/// gives {"error"}. Special tokens in the text become control tokens, as in transformers.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with tokenizer.json and tokenizer_config.json
    dir: PathBuf,
    /// Cases, a JSON object a line
    #[arg(long, value_name = "IN")]
    cases: PathBuf,
    /// Where to write answers, a JSON object a line
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
    /// A chat format that exists only as code: deepseek-v3.2, deepseek-v4
    #[arg(long, value_name = "NAME")]
    chat_format: Option<FormatName>,
    /// A jinja template that goes before the checkpoint's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let options = Options {
        chat_template: args.chat_template.clone(),
        chat_format: args.chat_format,
        allow_special: true,
    };
    let model = Arc::new(TextModel::load(&args.dir, &options)?);
    let cases = File::open(&args.cases).with_context(|| format!("cannot read {}", args.cases.display()))?;
    let out = File::create(&args.out).with_context(|| format!("cannot write {}", args.out.display()))?;
    let mut out = BufWriter::new(out);
    // Draws only on a terminal, on stderr.
    let progress = ProgressBar::new_spinner().with_message("cases");
    for (number, line) in BufReader::new(cases).lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", args.cases.display()))?;
        let case = serde_json::from_str(&line)
            .with_context(|| format!("{} line {} is not JSON", args.cases.display(), number + 1))?;
        writeln!(out, "{}", text::cases::answer(&model, &case))?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    out.flush().with_context(|| format!("cannot write {}", args.out.display()))
}
