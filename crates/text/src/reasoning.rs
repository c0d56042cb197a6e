//! Splits an answer into reasoning and content. Where it begins follows from how the prompt ended, never from the model's
//! family: behind an open `<think>` the answer begins with reasoning, behind anything else with content. A model that
//! opens its own tag as the first thing it says (DeepSeek-R1) reasons too.
//!
//! White space next to the tags is dropped on both sides, streamed or not.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space was said yet.
    Start,
    Reasoning,
    /// White space behind the closing tag is dropped.
    AfterReasoning,
    Content,
}

/// Parts of a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    pub reasoning: String,
    pub content: String,
}

#[derive(Clone, Debug)]
pub struct Reasoning {
    state: State,
    held: String,
    reasoned: bool,
}

impl Reasoning {
    #[must_use]
    pub fn new(starts_in_reasoning: bool) -> Self {
        let state = if starts_in_reasoning { State::Reasoning } else { State::Start };
        Self { state, held: String::new(), reasoned: false }
    }

    /// True while what comes is reasoning.
    #[must_use]
    pub fn is_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    pub fn push(&mut self, text: &str) -> Split {
        self.held.push_str(text);
        let mut split = Split::default();
        while self.advance(&mut split) {}
        split
    }

    /// Takes what is certain from the held text. True: the state changed and there may be more.
    fn advance(&mut self, split: &mut Split) -> bool {
        match self.state {
            State::Start => {
                let said = self.held.trim_start();
                if let Some(rest) = said.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.state = State::Reasoning;
                    true
                } else if OPEN.starts_with(said) {
                    false
                } else {
                    self.state = State::Content;
                    true
                }
            }
            State::Reasoning => {
                if !self.reasoned {
                    self.held = self.held.trim_start().to_owned();
                    // Some templates open the tag and the model opens it once more.
                    if let Some(rest) = self.held.strip_prefix(OPEN) {
                        self.held = rest.to_owned();
                        return true;
                    }
                    if OPEN.starts_with(&self.held) {
                        return false;
                    }
                }
                if let Some(at) = self.held.find(CLOSE) {
                    split.reasoning.push_str(self.held[..at].trim_end());
                    self.held.drain(..at + CLOSE.len());
                    self.state = State::AfterReasoning;
                    return true;
                }
                let open = |at: &usize| CLOSE.starts_with(&self.held[*at..]);
                let certain =
                    self.held.char_indices().map(|(at, _)| at).find(open).unwrap_or(self.held.len());
                // White space before what may be the tag waits with it.
                let certain = self.held[..certain].trim_end().len();
                split.reasoning.push_str(&self.held[..certain]);
                self.reasoned |= certain > 0;
                self.held.drain(..certain);
                false
            }
            State::AfterReasoning => {
                self.held = self.held.trim_start().to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.state = State::Content;
                true
            }
            State::Content => {
                split.content.push_str(&std::mem::take(&mut self.held));
                false
            }
        }
    }

    /// What was held back when the answer ended.
    pub fn finish(&mut self) -> Split {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Reasoning => Split { reasoning: held.trim_end().to_owned(), content: String::new() },
            State::AfterReasoning => Split::default(),
            State::Start | State::Content => Split { reasoning: String::new(), content: held },
        }
    }
}

/// Whether a prompt leaves a `<think>` open at its end.
pub(crate) fn ends_open(prompt: &str) -> bool {
    prompt.trim_end().ends_with(OPEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(starts: bool, text: &str, expected: (&str, &str)) {
        // In one piece, byte by byte of ASCII, and cut at every place.
        let run = |pieces: &[&str]| {
            let mut reasoning = Reasoning::new(starts);
            let mut all = Split::default();
            for split in pieces.iter().map(|piece| reasoning.push(piece)).collect::<Vec<_>>() {
                all.reasoning.push_str(&split.reasoning);
                all.content.push_str(&split.content);
            }
            let split = reasoning.finish();
            all.reasoning.push_str(&split.reasoning);
            all.content.push_str(&split.content);
            (all.reasoning, all.content)
        };
        let expected = (expected.0.to_owned(), expected.1.to_owned());
        assert_eq!(run(&[text]), expected, "{text:?}");
        assert_eq!(
            run(&text.split_inclusive(|_| true).collect::<Vec<_>>()),
            expected,
            "{text:?} letter by letter"
        );
        for (at, _) in text.char_indices() {
            assert_eq!(run(&[&text[..at], &text[at..]]), expected, "{text:?} cut at {at}");
        }
    }

    #[test]
    fn reasoning_and_content_are_split_wherever_the_pieces_end() {
        check(false, "ok", ("", "ok"));
        check(true, "ok", ("ok", ""));
        check(true, "hm</think>ok", ("hm", "ok"));
        check(true, "\nstep 1\n\nstep 2\n</think>\n\n4 < 5", ("step 1\n\nstep 2", "4 < 5"));
        check(false, "<think>hm</think>ok", ("hm", "ok"));
        check(true, "<think>\nhm</think>ok", ("hm", "ok"));
        check(true, "a < b </ c</think>", ("a < b </ c", ""));
        check(true, "ends with <", ("ends with <", ""));
        check(false, "  text </think> stays", ("", "  text </think> stays"));
        check(false, "<thin", ("", "<thin"));
        check(false, "", ("", ""));
    }

    #[test]
    fn the_prompt_decides_where_an_answer_begins() {
        assert!(ends_open("<A><think>") && ends_open("<A><think>\n"));
        assert!(!ends_open("<A></think>") && !ends_open("<A>"));
    }
}
