//! One suite over both kinds of registry, the etcd kind on real etcd processes; and what only etcd can go through.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests are tests: they stop at what must not be, and say what was skipped"
)]

mod etcd;

use std::{sync::Arc, time::Duration};

use cluster::{
    Holdings, Member, Membership, Placement, Record, Refused, Registry, Role, Session, State, Term,
};
use etcd::Etcd;
use ids::Version;
use telemetry::Tasks;
use tokio::sync::watch;

/// Far longer than anything here takes on two busy cores.
const DEADLINE: Duration = Duration::from_secs(40);

/// A process of a cluster.
struct Peer {
    session: Session,
    tasks: Tasks,
}

impl Peer {
    fn new(url: &str) -> Self {
        let tasks = Tasks::new();
        let registry: Registry = url.parse().unwrap();
        Self { session: Session::open(&registry, &tasks).unwrap(), tasks }
    }

    /// Dies without a word: its lease ends by itself.
    async fn die(self) {
        self.tasks.begin_shutdown();
        assert!(self.tasks.join(DEADLINE).await, "its tasks end");
    }
}

fn record(name: &str, state: State) -> Record {
    Record {
        instance: name.into(),
        address: format!("{name}:1"),
        state,
        checkpoint: "c".into(),
        wire_version: 2,
        version: "0".into(),
        holdings: Some(Holdings { holds: "1-3:0-15".parse().unwrap(), ..Holdings::default() }),
    }
}

type Members = watch::Receiver<Arc<Membership>>;

/// Waits for exactly these members, each with its state.
async fn see(members: &mut Members, expected: &[(&str, State)]) {
    let expected: Vec<(String, Option<State>)> =
        expected.iter().map(|&(name, state)| (name.to_owned(), Some(state))).collect();
    let list = |membership: &Membership| -> Vec<(String, Option<State>)> {
        let state = |member: &Member| member.record.as_ref().map(|record| record.state);
        membership.members.iter().map(|(key, member)| (key.clone(), state(member))).collect()
    };
    let seen = tokio::time::timeout(
        DEADLINE,
        members.wait_for(|membership| membership.revision > 0 && list(membership) == expected),
    );
    if seen.await.is_err() {
        panic!("not {expected:?} but {:?}", list(&members.borrow()));
    }
}

async fn term(term: &mut watch::Receiver<Option<Term>>) -> Term {
    let leads = tokio::time::timeout(DEADLINE, term.wait_for(Option::is_some));
    leads.await.expect("it leads").unwrap().clone().unwrap()
}

fn placement(version: u64) -> Placement {
    Placement { version: Version(version), leader: "r".into(), wanted: std::collections::BTreeMap::new() }
}

/// What every kind of registry must do.
async fn conforms(url: &str, is_dynamic: bool) {
    let peer = Peer::new(url);
    assert_eq!(peer.session.is_dynamic(), is_dynamic);
    let announcement = peer.session.announce(Role::Expert, record("a", State::Loading));
    announcement.update(record("a", State::Ready));
    let mut members = peer.session.members(Role::Expert);
    let heard = tokio::time::timeout(
        DEADLINE,
        members.wait_for(|membership| membership.revision > 0 && !membership.members.is_empty()),
    );
    heard.await.expect("somebody is there").unwrap();
    assert!(peer.session.placement().borrow().is_none());
    let mut leads = peer.session.campaign("r".into());
    let proposed = if is_dynamic {
        let term = term(&mut leads).await;
        peer.session.propose(&term, Version(0), placement(1)).await
    } else {
        assert!(leads.borrow().is_none(), "a static list has no leader");
        peer.session.propose(&Term { revision: 1 }, Version(0), placement(1)).await
    };
    assert_eq!(proposed, if is_dynamic { Ok(()) } else { Err(Refused::NotLeader) });
    tokio::time::timeout(DEADLINE, announcement.revoke()).await.expect("leaving takes no time");
    peer.die().await;
}

#[tokio::test]
async fn a_static_list_conforms() {
    conforms("static://a:1,b:2", false).await;
}

#[tokio::test]
async fn etcd_conforms() {
    let Some(etcd) = Etcd::start(&[]).await else { return };
    conforms(&etcd.url(), true).await;
}

