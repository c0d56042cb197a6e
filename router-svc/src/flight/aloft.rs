//! The flights in the air: one, or one of each half-batch. What the links say is told to those whom it concerns.

use std::time::Instant;

use ids::{FrameId, InstanceId};
use proto::{Code, Error, Reply, frame::Combine};

use super::{Flight, Landed, Order, Surroundings, note_late};
use crate::dispatch::Activations;

#[derive(Debug, Default)]
pub(crate) struct Aloft {
    flights: Vec<(u64, Flight)>,
    n_launched: u64,
}

/// For the one who launched a flight: it lands once.
#[derive(Debug)]
#[must_use = "rows of a flight that never lands are lost"]
pub(crate) struct Ticket(u64);

impl Aloft {
    /// Orders the frames for `rows` of the activations.
    pub(crate) fn launch(
        &mut self,
        activations: Activations,
        rows: impl IntoIterator<Item = usize>,
        combine: Combine,
        around: &mut Surroundings<'_>,
    ) -> (Ticket, Vec<Order>) {
        let (flight, orders) = Flight::launch(activations, rows, combine, around);
        self.n_launched += 1;
        self.flights.push((self.n_launched, flight));
        (Ticket(self.n_launched), orders)
    }

    fn index(&self, ticket: &Ticket) -> usize {
        let found = self.flights.iter().position(|(of, _)| *of == ticket.0);
        found.unwrap_or_else(|| unreachable!("a ticket ends with its flight"))
    }

    pub(crate) fn activations(&self, ticket: &Ticket) -> &Activations {
        self.flights[self.index(ticket)].1.activations()
    }

    /// True once this flight waits for nothing.
    pub(crate) fn is_home(&self, ticket: &Ticket) -> bool {
        self.flights[self.index(ticket)].1.is_home()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// True if another flight is in the air too.
    pub(crate) fn has_others(&self, than: &Ticket) -> bool {
        self.flights.iter().any(|(of, _)| *of != than.0)
    }

    /// Ends the flight. Whatever is still outstanding counts as lost.
    pub(crate) fn land(&mut self, ticket: Ticket) -> Landed {
        self.flights.remove(self.index(&ticket)).1.land()
    }

    /// True if the reply to this frame would be used.
    pub(crate) fn waits_for(&self, frame: FrameId) -> bool {
        self.flights.iter().any(|(_, flight)| flight.waits_for(frame))
    }

    /// Takes a reply of `holder`; gives the frames that it makes necessary.
    pub(crate) fn accept(
        &mut self,
        holder: &InstanceId,
        reply: Reply,
        around: &mut Surroundings<'_>,
    ) -> Vec<Order> {
        let damaged = matches!(&reply.outcome, Err(error) if &*error.reason == "checksum_mismatch");
        match self.flights.iter_mut().find(|(_, flight)| flight.frames.contains_key(&reply.id)) {
            Some((_, flight)) => {
                if let Some(orders) = flight.accept(holder, reply, around) {
                    return orders;
                }
            }
            None => note_late(holder, &reply, around),
        }
        if !damaged {
            return Vec::new();
        }
        // The id, too, may be what was damaged: no frame on that way can be trusted to have arrived.
        let error = Error::new(Code::Unavailable, "checksum_mismatch", "a frame arrived damaged");
        self.lose_holder(holder, &error, around)
    }

    /// `holder` is gone: its frames go to others.
    pub(crate) fn lose_holder(
        &mut self,
        holder: &InstanceId,
        error: &Error,
        around: &mut Surroundings<'_>,
    ) -> Vec<Order> {
        self.of_each(|flight| flight.lose_holder(holder, error, around))
    }

    /// [`Flight::look_again`] of each.
    pub(crate) fn look_again(&mut self, around: &mut Surroundings<'_>) -> Vec<Order> {
        self.of_each(|flight| flight.look_again(around))
    }

    /// Ejects who is silent, hedges what is late and fails what is overdue.
    pub(crate) fn tick(&mut self, around: &mut Surroundings<'_>) -> Vec<Order> {
        for instance in around.health.tick(around.now) {
            tracing::warn!(%instance, "expert server is silent: ejected");
            for (_, flight) in &mut self.flights {
                flight.note_ejection(&instance, "silent", around.now);
            }
        }
        self.of_each(|flight| flight.tick(around))
    }

    /// The next moment at which [`Aloft::tick`] has something to do for a flight.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        self.flights.iter().filter_map(|(_, flight)| flight.next_tick()).min()
    }

