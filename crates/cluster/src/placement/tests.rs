use proptest::prelude::*;

use super::*;

/// A cluster whose servers do at once what they are told.
#[derive(Debug)]
struct Bench {
    goal: Goal,
    machines: Vec<Machine>,
}

fn machine(name: &str) -> Machine {
    Machine {
        instance: name.into(),
        usable: true,
        holds: Holds::default(),
        pinned: Holds::default(),
        wanted: Holds::default(),
        memory_bytes_max: 1 << 40,
        expert_bytes: 1000,
    }
}

impl Bench {
    fn new(names: &[&str], replicas: usize) -> Self {
        let goal = Goal { layers: (1..4).map(LayerId).collect(), n_experts: 16, replicas };
        Self { goal, machines: names.iter().map(|name| machine(name)).collect() }
    }

    fn step(&mut self) -> Urgency {
        let (mut wanted, urgency) = next(&self.goal, &self.machines);
        for machine in &mut self.machines {
            machine.wanted = wanted.remove(&machine.instance).unwrap();
            if machine.usable {
                machine.holds = machine.wanted.iter().chain(machine.pinned.iter()).collect();
            }
        }
        urgency
    }

    /// Steps until nothing is to do; gives the most urgent step. Every step keeps what was held by anybody.
    fn settle(&mut self) -> Urgency {
        let mut most = Urgency::None;
        for _ in 0..20 {
            let before = self.orphans();
            let urgency = self.step();
            assert!(self.orphans() <= before);
            if urgency == Urgency::None {
                return most;
            }
            if most == Urgency::None || urgency == Urgency::Orphans {
                most = urgency;
            }
        }
        panic!("twenty steps do not settle it: {:?}", self.loads());
    }

    fn n_holders(&self, (layer, expert): (LayerId, ExpertId)) -> usize {
        let holds = |machine: &&Machine| machine.usable && machine.holds.contains(layer, expert);
        self.machines.iter().filter(holds).count()
    }

    fn orphans(&self) -> usize {
        self.goal.pairs().filter(|&pair| self.n_holders(pair) == 0).count()
    }

    fn loads(&self) -> Vec<usize> {
        self.machines.iter().map(|machine| machine.holds.len()).collect()
    }

    #[track_caller]
    fn check_replicas(&self, replicas: usize) {
        assert!(self.goal.pairs().all(|pair| self.n_holders(pair) == replicas), "{:?}", self.loads());
    }
}

#[test]
fn empty_servers_share_everything() {
    let mut bench = Bench::new(&["a", "b", "c", "d"], 2);
    assert_eq!(bench.settle(), Urgency::Orphans);
    assert_eq!(bench.loads(), [24; 4]);
    bench.check_replicas(2);
    // a mirrors b, c mirrors d.
    assert_eq!(bench.machines[0].holds, bench.machines[1].holds);
}

#[test]
fn a_dead_servers_experts_go_to_the_others_and_to_a_spare() {
    let mut bench = Bench::new(&["a", "b", "c", "d"], 2);
    bench.settle();
    bench.machines.remove(0);
    assert_eq!(bench.settle(), Urgency::Replicas);
    assert_eq!(bench.loads(), [32; 3]);
    bench.machines.push(machine("e"));
    assert_eq!(bench.settle(), Urgency::Balance);
    assert_eq!(bench.loads(), [24; 4]);
    bench.check_replicas(2);
}

#[test]
fn two_servers_become_four_and_two_again() {
    let mut bench = Bench::new(&["a", "b"], 2);
    bench.settle();
    bench.machines.extend([machine("c"), machine("d")]);
    bench.settle();
    assert_eq!(bench.loads(), [24; 4]);
    // Two say that they will leave: their experts go back first.
    bench.machines[0].usable = false;
    bench.machines[1].usable = false;
    bench.settle();
    bench.check_replicas(2);
}

#[test]
fn what_is_pinned_stays_and_counts() {
    let mut bench = Bench::new(&["a", "b"], 1);
    bench.machines[0].pinned = "1-3:0-15".parse().unwrap();
    bench.settle();
    assert_eq!(bench.loads(), [48, 0], "a was told to hold all of them");
    bench.goal.replicas = 2;
    bench.settle();
    assert_eq!(bench.loads(), [48, 48]);
}

#[test]
fn memory_is_a_limit_and_no_expert_comes_second_before_every_one_has_a_holder() {
    let mut bench = Bench::new(&["a", "b"], 2);
    for machine in &mut bench.machines {
        machine.memory_bytes_max = 30_000;
    }
    bench.settle();
    assert_eq!(bench.loads(), [30, 30]);
    assert_eq!(bench.orphans(), 0);
}

#[test]
fn an_unusable_server_keeps_what_it_was_given() {
    let mut bench = Bench::new(&["a", "b", "c"], 1);
    bench.settle();
    let held = bench.machines[0].wanted.clone();
    bench.machines[0].usable = false;
    assert_eq!(bench.settle(), Urgency::Orphans);
    assert_eq!(bench.machines[0].wanted, held);
    bench.machines[0].usable = true;
    bench.settle();
    bench.check_replicas(1);
}

proptest! {
    /// Servers come, go and return in any order: it always settles, equal and complete.
    #[test]
    fn any_history_settles(events in proptest::collection::vec((0_u8..3, 0_usize..6), 1..12), replicas in 1_usize..4) {
        let mut bench = Bench::new(&["m0", "m1"], replicas);
        let mut next_name = 2;
        for (event, which) in events {
            match event {
                0 => {
                    bench.machines.push(machine(&format!("m{next_name}")));
                    next_name += 1;
                }
                1 if bench.machines.len() > 1 => {
                    let at = which % bench.machines.len();
                    bench.machines.remove(at);
                }
                _ => {
                    let at = which % bench.machines.len();
                    bench.machines[at].usable = !bench.machines[at].usable;
                }
            }
            bench.settle();
            let usable: Vec<usize> =
                bench.machines.iter().filter(|machine| machine.usable).map(|machine| machine.holds.len()).collect();
            if let (Some(min), Some(max)) = (usable.iter().min(), usable.iter().max()) {
                prop_assert!(max - min <= 1, "{usable:?}");
                bench.check_replicas(replicas.min(usable.len()));
            }
        }
    }
}
