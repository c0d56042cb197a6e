//! What of the model was selected on the command line. All that is wrong with a selection is said at once.

use std::{fmt, ops::RangeInclusive};

use ids::ExpertId;

/// Which experts of every MoE layer a process is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection(Choice);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    All,
    /// Parts of contiguous ranges.
    Parts(Vec<Part>),
    /// Ranges as they were typed.
    Listed(Vec<RangeInclusive<u32>>),
    /// None of its own accord.
    None,
}

/// Part `index` (from 1) of `of` contiguous ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    index: u32,
    of: u32,
}

/// Everything that is wrong with a selection.
#[derive(Debug, PartialEq, Eq)]
pub struct Problems(Vec<String>);

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl Selection {
    /// What `--shard` and `--experts` select; with neither of them all, or none if `none_by_default`.
    ///
    /// # Errors
    /// What is wrong with the two flags.
    pub fn parse(
        shard: Option<&str>,
        experts: Option<&str>,
        none_by_default: bool,
    ) -> Result<Self, Problems> {
        let mut problems = Vec::new();
        if shard.is_some() && experts.is_some() {
            problems
                .push("--shard and --experts both say which experts to hold; give one of them".to_owned());
        }
        let parts = shard.map(|text| parts(text).map_err(|mut list| problems.append(&mut list)));
        let listed = experts.map(|text| listed(text).map_err(|mut list| problems.append(&mut list)));
        match (problems.is_empty(), parts, listed) {
            (true, Some(Ok(parts)), None) => Ok(Self(Choice::Parts(parts))),
            (true, None, Some(Ok(ranges))) => Ok(Self(Choice::Listed(ranges))),
            (true, None, None) => Ok(Self(if none_by_default { Choice::None } else { Choice::All })),
            _ => Err(Problems(problems)),
        }
    }

    /// True if nothing was selected and that means none.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0 == Choice::None
    }

    /// The experts selected, ascending, of a model with `n_experts` a layer.
    ///
    /// # Errors
    /// What the model does not have, and what is selected twice.
    pub fn experts(&self, n_experts: u32) -> Result<Vec<ExpertId>, Problems> {
        let mut problems = Vec::new();
        let mut experts: Vec<u32> = Vec::new();
        match &self.0 {
            Choice::All => experts.extend(0..n_experts),
            Choice::None => {}
            Choice::Parts(parts) => {
                for &part in parts {
                    let bound = |at: u32| (u64::from(n_experts) * u64::from(at) / u64::from(part.of)) as u32;
                    let range = bound(part.index - 1)..bound(part.index);
                    if range.is_empty() {
                        problems.push(format!(
                            "--shard {part}: holds nothing, the model has {n_experts} routed experts a layer"
                        ));
                    }
                    experts.extend(range);
                }
            }
            Choice::Listed(ranges) => {
                for range in ranges {
                    if *range.end() >= n_experts {
                        problems.push(format!(
                            "--experts {}: the model has {n_experts} routed experts a layer, numbered from 0",
                            shown(range)
                        ));
                        continue;
                    }
                    for expert in range.clone() {
                        if experts.contains(&expert) {
                            problems.push(format!("--experts: expert {expert} is listed twice"));
                        } else {
                            experts.push(expert);
                        }
                    }
                }
            }
        }
        experts.sort_unstable();
        experts.dedup();
        if problems.is_empty() {
            Ok(experts.into_iter().map(ExpertId).collect())
        } else {
            Err(Problems(problems))
        }
    }
}

