use cluster::Members;
use ids::{Epoch, ExpertId, RowIndex, WeightsHash};
use proto::{
    frame::Grid,
    rows::{Dtype, Rows},
};

use super::*;
use crate::{
    combine::combine,
    dispatch::tests::{activations, any_instant, holder, table},
};

mod inside;

const EXACT: Combine = Combine::Exact(Grid { exponent: -10, contribution_max: 1000.0 });

/// What an expert server would answer: expert e turns a row into row + e, times the weight.
pub(crate) fn serve(frame: &Frame, overflow_over: f32) -> Reply {
    let rows = frame.rows.to_f32();
    let contributions: Vec<[f32; 2]> = frame
        .assignments
        .iter()
        .map(|a| std::array::from_fn(|i| a.weight * (rows[a.row.index() * 2 + i] + a.expert.0 as f32)))
        .collect();
    let mut overflow_rows = Vec::new();
    let values: Vec<f32> = match frame.combine {
        Combine::Pairs => contributions.into_iter().flatten().collect(),
        Combine::Fast | Combine::Exact(_) => {
            let mut sums = vec![0.0; rows.len()];
            for (a, contribution) in frame.assignments.iter().zip(contributions) {
                if contribution.iter().any(|value| value.abs() > overflow_over) {
                    overflow_rows.push(a.row);
                }
                for i in 0..2 {
                    sums[a.row.index() * 2 + i] += contribution[i];
                }
            }
            sums
        }
    };
    let computed = Computed {
        rows: Rows::encode(Dtype::F32, 2, values),
        overflow_rows,
        compute_time: Duration::ZERO,
        queue_time: Duration::ZERO,
    };
    Reply { id: frame.id, epoch: frame.epoch, weights: frame.weights, outcome: Ok(computed) }
}

/// The update that `experts` (two a row) should give.
pub(crate) fn expected_of(experts: &[u32]) -> Vec<f32> {
    let activations = activations(experts);
    (0..experts.len())
        .map(|at| {
            let (row, value) = (at / 2, activations.normed[at]);
            (0..2)
                .map(|j| {
                    activations.assignments.weights[row * 2 + j]
                        * (value + activations.expert(Slot(row * 2 + j)).0 as f32)
                })
                .sum()
        })
        .collect()
}

const CHOSEN: [u32; 6] = [0, 3, 1, 0, 2, 3];

fn expected() -> Vec<f32> {
    expected_of(&CHOSEN)
}

struct Case {
    table: RoutingTable,
    health: Health,
    ids: FrameIds,
    counts: Counts,
    now: Instant,
}

impl Case {
    fn new(holders: &[(&str, &[u32])]) -> Self {
        let (table, now) = (table(holders), any_instant());
        let mut health = Health::new(cluster::health::Limits::default());
        health.follow(table.holders().map(|holder| &holder.instance), now);
        Self { table, health, ids: FrameIds::default(), counts: Counts::default(), now }
    }

    /// With frames known to take a millisecond.
    fn warm(holders: &[(&str, &[u32])]) -> Self {
        let mut case = Self::new(holders);
        for at in 0..200 {
            let id = FrameId(1 << 40 | at);
            case.health.sent(&"a".into(), id, 4, case.now);
            case.now += Duration::from_millis(1);
            case.health.answered(&"a".into(), id, case.now);
        }
        case
    }

    fn around(&mut self) -> Surroundings<'_> {
        Surroundings {
            table: &self.table,
            health: &mut self.health,
            ids: &mut self.ids,
            counts: &mut self.counts,
            now: self.now,
            heard_at: self.now,
            dispatch_timeout: Duration::from_secs(30),
        }
    }

    fn launch(&mut self, combine: Combine) -> (Flight, Vec<Order>) {
        Flight::launch(activations(&CHOSEN), 0..3, combine, &mut self.around())
    }

    fn accept(&mut self, flight: &mut Flight, order: &Order, reply: Reply) -> Option<Vec<Order>> {
        flight.accept(&order.holder, reply, &mut self.around())
    }

    #[track_caller]
    fn land(&mut self, flight: &mut Flight, orders: &[Order]) {
        for order in orders {
            let more = self.accept(flight, order, serve(&order.frame, f32::MAX));
            assert!(more.expect("it is waited for").is_empty());
        }
    }
}

