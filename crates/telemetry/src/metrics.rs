//! A process's metrics, and the page on which they are scraped. What is kept here are counts that nobody else keeps;
//! everything else is read where it is when the page is asked for.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use axum::{Router, http::header, response::IntoResponse as _, routing::get};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text::encode},
    metrics::{
        counter::{ConstCounter, Counter as Total},
        family::{Family, MetricConstructor},
        gauge::ConstGauge,
        histogram::Histogram as Buckets,
    },
    registry::{Metric as Registered, Registry},
};

use crate::names::{self, Kind, Metric};

/// Values of a metric's labels, in the order of [`Metric::labels`].
pub type Labels = Vec<(&'static str, String)>;

pub type Counter = Total;
pub type Counters = Family<Labels, Counter>;
pub type Histogram = Buckets;
pub type Histograms = Family<Labels, Histogram, Bounds>;

/// Makes the histograms of a family.
#[derive(Clone, Copy, Debug)]
pub struct Bounds(&'static [f64]);

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

/// One value of a metric that is read when it is scraped.
pub type Reading = (Labels, f64);

/// All metrics of one process. Clones share them.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// `values` under the metric's label names.
#[must_use]
pub fn labels<const N: usize>(metric: &Metric, values: [&str; N]) -> Labels {
    debug_assert_eq!(metric.labels.len(), N, "{}", metric.name);
    metric.labels.iter().copied().zip(values.map(str::to_owned)).collect()
}

/// One value without labels.
#[must_use]
pub fn one(value: f64) -> Vec<Reading> {
    vec![(Labels::new(), value)]
}

impl Metrics {
    /// With what every process has.
    #[must_use]
    pub fn new(process: &'static str, started: Instant, version: &'static str) -> Self {
        let metrics = Self::default();
        metrics.read(&names::BUILD_INFO, move || vec![(labels(&names::BUILD_INFO, [version, process]), 1.0)]);
        metrics.read(&names::UPTIME, move || one(started.elapsed().as_secs_f64()));
        metrics
    }

    fn register(&self, metric: &Metric, value: impl Registered) {
        // The library adds `_total` by itself, and a full stop after the help.
        let name = metric.name.strip_suffix("_total").unwrap_or(metric.name);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).register(name, metric.help, value);
    }

    #[must_use]
    pub fn counter(&self, metric: &Metric) -> Counter {
        debug_assert!(metric.kind == Kind::Counter && metric.labels.is_empty(), "{}", metric.name);
        let counter = Counter::default();
        self.register(metric, counter.clone());
        counter
    }

    #[must_use]
    pub fn counters(&self, metric: &Metric) -> Counters {
        debug_assert_eq!(metric.kind, Kind::Counter, "{}", metric.name);
        let counters = Counters::default();
        self.register(metric, counters.clone());
        counters
    }

    #[must_use]
    pub fn histogram(&self, metric: &Metric) -> Histogram {
        let histogram = bounds(metric).new_metric();
        self.register(metric, histogram.clone());
        histogram
    }

    #[must_use]
    pub fn histograms(&self, metric: &Metric) -> Histograms {
        let histograms = Histograms::new_with_constructor(bounds(metric));
        self.register(metric, histograms.clone());
        histograms
    }

    /// A counter or gauge whose values are `read` at each scrape.
    pub fn read(&self, metric: &Metric, read: impl Fn() -> Vec<Reading> + Send + Sync + 'static) {
        let collector = Read { metric: *metric, read: Box::new(read) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).register_collector(Box::new(collector));
    }

    /// The page: OpenMetrics text.
    #[must_use]
    pub fn page(&self) -> String {
        let mut page = String::new();
        // Writing to a string does not fail, and nothing that is registered does.
        let _infallible = encode(&mut page, &self.0.lock().unwrap_or_else(PoisonError::into_inner));
        page
    }

    /// `GET /metrics`, beside what `router` serves.
    pub fn mount(&self, router: Router) -> Router {
        let metrics = self.clone();
        router.route(
            "/metrics",
            get(async move || {
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                ([(header::CONTENT_TYPE, kind)], metrics.page()).into_response()
            }),
        )
    }
}

fn bounds(metric: &Metric) -> Bounds {
    match metric.kind {
        Kind::Histogram(buckets) => Bounds(buckets),
        Kind::Counter | Kind::Gauge => {
            debug_assert!(false, "{} is no histogram", metric.name);
            Bounds(&[])
        }
    }
}

struct Read {
    metric: Metric,
    read: Box<dyn Fn() -> Vec<Reading> + Send + Sync>,
}

impl fmt::Debug for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Read({})", self.metric.name)
    }
}

impl Collector for Read {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Metric { name, kind, help, .. } = self.metric;
        let name = name.strip_suffix("_total").unwrap_or(name);
        let help = format!("{help}.");
        let is_counter = kind == Kind::Counter;
        let kind =
            if is_counter { Counter::default().metric_type() } else { ConstGauge::new(0.0).metric_type() };
        let mut values = encoder.encode_descriptor(name, &help, None, kind)?;
        for (labels, value) in (self.read)() {
            if labels.is_empty() {
                if is_counter {
                    ConstCounter::new(value).encode(values)?;
                } else {
                    ConstGauge::new(value).encode(values)?;
                }
                return Ok(());
            }
            let encoder = values.encode_family(&labels)?;
            if is_counter {
                ConstCounter::new(value).encode(encoder)?;
            } else {
                ConstGauge::new(value).encode(encoder)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_kind() {
        let metrics = Metrics::default();
        metrics.counter(&names::ROUTER_TOKENS).inc_by(3);
        metrics
            .counters(&names::ROUTER_FRAMES)
            .get_or_create(&labels(&names::ROUTER_FRAMES, ["hedge"]))
            .inc();
        metrics.histogram(&names::ROUTER_STEP).observe(0.002);
        metrics.read(&names::ROUTER_READY, || one(1.0));
        metrics.read(&names::EXPERT_FRAMES, || vec![(labels(&names::EXPERT_FRAMES, ["late"]), 2.0)]);
        let page = metrics.page();
        for line in [
            "# TYPE shoal_router_generation_tokens counter",
            "shoal_router_generation_tokens_total 3",
            "shoal_router_frames_total{kind=\"hedge\"} 1",
            "shoal_router_step_seconds_bucket{le=\"0.0025\"} 1",
            "shoal_router_ready 1.0",
            "shoal_expert_frames_total{outcome=\"late\"} 2.0",
            "# HELP shoal_router_ready 1 if requests can be answered.",
            "# EOF",
        ] {
            assert!(page.lines().any(|found| found == line), "{line:?} is not in\n{page}");
        }
        assert_eq!(page, metrics.page());
    }
}
