//! Who may come in: a bound on requests at once, and the checkpoint's defaults for what a request leaves open.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use proto::{Code, Error};

use crate::{request::Ask, service::Gateway};

/// A request inside the bound; it counts until it is dropped.
pub(crate) struct Admitted {
    pub(crate) ask: Ask,
    gateway: Arc<Gateway>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.gateway.requests.fetch_sub(1, Relaxed);
    }
}

pub(crate) fn admit(gateway: &Arc<Gateway>, mut ask: Ask) -> Result<Admitted, Error> {
    if gateway.tasks.is_shutting_down() {
        return Err(Error::new(Code::Unavailable, "draining", "this gateway is shutting down"));
    }
    let most = gateway.requests_max;
    let counted = gateway.requests.fetch_update(Relaxed, Relaxed, |n| (n < most).then_some(n + 1));
    counted.map_err(|n| {
        Error::new(
            Code::Overloaded,
            "too_many_requests",
            format!("{n} requests are running, {most} are the limit"),
        )
    })?;
    let defaults = &gateway.defaults;
    let options = &mut ask.options;
    options.temperature = options.temperature.or(defaults.temperature);
    options.top_p = options.top_p.or(defaults.top_p);
    options.top_k = options.top_k.or(defaults.top_k);
    Ok(Admitted { ask, gateway: Arc::clone(gateway) })
}

/// What `generation_config.json` says of drawing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Defaults {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<u32>,
}

impl Defaults {
    pub(crate) fn read(config: &serde_json::Value) -> Self {
        let number = |key: &str| config[key].as_f64().map(|value| value as f32);
        let greedy = config["do_sample"] == serde_json::Value::Bool(false);
        Self {
            temperature: if greedy { Some(0.0) } else { number("temperature") },
            top_p: number("top_p").filter(|p| *p > 0.0),
            top_k: config["top_k"].as_u64().and_then(|k| u32::try_from(k).ok()),
        }
    }
}