#[track_caller]
fn check(flight: Flight) {
    assert!(flight.is_home());
    let combined = combine(flight.land(), vec![0.0; 6]);
    assert!(combined.lost.is_empty());
    assert_eq!(combined.update, expected());
}

const SPLIT: &[(&str, &[u32])] = &[("a", &[0, 1]), ("b", &[2, 3])];
const TWICE: &[(&str, &[u32])] = &[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2, 3])];

#[test]
fn all_modes_bring_every_pair_home_once() {
    for combine_mode in [Combine::Fast, EXACT, Combine::Pairs] {
        let mut case = Case::new(SPLIT);
        let (mut flight, orders) = case.launch(combine_mode);
        assert_eq!(orders.len(), 2);
        for order in orders.iter().rev() {
            case.land(&mut flight, std::slice::from_ref(order));
            let doubled = case.accept(&mut flight, order, serve(&order.frame, f32::MAX));
            assert!(doubled.is_none(), "a doubled reply");
        }
        check(flight);
    }
}

#[test]
fn an_overflow_is_asked_for_again_as_pairs_from_all_its_servers() {
    let mut case = Case::new(SPLIT);
    let (mut flight, orders) = case.launch(EXACT);
    // Row 2 (experts 2 and 3, both at b) has the largest contribution.
    let mut again = Vec::new();
    for order in &orders {
        again.extend(case.accept(&mut flight, order, serve(&order.frame, 40.0)).unwrap());
    }
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].frame.combine, Combine::Pairs);
    assert!(case.accept(&mut flight, &again[0], serve(&again[0].frame, 40.0)).unwrap().is_empty());
    let landed = flight.land();
    assert_eq!(landed.pairs.keys().copied().collect::<Vec<_>>(), [2]);
    assert_eq!(combine(landed, vec![0.0; 6]).update, expected());
}

/// The first of two frames fails as `fail` says; its pairs must come from the other server, and `reason` is counted.
fn check_failover(fail: impl Fn(&mut Case, &mut Flight, &Order) -> Vec<Order>, reason: &str) {
    let mut case = Case::new(TWICE);
    let (mut flight, orders) = case.launch(EXACT);
    let [first, second] = &orders[..] else { panic!("{orders:?}") };
    case.land(&mut flight, std::slice::from_ref(second));
    let again = fail(&mut case, &mut flight, first);
    assert_eq!(again.len(), 1, "{reason}");
    assert_eq!(again[0].holder, second.holder);
    assert_eq!(case.counts.failures.get(reason), Some(&1), "{:?}", case.counts);
    let late = case.accept(&mut flight, first, serve(&first.frame, f32::MAX));
    assert!(late.is_none(), "a late reply is not used");
    case.land(&mut flight, &again);
    check(flight);
}

fn check_bad_reply(change: impl Fn(&mut Reply), reason: &str) {
    check_failover(
        |case, flight, order| {
            let mut reply = serve(&order.frame, f32::MAX);
            change(&mut reply);
            case.accept(flight, order, reply).unwrap()
        },
        reason,
    );
}

fn with_rows(reply: &mut Reply, values: &[f32]) {
    if let Ok(computed) = &mut reply.outcome {
        computed.rows = Rows::encode(Dtype::F32, 2, values);
    }
}

fn with_nan(reply: &mut Reply) {
    let n = reply.outcome.as_ref().map_or(0, |computed| computed.rows.n_rows() * 2);
    with_rows(reply, &vec![f32::NAN; n]);
}

#[test]
fn a_failed_part_goes_to_the_replica() {
    check_failover(
        |case, flight, order| flight.lose_holder(&order.holder, &Error::internal("gone"), &mut case.around()),
        "internal",
    );
    check_failover(
        |case, flight, _| {
            case.now += Duration::from_secs(30);
            flight.tick(&mut case.around())
        },
        "dispatch_timeout",
    );
    check_bad_reply(|reply| reply.outcome = Err(Error::internal("no")), "internal");
    check_bad_reply(with_nan, "not_finite");
    check_bad_reply(|reply| with_rows(reply, &[0.0; 2]), "internal");
    check_bad_reply(|reply| reply.epoch = Epoch(6), "stale_reply");
    check_bad_reply(|reply| reply.weights = WeightsHash(77), "weights_mismatch");
    check_bad_reply(
        |reply| {
            if let Ok(computed) = &mut reply.outcome {
                computed.overflow_rows.push(RowIndex(9));
            }
        },
        "internal",
    );
}

