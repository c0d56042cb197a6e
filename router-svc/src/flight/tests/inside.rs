//! Experts in the router itself, and replies that are heard late because it was busy with them.

use super::*;

/// A late frame is not computed by whoever waits for it; a lost one is.
#[test]
fn experts_inside_take_over_what_is_lost_and_not_what_is_late() {
    let mut case = Case::warm(&[("a", &[0, 1, 2, 3])]);
    let mut members = Members::default();
    members.join(holder("a", &[0, 1, 2, 3], 7)).unwrap();
    let (mut flight, orders) = case.launch(EXACT);
    assert_eq!(orders.len(), 1);
    let here = cluster::Holder { inside: true, ..holder("here", &[0, 1, 2, 3], 7) };
    case.table = members.join(here).unwrap();
    case.health.follow(case.table.holders().map(|holder| &holder.instance), case.now);
    case.now += Duration::from_millis(100);
    assert!(flight.tick(&mut case.around()).is_empty());
    // Silent, whether it can be ejected or not.
    case.now += Duration::from_millis(300);
    let orders = flight.tick(&mut case.around());
    let holders: Vec<_> = orders.iter().map(|order| order.holder.as_str()).collect();
    assert_eq!(holders, ["here"]);
    assert!(flight.waits_for(orders[0].frame.id));
    case.land(&mut flight, &orders);
    assert!(flight.is_home() && !flight.waits_for(orders[0].frame.id));

    let (mut flight, mut orders) = case.launch(EXACT);
    orders.retain(|order| order.holder.as_str() != "a");
    let gone = Error::new(Code::Unavailable, "link_down", "gone");
    orders.extend(flight.lose_holder(&"a".into(), &gone, &mut case.around()));
    assert!(orders.iter().all(|order| order.holder.as_str() == "here"));
    case.land(&mut flight, &orders);
    assert!(flight.is_home());
}

/// What is ordered because of a reply that lay there for long is not late itself.
#[test]
fn frames_are_as_old_as_their_order() {
    let mut case = Case::warm(&[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2, 3])]);
    let (mut flight, orders) = case.launch(EXACT);
    let failed = Err(Error::internal("broken".to_owned()));
    let Frame { id, epoch, weights, .. } = orders[0].frame;
    let reply = Reply { id, epoch, weights, outcome: failed };
    case.now += Duration::from_secs(1);
    let mut around = case.around();
    around.heard_at = around.now - Duration::from_secs(1);
    let more = flight.accept(&orders[0].holder, reply, &mut around).unwrap();
    assert_eq!(more.len(), 1);
    let asked_again =
        flight.log.attempts.iter().rev().find(|attempt| attempt.kind == Kind::Failover).unwrap();
    assert_eq!(asked_again.sent_at, case.now);
}