#[tokio::test]
async fn members_come_change_and_go() {
    let Some(etcd) = Etcd::start(&[]).await else { return };
    let (a, b, watcher) = (Peer::new(&etcd.url()), Peer::new(&etcd.url()), Peer::new(&etcd.url()));
    let mut members = watcher.session.members(Role::Expert);
    see(&mut members, &[]).await;
    let of_a = a.session.announce(Role::Expert, record("a", State::Loading));
    let _of_b = b.session.announce(Role::Expert, record("b", State::Ready));
    see(&mut members, &[("a", State::Loading), ("b", State::Ready)]).await;
    of_a.update(record("a", State::Ready));
    see(&mut members, &[("a", State::Ready), ("b", State::Ready)]).await;
    assert!(watcher.session.members(Role::Router).borrow().members.is_empty(), "another folder");
    of_a.revoke().await;
    see(&mut members, &[("b", State::Ready)]).await;
    b.die().await;
    see(&mut members, &[]).await;
    let routers = watcher.session.announce(Role::Router, record("r", State::Ready));
    see(&mut watcher.session.members(Role::Router), &[("r", State::Ready)]).await;
    routers.revoke().await;
}

/// public-faults B22: etcd away for less and for more than a lease, and back with its data or without.
async fn check_outage(seconds: u64, wiped: bool) {
    let Some(mut etcd) = Etcd::start(&[]).await else { return };
    let (a, b) = (Peer::new(&etcd.url()), Peer::new(&etcd.url()));
    let mut members = a.session.members(Role::Expert);
    let _of_a = a.session.announce(Role::Expert, record("a", State::Ready));
    let of_b = b.session.announce(Role::Expert, record("b", State::Ready));
    let both = [("a", State::Ready), ("b", State::Ready)];
    see(&mut members, &both).await;
    etcd.stop();
    let watched = members.clone();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    assert_eq!(watched.borrow().members.len(), 2, "an outage takes nobody");
    if wiped {
        etcd.wipe();
    }
    etcd.up().await;
    // Each exactly once, as etcd itself says.
    etcd.wait_for_keys("/shoal/experts/", &["a", "b"], DEADLINE).await;
    see(&mut members, &both).await;
    // And they are alive: a change comes through.
    of_b.update(record("b", State::Draining));
    see(&mut members, &[("a", State::Ready), ("b", State::Draining)]).await;
}

#[tokio::test]
async fn a_short_outage_is_not_noticed() {
    check_outage(1, false).await;
}

#[tokio::test]
async fn after_an_outage_longer_than_the_leases_everybody_is_back() {
    check_outage(6, false).await;
}

#[tokio::test]
async fn after_data_loss_everybody_registers_again() {
    check_outage(3, true).await;
}

#[tokio::test]
async fn who_is_deleted_or_loses_its_lease_by_hand_registers_again() {
    let Some(etcd) = Etcd::start(&[]).await else { return };
    let peer = Peer::new(&etcd.url());
    let _announcement = peer.session.announce(Role::Expert, record("a", State::Ready));
    let key = "/shoal/experts/a";
    for by_lease in [false, true] {
        etcd.wait_for_keys("/shoal/experts/", &["a"], DEADLINE).await;
        let mut client = etcd.client().await;
        let before = client.get(key, None).await.unwrap().kvs()[0].clone();
        if by_lease {
            client.lease_revoke(before.lease()).await.unwrap();
        } else {
            client.delete(key, None).await.unwrap();
        }
        etcd.wait_for_keys("/shoal/experts/", &["a"], DEADLINE).await;
        let after = client.get(key, None).await.unwrap().kvs()[0].clone();
        assert_eq!(after.lease() == before.lease(), !by_lease, "a revoked lease is not put with again");
    }
}