#[test]
fn a_server_that_answers_nan_is_ejected() {
    let mut case = Case::new(TWICE);
    let (mut flight, orders) = case.launch(EXACT);
    let mut reply = serve(&orders[0].frame, f32::MAX);
    with_nan(&mut reply);
    let again = case.accept(&mut flight, &orders[0], reply).unwrap();
    assert!(!case.health.is_in(&orders[0].holder));
    case.land(&mut flight, &orders[1..]);
    case.land(&mut flight, &again);
    check(flight);
}

#[test]
fn a_late_frame_is_hedged_and_the_first_answer_wins() {
    for original_wins in [true, false] {
        let mut case = Case::warm(TWICE);
        let (mut flight, orders) = case.launch(EXACT);
        case.land(&mut flight, &orders[1..]);
        assert_eq!(flight.next_tick(), Some(case.now + Duration::from_millis(2)));
        case.now += Duration::from_millis(2);
        let hedge = flight.tick(&mut case.around());
        assert_eq!((hedge.len(), &hedge[0].holder), (1, &orders[1].holder));
        assert!(flight.tick(&mut case.around()).is_empty(), "one hedge is enough");
        let (winner, loser) = if original_wins { (&orders[0], &hedge[0]) } else { (&hedge[0], &orders[0]) };
        case.land(&mut flight, std::slice::from_ref(winner));
        assert!(flight.is_home());
        assert!(case.accept(&mut flight, loser, serve(&loser.frame, f32::MAX)).is_none());
        assert_eq!(case.counts.stale_replies, 1);
        check(flight);
    }
}

#[test]
fn a_hedge_may_be_spread_over_several_servers_and_counts_only_as_a_whole() {
    let mut case = Case::warm(&[("a", &[0, 1, 2, 3]), ("b", &[0, 1]), ("c", &[2, 3])]);
    case.health.failed(&"b".into(), FrameId(0), Failure::Transient, case.now);
    // b and c owe a little, so that everything goes to a.
    for (name, id) in [("b", 1), ("c", 2)] {
        for at in 0..9 {
            case.health.sent(&name.into(), FrameId(1 << 50 | id << 8 | at), 1, case.now);
        }
    }
    let (mut flight, orders) = case.launch(EXACT);
    assert_eq!(orders.len(), 1, "{orders:?}");
    case.now += Duration::from_millis(20);
    let hedge = flight.tick(&mut case.around());
    assert_eq!(hedge.len(), 2);
    case.land(&mut flight, &hedge[..1]);
    assert!(!flight.is_home());
    // The original fails: the hedge that is under way takes its place, and nothing more is sent.
    let gone = Error::internal("gone");
    assert!(flight.lose_holder(&"a".into(), &gone, &mut case.around()).is_empty());
    case.land(&mut flight, &hedge[1..]);
    check(flight);
}

#[test]
fn an_ejected_server_is_not_waited_for() {
    let mut case = Case::warm(TWICE);
    let (mut flight, orders) = case.launch(EXACT);
    case.land(&mut flight, &orders[1..]);
    case.health.failed(&orders[0].holder, FrameId(0), Failure::Wrong, case.now);
    let hurried = flight.look_again(&mut case.around());
    assert_eq!(hurried.len(), 1);
    case.land(&mut flight, &hurried);
    check(flight);
}

/// b is ejected and silent. a gives expert 0 to c, and refuses a frame for 0 and 1 before the table says so.
#[test]
fn who_refuses_one_expert_is_asked_again_for_the_others_once_the_table_is_new() {
    let mut case = Case::warm(&[("a", &[0, 1, 2, 3]), ("b", &[1, 2, 3]), ("c", &[0])]);
    case.health.failed(&"b".into(), FrameId(0), Failure::Wrong, case.now);
    for at in 0..9 {
        case.health.sent(&"c".into(), FrameId(1 << 50 | at), 1, case.now);
    }
    let (mut flight, orders) = case.launch(EXACT);
    assert_eq!((orders.len(), orders[0].holder.as_str()), (1, "a"), "{orders:?}");
    let refusal = Reply {
        outcome: Err(Error::new(Code::NotFound, "expert_not_held", "expert 0")),
        ..serve(&orders[0].frame, f32::MAX)
    };
    let again = case.accept(&mut flight, &orders[0], refusal).unwrap();
    let holders: Vec<_> = again.iter().map(|order| order.holder.as_str()).collect();
    assert_eq!(holders, ["b", "c"], "nobody else is known to hold them");
    case.land(&mut flight, &again[1..]);
    assert!(flight.look_again(&mut case.around()).is_empty(), "the table is the same");
    case.table = Members::default().join(holder("a", &[1, 2, 3], 8)).unwrap();
    let once_more = flight.look_again(&mut case.around());
    let [order] = &once_more[..] else { panic!("{once_more:?}") };
    assert_eq!((order.holder.as_str(), order.frame.epoch), ("a", Epoch(8)));
    case.land(&mut flight, &once_more);
    check(flight);
}

