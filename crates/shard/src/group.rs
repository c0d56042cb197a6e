//! Rows of a frame → rows by expert, so that each expert's weights are read once a frame. Pure.

use std::collections::BTreeMap;

use ids::ExpertId;
use proto::frame::Assignment;

/// The assignments of one expert.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) expert: ExpertId,
    /// Positions in the frame's list of assignments, ascending.
    pub(crate) members: Vec<usize>,
}

/// Splits assignments by expert, in ascending order of expert. A row's contributions are summed in the order of the
/// groups, which therefore follows from its own experts and never from the other rows.
pub(crate) fn group(assignments: &[Assignment]) -> Vec<Group> {
    let mut members: BTreeMap<ExpertId, Vec<usize>> = BTreeMap::new();
    for (at, assignment) in assignments.iter().enumerate() {
        members.entry(assignment.expert).or_default().push(at);
    }
    members.into_iter().map(|(expert, members)| Group { expert, members }).collect()
}

impl Group {
    /// The members' rows.
    pub(crate) fn rows(&self, assignments: &[Assignment]) -> Vec<usize> {
        self.members.iter().map(|&member| assignments[member].row.index()).collect()
    }
}

#[cfg(test)]
mod tests {
    use ids::RowIndex;

    use super::*;

    fn assignments(pairs: &[(u32, u32)]) -> Vec<Assignment> {
        pairs
            .iter()
            .map(|&(row, expert)| Assignment { row: RowIndex(row), expert: ExpertId(expert), weight: 1.0 })
            .collect()
    }

    fn check(pairs: &[(u32, u32)], expected: &[(u32, &[usize])]) {
        let expected: Vec<Group> = expected
            .iter()
            .map(|&(expert, members)| Group { expert: ExpertId(expert), members: members.to_vec() })
            .collect();
        assert_eq!(group(&assignments(pairs)), expected, "{pairs:?}");
    }

    #[test]
    fn assignments_are_split_by_expert() {
        check(&[], &[]);
        check(&[(0, 7)], &[(7, &[0])]);
        check(&[(0, 7), (0, 3), (1, 3), (1, 7)], &[(3, &[1, 2]), (7, &[0, 3])]);
        check(&[(2, 1), (0, 1), (1, 1)], &[(1, &[0, 1, 2])]);
    }

    #[test]
    fn rows_are_in_the_order_of_the_members() {
        let assignments = assignments(&[(2, 1), (0, 5), (0, 1)]);
        let groups = group(&assignments);
        assert_eq!(groups[0].rows(&assignments), [2, 0]);
        assert_eq!(groups[1].rows(&assignments), [0]);
    }
}