#[tokio::test]
async fn a_compacted_history_is_listed_again() {
    let Some(mut etcd) = Etcd::start(&[]).await else { return };
    let (watcher, peer) = (Peer::new(&etcd.url()), Peer::new(&etcd.url()));
    let mut members = watcher.session.members(Role::Expert);
    let announcement = peer.session.announce(Role::Expert, record("a", State::Ready));
    see(&mut members, &[("a", State::Ready)]).await;
    etcd.stop();
    etcd.up().await;
    let mut client = etcd.client().await;
    for at in 0..50 {
        client.put("/elsewhere", at.to_string(), None).await.unwrap();
    }
    let revision = client.get("/elsewhere", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    announcement.update(record("a", State::Draining));
    see(&mut members, &[("a", State::Draining)]).await;
}

#[tokio::test]
async fn what_cannot_be_read_is_ignored() {
    let Some(etcd) = Etcd::start(&[]).await else { return };
    let peer = Peer::new(&etcd.url());
    let mut client = etcd.client().await;
    client.put("/shoal/experts/broken", "{", None).await.unwrap();
    let stolen = serde_json::to_vec(&record("a", State::Ready)).unwrap();
    client.put("/shoal/experts/somebody", stolen, None).await.unwrap();
    let _announcement = peer.session.announce(Role::Expert, record("a", State::Ready));
    see(&mut peer.session.members(Role::Expert), &[("a", State::Ready)]).await;
}

#[tokio::test]
async fn one_leads_and_another_takes_over_and_the_old_term_counts_no_more() {
    let Some(etcd) = Etcd::start(&[]).await else { return };
    let first = Peer::new(&etcd.url());
    let mut leads = first.session.campaign("r1".into());
    let old = term(&mut leads).await;
    let second = Peer::new(&etcd.url());
    let mut waits = second.session.campaign("r2".into());
    assert_eq!(first.session.propose(&old, Version(0), placement(1)).await, Ok(()));
    let mut placed = second.session.placement();
    let heard = tokio::time::timeout(DEADLINE, placed.wait_for(Option::is_some)).await;
    assert_eq!(heard.unwrap().unwrap().as_ref().unwrap().version, Version(1));
    assert!(waits.borrow().is_none());
    // Its own view has to follow before it can write on.
    let mut own = first.session.placement();
    tokio::time::timeout(DEADLINE, own.wait_for(Option::is_some)).await.unwrap().unwrap();
    assert_eq!(first.session.propose(&old, Version(0), placement(2)).await, Err(Refused::Conflict));
    assert_eq!(
        first.session.propose(&old, Version(1), placement(1)).await,
        Err(Refused::Conflict),
        "not newer"
    );
    first.die().await;
    let new = term(&mut waits).await;
    assert!(new.revision > old.revision);
    assert_eq!(second.session.propose(&old, Version(1), placement(2)).await, Err(Refused::NotLeader));
    assert_eq!(second.session.propose(&new, Version(1), placement(2)).await, Ok(()));
    etcd.wait_for_keys("/shoal/", &["leader", "placement"], DEADLINE).await;
}

#[tokio::test]
async fn a_leader_that_cannot_reach_etcd_steps_down_by_itself() {
    let Some(mut etcd) = Etcd::start(&[]).await else { return };
    let peer = Peer::new(&etcd.url());
    let mut leads = peer.session.campaign("r".into());
    let old = term(&mut leads).await;
    etcd.stop();
    tokio::time::timeout(DEADLINE, leads.wait_for(Option::is_none)).await.expect("it steps down").unwrap();
    let refused = peer.session.propose(&old, Version(0), placement(1)).await;
    assert!(matches!(refused, Err(Refused::Unreachable(_))), "{refused:?}");
    etcd.up().await;
    term(&mut leads).await;
}

#[tokio::test]
async fn users_and_passwords() {
    let Some(etcd) = Etcd::start(&[]).await else { return };
    let mut client = etcd.client().await;
    client.user_add("root", "s3cret", None).await.unwrap();
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.auth_enable().await.unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "s3cret\n").unwrap();
    let url = format!("{}&user=root&password-file={}", etcd.url(), file.path().display());
    let peer = Peer::new(&url);
    let _announcement = peer.session.announce(Role::Expert, record("a", State::Ready));
    see(&mut peer.session.members(Role::Expert), &[("a", State::Ready)]).await;
    let missing: Registry = format!("{}&user=root&password-file=/nowhere", etcd.url()).parse().unwrap();
    let error = Session::open(&missing, &Tasks::new()).err().expect("there is no such file");
    assert!(error.to_string().contains("password-file: /nowhere"), "{error}");
}

#[tokio::test]
async fn tls_with_certificates_on_both_sides() {
    let files = etcd::Certificates::make();
    let Some(etcd) = Etcd::start(&files.flags()).await else { return };
    let url = format!("{}&{}", etcd.url(), files.options());
    let peer = Peer::new(&url);
    let _announcement = peer.session.announce(Role::Expert, record("a", State::Ready));
    see(&mut peer.session.members(Role::Expert), &[("a", State::Ready)]).await;
}