/// The same where the refusal comes after the frame was hedged: what covers it knows of the refusal as well.
#[test]
fn who_refuses_after_a_hedge_is_asked_again_too() {
    let mut case = Case::warm(&[("a", &[0, 1, 2, 3]), ("b", &[1, 2, 3]), ("c", &[0])]);
    for (name, id) in [("b", 1), ("c", 2)] {
        for at in 0..9 {
            case.health.sent(&name.into(), FrameId(1 << 50 | id << 8 | at), 1, case.now);
        }
    }
    let (mut flight, orders) = case.launch(EXACT);
    assert_eq!((orders.len(), orders[0].holder.as_str()), (1, "a"), "{orders:?}");
    case.now += Duration::from_millis(20);
    let hedge = flight.tick(&mut case.around());
    let holders: Vec<_> = hedge.iter().map(|order| order.holder.as_str()).collect();
    assert_eq!(holders, ["b", "c"]);
    let refusal = Reply {
        outcome: Err(Error::new(Code::NotFound, "expert_not_held", "expert 0")),
        ..serve(&orders[0].frame, f32::MAX)
    };
    assert!(case.accept(&mut flight, &orders[0], refusal).unwrap().is_empty(), "others are at it");
    case.land(&mut flight, &hedge[1..]);
    case.health.failed(&"b".into(), FrameId(0), Failure::Wrong, case.now);
    assert!(flight.look_again(&mut case.around()).is_empty(), "nobody else is known to hold them");
    case.table = Members::default().join(holder("a", &[1, 2, 3], 8)).unwrap();
    let again = flight.look_again(&mut case.around());
    assert_eq!((again.len(), again[0].holder.as_str()), (1, "a"));
    case.land(&mut flight, &again);
    check(flight);
}

/// Part of a cover is home, the rest with a second ejected server: whoever can then takes that part.
#[test]
fn a_part_that_is_stranded_twice_goes_to_who_comes() {
    let mut case = Case::warm(&[("b", &[0, 1, 2, 3]), ("c", &[1, 2, 3]), ("d", &[0])]);
    for (name, id) in [("c", 1), ("d", 2)] {
        for at in 0..9 {
            case.health.sent(&name.into(), FrameId(1 << 50 | id << 8 | at), 1, case.now);
        }
    }
    let (mut flight, orders) = case.launch(EXACT);
    assert_eq!((orders.len(), orders[0].holder.as_str()), (1, "b"), "{orders:?}");
    // Of three servers one may be out; of the four to come two.
    case.health.failed(&"b".into(), FrameId(0), Failure::Wrong, case.now);
    let cover = flight.look_again(&mut case.around());
    let holders: Vec<_> = cover.iter().map(|order| order.holder.as_str()).collect();
    assert_eq!(holders, ["c", "d"]);
    case.land(&mut flight, &cover[1..]);
    let names: Vec<InstanceId> = ["b", "c", "d", "e", "f", "g"].map(InstanceId::from).into();
    case.health.follow(names.iter(), case.now);
    case.health.failed(&"c".into(), FrameId(0), Failure::Wrong, case.now);
    assert!(!case.health.is_in(&"c".into()));
    assert!(flight.look_again(&mut case.around()).is_empty());
    let mut members = Members::default();
    for (name, experts) in [("d", &[0][..]), ("e", &[1, 2, 3])] {
        case.table = members.join(holder(name, experts, 7)).unwrap();
    }
    let last = flight.look_again(&mut case.around());
    let holders: Vec<_> = last.iter().map(|order| order.holder.as_str()).collect();
    assert_eq!(holders, ["d", "e"], "all of what b was asked for, or what c was: either will do");
    case.land(&mut flight, &last);
    check(flight);
}

