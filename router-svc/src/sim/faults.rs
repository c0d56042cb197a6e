//! The network between the router and each server, and what goes wrong.

use std::time::Duration;

use proto::{Frame, Reply};

use super::{
    FAULTS,
    world::{Event, World},
};

#[derive(Debug)]
pub(super) struct Network {
    /// The link of the moment, by server; 0: none.
    links: Vec<u64>,
    n_links: u64,
    pub(super) passes_to: Vec<bool>,
    pub(super) passes_from: Vec<bool>,
    /// Loses, doubles and reorders messages.
    lossy: Vec<bool>,
    /// Links on which everything is lost in that direction, although they live: a damaged length, say.
    swallows_to: Vec<u64>,
    swallows_from: Vec<u64>,
}

/// How long a link that carries nothing lives: the keepalive of the real one.
const KEEPALIVE: Duration = Duration::from_secs(3);

impl Network {
    pub(super) fn new(n_servers: usize) -> Self {
        let all = |value| vec![value; n_servers];
        Self {
            links: vec![0; n_servers],
            n_links: 0,
            passes_to: all(true),
            passes_from: all(true),
            lossy: all(false),
            swallows_to: vec![0; n_servers],
            swallows_from: vec![0; n_servers],
        }
    }

    pub(super) fn is_link(&self, server: usize, link: u64) -> bool {
        link != 0 && self.links[server] == link
    }

    pub(super) fn link_of(&self, server: usize) -> u64 {
        self.links[server]
    }

    pub(super) fn make(&mut self, server: usize) -> u64 {
        self.n_links += 1;
        self.links[server] = self.n_links;
        self.n_links
    }

    pub(super) fn swallows_frame(&self, server: usize, link: u64) -> bool {
        self.swallows_to[server] == link
    }

    pub(super) fn swallows_reply(&self, server: usize, link: u64) -> bool {
        self.swallows_from[server] == link
    }

    /// One is found after the other, each after a dispatch timeout: with several, there is no saying by when.
    fn any_swallows(&self) -> bool {
        let mut swallows = self.swallows_to.iter().zip(&self.swallows_from).zip(&self.links);
        swallows.any(|((to, from), link)| *link != 0 && (to == link || from == link))
    }

    pub(super) fn unmake(&mut self, server: usize) {
        self.links[server] = 0;
    }
}

impl World {
    /// How often a message arrives, and when.
    fn arrivals(&mut self, server: usize) -> Vec<Duration> {
        let delay = self.dice.micros(20, 150);
        if !self.network.lossy[server] {
            return vec![delay];
        }
        match self.dice.below(10) {
            0 => Vec::new(),
            1 => vec![delay, delay + self.dice.micros(1, 5000)],
            2 => vec![delay + self.dice.micros(1, 20_000)],
            _ => vec![delay],
        }
    }

    pub(super) fn carry_frame(&mut self, server: usize, frame: Frame) {
        let link = self.network.link_of(server);
        for delay in self.arrivals(server) {
            self.after(delay, Event::FrameArrives { server, link, frame: Box::new(frame.clone()) });
        }
    }

    pub(super) fn carry_reply(&mut self, server: usize, link: u64, reply: Reply, took: Duration) {
        for delay in self.arrivals(server) {
            self.after(took + delay, Event::ReplyArrives { server, link, reply: Box::new(reply.clone()) });
        }
    }

    /// A random fault, and when the next one comes.
    pub(super) fn fault(&mut self) {
        if self.is_mended() {
            return self.mend_everything();
        }
        let (server, lasts) = (self.dice.below(self.servers.len()), self.dice.micros(1_000, 400_000));
        let what = [
            "crash",
            "crash",
            "freeze",
            "cut to",
            "cut from",
            "cut",
            "lossy",
            "slow",
            "nan",
            "stale",
            "break",
            "registry",
            "data loss",
            "leader",
            "swallow to",
            "swallow from",
        ][self.dice.below(16)];
        self.n_faults += 1;
        self.note(|| format!("fault: {what} s{server} for {lasts:?}"));
        let state = &mut self.servers[server];
        match what {
            "crash" if state.is_up => {
                state.is_up = false;
                self.lose_lease(server);
                // The system closes its sockets, unless the machine is gone with it.
                let link = self.network.link_of(server);
                let notice = if self.dice.chance(80) { self.dice.micros(20, 2000) } else { KEEPALIVE };
                self.after(notice, Event::LinkBreaks { server, link });
                self.after(lasts, Event::Restart { server });
            }
            "freeze" => state.frozen = true,
            "cut to" => self.network.passes_to[server] = false,
            "cut from" => self.network.passes_from[server] = false,
            "cut" => {
                self.network.passes_to[server] = false;
                self.network.passes_from[server] = false;
            }
            "lossy" => self.network.lossy[server] = true,
            "slow" => state.slow = 20,
            "nan" => state.answers_nan = true,
            "stale" => state.answers_stale = true,
            "break" => {
                let link = self.network.link_of(server);
                self.after(Duration::from_micros(10), Event::LinkBreaks { server, link });
            }
            // Until the router makes it again: nothing mends it.
            "swallow to" | "swallow from" if self.network.any_swallows() => {}
            "swallow to" => self.network.swallows_to[server] = self.network.link_of(server),
            "swallow from" => self.network.swallows_from[server] = self.network.link_of(server),
            "registry" => self.registry.is_up = false,
            "data loss" => self.lose_data(),
            "leader" => self.change_leader(),
            _ => {}
        }
        if matches!(what, "freeze" | "cut to" | "cut from" | "cut") {
            let link = self.network.link_of(server);
            self.after(KEEPALIVE.max(lasts), Event::Mend { server, what });
            // Nobody answers the pings: the link is given up, whatever becomes of the server.
            if lasts > KEEPALIVE / 10 {
                self.after(KEEPALIVE, Event::LinkBreaks { server, link });
            }
        } else {
            self.after(lasts, Event::Mend { server, what });
        }
        let pause = self.dice.micros(5_000, 120_000);
        self.after(pause.min(FAULTS.saturating_sub(self.at).max(Duration::from_micros(1))), Event::Fault);
    }

    pub(super) fn mend(&mut self, server: usize, what: &'static str) {
        let state = &mut self.servers[server];
        match what {
            "freeze" => state.frozen = false,
            "cut to" => self.network.passes_to[server] = true,
            "cut from" => self.network.passes_from[server] = true,
            "cut" => {
                self.network.passes_to[server] = true;
                self.network.passes_from[server] = true;
            }
            "lossy" => self.network.lossy[server] = false,
            "slow" => state.slow = 1,
            "nan" => state.answers_nan = false,
            "stale" => state.answers_stale = false,
            "registry" => self.registry.is_up = true,
            _ => return,
        }
        self.note(|| format!("mended: {what} s{server}"));
    }

    fn mend_everything(&mut self) {
        self.note(|| "everything is mended".to_owned());
        for server in 0..self.servers.len() {
            for what in ["freeze", "cut", "lossy", "slow", "nan", "stale", "registry"] {
                self.mend(server, what);
            }
            self.restart(server);
        }
    }
}