fn shown(range: &RangeInclusive<u32>) -> String {
    match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

fn parts(text: &str) -> Result<Vec<Part>, Vec<String>> {
    let mut problems = Vec::new();
    let mut parts = Vec::new();
    for item in text.split(',').map(str::trim) {
        match part(item) {
            Ok(part) if parts.contains(&part) => problems.push(format!("--shard: {part} is listed twice")),
            Ok(part) => parts.push(part),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(parts) } else { Err(problems) }
}

fn part(text: &str) -> Result<Part, String> {
    let numbers = text.split_once('/').and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
    match numbers {
        None => Err(format!("--shard {text}: not of the form I/N, such as 1/4")),
        Some((_, 0)) => Err(format!("--shard {text}: experts cannot be cut into 0 shards")),
        Some((index, of)) if !(1..=of).contains(&index) => {
            Err(format!("--shard {text}: shards of {of} are 1/{of} to {of}/{of}"))
        }
        Some((index, of)) => Ok(Part { index, of }),
    }
}

fn listed(text: &str) -> Result<Vec<RangeInclusive<u32>>, Vec<String>> {
    let mut problems = Vec::new();
    let mut ranges = Vec::new();
    for item in text.split(',').map(str::trim) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) if last < first => {
                problems.push(format!("--experts {item}: the range ends before it begins"));
            }
            (Ok(first), Ok(last)) => ranges.push(first..=last),
            _ => problems.push(format!("--experts {item:?}: not an expert's number or a range such as 0-7")),
        }
    }
    if problems.is_empty() { Ok(ranges) } else { Err(problems) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a model with 16 experts a layer.
    fn check(shard: Option<&str>, experts: Option<&str>, expected: Result<&[u32], &str>) {
        let selected = Selection::parse(shard, experts, false).and_then(|selection| selection.experts(16));
        let selected = selected.map(|experts| experts.into_iter().map(|expert| expert.0).collect::<Vec<_>>());
        let expected = expected.map(<[u32]>::to_vec).map_err(str::to_owned);
        assert_eq!(selected.map_err(|problems| problems.to_string()), expected, "{shard:?} {experts:?}");
    }

    #[test]
    fn selections_are_read() {
        check(None, None, Ok(&(0..16).collect::<Vec<_>>()));
        check(Some("1/4"), None, Ok(&[0, 1, 2, 3]));
        check(Some("4/4"), None, Ok(&[12, 13, 14, 15]));
        check(Some("2/3"), None, Ok(&[5, 6, 7, 8, 9]));
        check(Some("16/16"), None, Ok(&[15]));
        check(Some("1/8, 4/8"), None, Ok(&[0, 1, 6, 7]));
        check(Some("1/2,1/4"), None, Ok(&[0, 1, 2, 3, 4, 5, 6, 7]));
        check(None, Some("12, 0-2"), Ok(&[0, 1, 2, 12]));
        check(None, Some("15"), Ok(&[15]));
    }

    #[test]
    fn nothing_selected_is_all_or_what_is_placed() {
        assert_eq!(Selection::parse(None, None, false), Ok(Selection(Choice::All)));
        let placed = Selection::parse(None, None, true).unwrap();
        assert_eq!(placed.experts(16), Ok(vec![]));
        let pinned = Selection::parse(Some("1/16"), None, true).unwrap();
        assert_eq!(pinned.experts(16), Ok(vec![ExpertId(0)]));
    }

    #[test]
    fn shards_cover_every_expert_once() {
        for of in 1..=16 {
            let parts = (1..=of)
                .flat_map(|index| Selection(Choice::Parts(vec![Part { index, of }])).experts(16).unwrap());
            assert!(parts.eq((0..16).map(ExpertId)), "{of} shards");
        }
    }

    #[test]
    fn wrong_selections_are_named() {
        check(Some("5/4"), None, Err("--shard 5/4: shards of 4 are 1/4 to 4/4"));
        check(Some("0/4"), None, Err("--shard 0/4: shards of 4 are 1/4 to 4/4"));
        check(Some("1/0"), None, Err("--shard 1/0: experts cannot be cut into 0 shards"));
        check(Some("half"), None, Err("--shard half: not of the form I/N, such as 1/4"));
        check(
            Some("1/17"),
            None,
            Err("--shard 1/17: holds nothing, the model has 16 routed experts a layer"),
        );
        check(
            Some("1/4,5/4,1/4,"),
            None,
            Err("--shard 5/4: shards of 4 are 1/4 to 4/4; --shard: 1/4 is listed twice; \
                 --shard : not of the form I/N, such as 1/4"),
        );
        check(None, Some("3-1"), Err("--experts 3-1: the range ends before it begins"));
        check(None, Some(""), Err("--experts \"\": not an expert's number or a range such as 0-7"));
        check(None, Some("1-2-3"), Err("--experts \"1-2-3\": not an expert's number or a range such as 0-7"));
        check(
            None,
            Some("16"),
            Err("--experts 16: the model has 16 routed experts a layer, numbered from 0"),
        );
        check(
            None,
            Some("0-4294967295"),
            Err("--experts 0-4294967295: the model has 16 routed experts a layer, numbered from 0"),
        );
        check(None, Some("0-3,2"), Err("--experts: expert 2 is listed twice"));
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        check(
            Some("5/4"),
            Some("3-1,x"),
            Err("--shard and --experts both say which experts to hold; give one of them; \
                 --shard 5/4: shards of 4 are 1/4 to 4/4; \
                 --experts 3-1: the range ends before it begins; \
                 --experts \"x\": not an expert's number or a range such as 0-7"),
        );
        check(
            None,
            Some("1,1,20"),
            Err("--experts: expert 1 is listed twice; \
                 --experts 20: the model has 16 routed experts a layer, numbered from 0"),
        );
    }
}