/// a lost the frame and is silent; b failed with the hedge, and is back.
#[test]
fn who_failed_with_a_hedge_is_asked_again_when_the_other_is_ejected() {
    let mut case = Case::warm(TWICE);
    let (mut flight, orders) = case.launch(EXACT);
    let [lost, other] = &orders[..] else { panic!("{orders:?}") };
    case.land(&mut flight, std::slice::from_ref(other));
    case.now += Duration::from_millis(20);
    let hedge = flight.tick(&mut case.around());
    assert_eq!((hedge.len(), &hedge[0].holder), (1, &other.holder));
    let damaged = Error::new(Code::Unavailable, "checksum_mismatch", "damaged");
    assert!(flight.lose_holder(&other.holder, &damaged, &mut case.around()).is_empty());
    assert!(flight.look_again(&mut case.around()).is_empty(), "the first one is still in");
    case.health.failed(&lost.holder, FrameId(0), Failure::Wrong, case.now);
    let again = flight.look_again(&mut case.around());
    assert_eq!((again.len(), &again[0].holder), (1, &other.holder));
    case.land(&mut flight, &again);
    check(flight);
}

#[test]
fn a_probe_goes_along_with_a_frame_that_somebody_else_computes() {
    let mut case = Case::warm(TWICE);
    case.health.failed(&"a".into(), FrameId(0), Failure::Wrong, case.now);
    let (mut flight, orders) = case.launch(EXACT);
    assert_eq!(orders.len(), 1, "a is out");
    case.land(&mut flight, &orders);
    check(flight);
    case.now += Duration::from_secs(1);
    let (mut flight, orders) = case.launch(EXACT);
    assert_eq!((orders[0].holder.as_str(), orders[1].holder.as_str()), ("b", "a"));
    case.land(&mut flight, &orders[..1]);
    assert!(flight.is_home(), "nobody waits for the probe");
    assert!(case.accept(&mut flight, &orders[1], serve(&orders[1].frame, f32::MAX)).is_none());
    assert!(case.health.is_in(&"a".into()));
    check(flight);
}

#[test]
fn rows_without_a_holder_are_named_and_the_others_come_home() {
    let mut case = Case::new(&[("a", &[0, 1]), ("b", &[2])]);
    let (mut flight, orders) = case.launch(EXACT);
    case.land(&mut flight, &orders);
    let combined = combine(flight.land(), vec![0.0; 6]);
    assert_eq!(combined.lost.keys().copied().collect::<Vec<_>>(), [0, 2]);
    assert_eq!(combined.lost[&0], [ExpertId(3)]);
    assert_eq!(combined.update[2..4], expected()[2..4]);
}

#[test]
fn a_server_that_dies_takes_only_the_rows_that_nobody_else_can_compute() {
    let mut case = Case::new(&[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2])]);
    case.health.sent(&"b".into(), FrameId(1 << 50), 1, case.now);
    let (mut flight, orders) = case.launch(EXACT);
    let at_a: Vec<&Order> = orders.iter().filter(|order| order.holder.as_str() == "a").collect();
    assert_eq!(at_a.len(), 1);
    let again = flight.lose_holder(&"a".into(), &Error::internal("gone"), &mut case.around());
    let of_b: Vec<Order> = orders.into_iter().filter(|order| order.holder.as_str() == "b").collect();
    case.land(&mut flight, &of_b);
    case.land(&mut flight, &again);
    let combined = combine(flight.land(), vec![0.0; 6]);
    assert_eq!(combined.lost.keys().copied().collect::<Vec<_>>(), [0, 2], "the rows of expert 3");
    assert_eq!(combined.update[2..4], expected()[2..4]);
}

#[test]
fn a_reply_of_somebody_else_is_not_used() {
    let mut case = Case::new(TWICE);
    let (mut flight, orders) = case.launch(EXACT);
    let stranger = Order { holder: "c".into(), frame: orders[0].frame.clone() };
    assert!(case.accept(&mut flight, &stranger, serve(&stranger.frame, f32::MAX)).is_none());
    case.land(&mut flight, &orders);
    check(flight);
}