    fn of_each(&mut self, decide: impl FnMut(&mut Flight) -> Vec<Order>) -> Vec<Order> {
        self.flights.iter_mut().map(|(_, flight)| flight).flat_map(decide).collect()
    }

    #[cfg(test)]
    pub(crate) fn flight(&self, ticket: &Ticket) -> &Flight {
        &self.flights[self.index(ticket)].1
    }
}

#[cfg(test)]
mod tests {
    use cluster::Health;

    use super::*;
    use crate::{
        dispatch::tests::{activations, any_instant, table},
        flight::{Counts, FrameIds, tests::serve},
    };

    #[test]
    fn what_a_link_says_is_told_to_whom_it_concerns() {
        let (table, now) = (table(&[("a", &[0, 1]), ("b", &[0, 1])]), any_instant());
        let mut health = Health::new(cluster::health::Limits::default());
        health.follow(table.holders().map(|holder| &holder.instance), now);
        let (mut ids, mut counts) = (FrameIds::default(), Counts::default());
        let dispatch_timeout = std::time::Duration::from_secs(30);
        macro_rules! around {
            () => {
                &mut Surroundings {
                    table: &table,
                    health: &mut health,
                    ids: &mut ids,
                    counts: &mut counts,
                    now,
                    heard_at: now,
                    dispatch_timeout,
                }
            };
        }
        let mut aloft = Aloft::default();
        let (first, of_first) = aloft.launch(activations(&[0, 1]), 0..1, Combine::Fast, around!());
        let (second, of_second) = aloft.launch(activations(&[1, 0]), 0..1, Combine::Fast, around!());
        // The second one's come first.
        for order in &of_second {
            assert!(aloft.waits_for(order.frame.id));
            let reply = serve(&order.frame, f32::MAX);
            assert!(aloft.accept(&order.holder, reply, around!()).is_empty());
        }
        assert!(aloft.is_home(&second) && !aloft.is_home(&first));
        let landed = aloft.land(second);
        assert!(landed.lost.is_empty());
        // Its doubled replies are nobody's.
        for order in &of_second {
            assert!(aloft.accept(&order.holder, serve(&order.frame, f32::MAX), around!()).is_empty());
        }
        assert!(!aloft.is_home(&first));
        // Whichever frame was damaged: all that its holder owes is asked of others, for every flight.
        let (third, of_third) = aloft.launch(activations(&[0, 1]), 0..1, Combine::Fast, around!());
        let holder = &of_first[0].holder.clone();
        let owed = of_first.iter().chain(&of_third).filter(|order| order.holder == *holder).count();
        let error = Error::new(Code::Unavailable, "checksum_mismatch", "damaged");
        let damaged =
            Reply { id: FrameId(u64::MAX), outcome: Err(error), ..serve(&of_first[0].frame, f32::MAX) };
        let again = aloft.accept(holder, damaged, around!());
        assert!(again.len() == owed && again.iter().all(|order| order.holder != *holder), "{again:?}");
        let rest = of_first.into_iter().chain(of_third).filter(|order| order.holder != *holder);
        for order in rest.chain(again) {
            let reply = serve(&order.frame, f32::MAX);
            assert!(aloft.accept(&order.holder, reply, around!()).is_empty());
        }
        for ticket in [first, third] {
            assert!(aloft.is_home(&ticket));
            assert!(aloft.land(ticket).lost.is_empty());
        }
        assert!(aloft.next_tick().is_none());
    }
}
