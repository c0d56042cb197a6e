//! When this instance is missed no more.

use std::sync::Arc;

use cluster::{Membership, Record, Role, Session, State};
use tokio::sync::watch;

use crate::presence::Presence;

/// Whether every expert that `own` holds is held by another instance too, which is ready, of the same checkpoint and
/// over the same wire version.
pub(crate) fn may_leave(own: &Record, experts: &Membership) -> bool {
    let others: Vec<_> = experts
        .members
        .values()
        .filter_map(|member| member.record.as_ref())
        .filter(|record| record.instance != own.instance && record.state == State::Ready)
        .filter(|record| record.checkpoint == own.checkpoint && record.wire_version == own.wire_version)
        .filter_map(|record| record.holdings.as_ref())
        .collect();
    own.holdings.as_ref().is_none_or(|own| {
        own.holds
            .iter()
            .all(|(layer, expert)| others.iter().any(|holdings| holdings.holds.contains(layer, expert)))
    })
}

/// Nobody is left who would send a frame. Before anything was heard of the routers, there may be some.
fn is_unused(routers: &Membership) -> bool {
    routers.revision > 0 && routers.members.is_empty()
}

/// Waits until no router is registered or until others hold what `presence` does.
pub(crate) async fn handed_over(session: &Session, presence: &Presence) {
    wait(session.members(Role::Router), session.members(Role::Expert), &presence.record()).await;
}

async fn wait(
    mut routers: watch::Receiver<Arc<Membership>>,
    mut experts: watch::Receiver<Arc<Membership>>,
    own: &Record,
) {
    while !is_unused(&routers.borrow_and_update()) && !may_leave(own, &experts.borrow_and_update()) {
        let changed = tokio::select! {
            changed = routers.changed() => changed,
            changed = experts.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cluster::{Holdings, Member};
    use futures_util::FutureExt as _;

    use super::*;

    fn record(instance: &str, state: State, holds: &str) -> Record {
        Record {
            instance: instance.into(),
            address: format!("{instance}:1"),
            state,
            checkpoint: "minnow".to_owned(),
            wire_version: 2,
            version: "0.0.0".to_owned(),
            holdings: Some(Holdings { holds: holds.parse().unwrap(), ..Holdings::default() }),
        }
    }

    fn membership(records: &[Record]) -> Membership {
        let member = |record: &Record| {
            let member = Member { address: record.address.clone(), record: Some(record.clone()) };
            (record.instance.to_string(), member)
        };
        Membership { revision: 7, members: records.iter().map(member).collect() }
    }

    #[test]
    fn an_instance_may_leave_when_others_hold_what_it_holds() {
        let own = record("own", State::Draining, "1-2:0-3");
        let check = |others: &[Record], expected| {
            let mut all = vec![own.clone(), record("own", State::Ready, "1-2:0-3")];
            all.extend_from_slice(others);
            assert_eq!(may_leave(&own, &membership(&all)), expected, "{others:?}");
        };
        check(&[], false);
        check(&[record("a", State::Ready, "1-2:0-3")], true);
        check(&[record("a", State::Ready, "1-2:0-2")], false);
        check(&[record("a", State::Ready, "1-2:0-2"), record("b", State::Ready, "1-2:3;4:9")], true);
        check(&[record("a", State::Loading, "1-2:0-3")], false);
        check(&[record("a", State::Draining, "1-2:0-3")], false);
        check(&[Record { checkpoint: "other".to_owned(), ..record("a", State::Ready, "1-2:0-3") }], false);
        check(&[Record { wire_version: 1, ..record("a", State::Ready, "1-2:0-3") }], false);
        check(&[Record { holdings: None, ..record("a", State::Ready, "") }], false);
        let nothing = record("own", State::Draining, "");
        assert!(may_leave(&nothing, &Membership::default()), "what holds nothing is missed by nobody");
    }

    #[tokio::test]
    async fn a_handover_ends_with_the_last_router_or_when_others_hold_the_experts() {
        let own = record("own", State::Draining, "1:0-3");
        let channels = || {
            let (say_routers, routers) = watch::channel(Arc::new(Membership::default()));
            let (say_experts, experts) = watch::channel(Arc::new(membership(&[])));
            (say_routers, routers, say_experts, experts)
        };
        let router = Arc::new(membership(&[record("router", State::Ready, "")]));
        let soon = Duration::from_secs(60);

        let (say_routers, routers, _experts, experts) = channels();
        let mut waiting = Box::pin(wait(routers, experts, &own));
        assert!((&mut waiting).now_or_never().is_none(), "nothing is known of the routers");
        say_routers.send_replace(Arc::clone(&router));
        assert!((&mut waiting).now_or_never().is_none(), "a router may need it");
        say_routers.send_replace(Arc::new(membership(&[])));
        tokio::time::timeout(soon, waiting).await.unwrap();

        let (say_routers, routers, say_experts, experts) = channels();
        say_routers.send_replace(router);
        let mut waiting = Box::pin(wait(routers, experts, &own));
        assert!((&mut waiting).now_or_never().is_none());
        say_experts.send_replace(Arc::new(membership(&[record("a", State::Loading, "1:0-3")])));
        assert!((&mut waiting).now_or_never().is_none());
        say_experts.send_replace(Arc::new(membership(&[record("a", State::Ready, "1:0-3")])));
        tokio::time::timeout(soon, waiting).await.unwrap();
    }
}
