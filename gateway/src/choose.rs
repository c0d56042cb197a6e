//! One router out of several: prompts that begin alike go to the same one, as long as it is not busier than the others.
//! Pure.

use std::hash::Hasher as _;

use twox_hash::XxHash3_64;

/// Tokens that decide: enough to tell system prompts apart, few enough that the turns of one chat stay together.
const PREFIX_TOKENS: usize = 32;

pub(crate) struct Candidate<'a> {
    pub(crate) key: &'a str,
    /// Sequences that this gateway has there.
    pub(crate) outstanding: usize,
}

/// Rendezvous hashing with bounded loads: the first in the prompt's own order of the candidates that is not above the
/// bound. A candidate that comes or goes moves only its own share of the prompts.
pub(crate) fn choose(prompt: &[u32], candidates: &[Candidate<'_>]) -> Option<usize> {
    let total: usize = candidates.iter().map(|candidate| candidate.outstanding).sum();
    let mean = total as f32 / candidates.len().max(1) as f32;
    // A quarter above the mean, or a few where that is nothing.
    let bound = (mean * 1.25).max(mean + 4.0);
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(score(prompt, candidates[at].key)));
    order.into_iter().find(|&at| candidates[at].outstanding as f32 <= bound)
}

fn score(prompt: &[u32], key: &str) -> u64 {
    let mut hash = XxHash3_64::new();
    hash.write(key.as_bytes());
    prompt.iter().take(PREFIX_TOKENS).for_each(|id| hash.write(&id.to_le_bytes()));
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates<'a>(loads: &[(&'a str, usize)]) -> Vec<Candidate<'a>> {
        loads.iter().map(|&(key, outstanding)| Candidate { key, outstanding }).collect()
    }

    fn key(prompt: u32, loads: &[(&'static str, usize)]) -> &'static str {
        let ids: Vec<u32> = (prompt..prompt + 40).collect();
        loads[choose(&ids, &candidates(loads)).unwrap()].0
    }

    #[test]
    fn a_prompt_keeps_its_router_and_a_new_one_takes_only_its_share() {
        let (two, three) = ([("a", 0), ("b", 0)], [("a", 0), ("b", 0), ("c", 0)]);
        let mut moved = 0;
        let mut at_a = 0;
        for prompt in 0..900 {
            let (before, after) = (key(prompt, &two), key(prompt, &three));
            assert_eq!(before, key(prompt, &two));
            assert!(after == before || after == "c");
            moved += usize::from(after == "c");
            at_a += usize::from(before == "a");
        }
        assert!((200..400).contains(&moved) && (350..550).contains(&at_a), "{moved} {at_a}");
    }

    #[test]
    fn only_the_beginning_of_a_prompt_counts() {
        let list = candidates(&[("a", 0), ("b", 0), ("c", 0)]);
        let prompt: Vec<u32> = (0..100).collect();
        assert_eq!(choose(&prompt, &list), choose(&prompt[..32], &list));
    }

    #[test]
    fn a_busy_router_gives_way() {
        for prompt in 0..50 {
            let first = key(prompt, &[("a", 0), ("b", 0)]);
            let loads = if first == "a" { [("a", 20), ("b", 2)] } else { [("a", 2), ("b", 20)] };
            assert_ne!(key(prompt, &loads), first);
        }
        assert_eq!(choose(&[1], &[]), None);
    }
}
