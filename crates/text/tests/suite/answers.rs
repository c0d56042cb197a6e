//! Ids → text, piece by piece.

use std::sync::Arc;

use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};
use text::{Detokenizer, StopStrings, TextModel};

use crate::folder::{END_THINK, Folder, IM_END, bytes, sentencepiece};

fn stream(model: &Arc<TextModel>, prompt: &[u32], ids: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(model), prompt, false).unwrap();
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    pieces.push(detokenizer.finish().unwrap());
    pieces
}

fn byte_model() -> Arc<TextModel> {
    Folder::new(&Value::Null).load()
}

#[test]
fn no_piece_holds_half_a_character() {
    let model = byte_model();
    assert_eq!(stream(&model, &[], &bytes("🌶éA")), ["", "", "", "🌶", "", "é", "A", ""]);
    for text in ["👨‍👩‍👧", "漢字 und Ümläute", "a\u{0301}", "\u{fffd}!"] {
        let pieces = stream(&model, &[], &bytes(text));
        assert_eq!(pieces.concat(), text);
        assert_eq!(pieces.concat().matches('\u{fffd}').count(), text.matches('\u{fffd}').count());
    }
}

#[test]
fn answers_side_by_side_share_nothing() {
    let model = byte_model();
    let ids = bytes("👨‍👩‍👧");
    let mut all: Vec<Detokenizer> =
        (0..8).map(|_| Detokenizer::new(Arc::clone(&model), &[], false).unwrap()).collect();
    let mut texts = vec![String::new(); 8];
    for at in 0..ids.len() + 8 {
        // Each is one id behind the one before.
        for (i, (detokenizer, text)) in all.iter_mut().zip(&mut texts).enumerate() {
            if let Some(id) = at.checked_sub(i).and_then(|at| ids.get(at)) {
                text.push_str(&detokenizer.push(*id).unwrap());
            }
        }
    }
    assert!(texts.iter().all(|text| text == "👨‍👩‍👧"), "{texts:?}");
}

#[test]
fn special_tokens_are_left_out_but_for_kept_tags() {
    let model = byte_model();
    let ids = [bytes("a"), vec![IM_END, END_THINK], bytes("b")].concat();
    assert_eq!(stream(&model, &[], &ids).concat(), "ab");
    let mut detokenizer = Detokenizer::new(model, &[], true).unwrap();
    let text: String = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    assert_eq!(text, "a</think>b");
}

#[test]
fn a_prompt_that_ends_inside_a_character_is_not_echoed() {
    let model = byte_model();
    let prompt = [bytes("Hello world "), vec![0xf0, 0x9f, 0x8c]].concat();
    assert_eq!(stream(&model, &prompt, &[0xb6, 0x21, 0x3f]).concat(), "🌶!?");
    assert_eq!(stream(&model, &bytes("Hello"), &bytes(" you")).concat(), " you");
    // The tail of the prompt that is looked at begins inside a character.
    assert_eq!(stream(&model, &bytes("🌶🌶éa"), &bytes("ü")).concat(), "ü");
}

#[test]
fn a_decoder_that_strips_the_first_space_strips_no_other() {
    let (tokenizer, id) = sentencepiece();
    let model = Folder::of(&tokenizer, &Value::Null).load();
    let (a, b, end) = (id("▁a"), id("▁b"), id("</s>"));
    assert_eq!(stream(&model, &[], &[a, b]), ["a", " b", ""]);
    assert_eq!(stream(&model, &[], &[a, end, b]).concat(), model.tokenizer().decode(&[a, end, b]).unwrap());
    // Behind text an answer goes on; behind a special token it begins.
    assert_eq!(stream(&model, &[a], &[b]).concat(), " b");
    assert_eq!(stream(&model, &[a, end], &[b]).concat(), "b");
    assert_eq!(model.tokenizer().token_text(a), " a");
    assert_eq!(model.tokenizer().token_bytes(id("<0xC3>")), [0xc3]);
    assert_eq!(model.tokenizer().token_bytes(a), b" a");
}

#[test]
fn byte_tokens_are_characters_as_soon_as_they_are_complete() {
    let (tokenizer, id) = sentencepiece();
    let model = Folder::of(&tokenizer, &Value::Null).load();
    let ids = |bytes: &[u8]| bytes.iter().map(|byte| id(&format!("<0x{byte:02X}>"))).collect::<Vec<_>>();
    assert_eq!(stream(&model, &[], &ids("é🌶".as_bytes())), ["", "é", "", "", "", "🌶", ""]);
    // The decoder spoils a run of bytes as a whole; what was given out stays.
    assert_eq!(stream(&model, &[], &ids(&[0xc3, 0xa9, 0xc3])).concat(), "é\u{fffd}");
    assert_eq!(stream(&model, &ids(&"é".repeat(9).into_bytes()[1..]), &ids("ü".as_bytes())).concat(), "ü");
}

proptest! {
    #[test]
    fn pieces_join_to_what_all_ids_give(ids in vec(prop_oneof![0..=255_u32, Just(0xf0), Just(0x9f), Just(0xb6), 255..263_u32], 0..80)) {
        let model = byte_model();
        prop_assert_eq!(stream(&model, &[], &ids).concat(), model.tokenizer().decode(&ids).unwrap());
    }

    #[test]
    fn a_streamed_stop_is_the_leftmost_of_the_whole_text(text in "[abé]{0,24}", stops in vec("[abé]{1,4}", 0..4), cut in 1..5_usize) {
        let expected = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
        let mut stop = StopStrings::new(stops.clone());
        let characters: Vec<char> = text.chars().collect();
        let (mut given, mut stopped) = (String::new(), false);
        for piece in characters.chunks(cut).map(|piece| piece.iter().collect::<String>()) {
            let outcome = stop.push(&piece);
            given.push_str(&outcome.text);
            stopped = outcome.stopped;
            if stopped {
                break;
            }
        }
        if !stopped {
            let outcome = stop.finish();
            given.push_str(&outcome.text);
            stopped = outcome.stopped;
        }
        prop_assert_eq!(given, &text[..expected.unwrap_or(text.len())]);
        prop_assert_eq!(stopped, expected.is_some());
    }
}

#[test]
fn tokens_of_a_byte_are_bytes() {
    let model = byte_model();
    assert_eq!(model.tokenizer().token_bytes(0xf0), [0xf0]);
    assert_eq!(model.tokenizer().token_text(0xf0), "\u{fffd}");
    assert_eq!(model.tokenizer().token_text(IM_END), "<|im_end|>");
    assert_eq!(json!(model.tokenizer().token_text(0x41)), json!("A"));
}
