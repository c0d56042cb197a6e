//! Fields of a config file with their types: absent and `null` are the same, whole numbers may be written as floats,
//! and whatever is wrong is named.

use serde_json::{Map, Value};

use super::{Gate, Indexer, Rope, Scoring, Yarn};
use crate::Error;

pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    file: String,
}

impl<'a> Fields<'a> {
    pub(super) fn new(value: &'a Value, file: &str) -> Result<Self, Error> {
        let object = value.as_object().ok_or_else(|| Error::new(format!("{file} is not a JSON object")))?;
        Ok(Self { object, file: file.to_owned() })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        Error::new(format!("{}: {key} is {value}, wanted {wanted}", self.file))
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| Error::new(format!("{}: {key} is missing", self.file)))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.get(key)
            .map(|value| value.as_f64().ok_or_else(|| self.wrong(key, value, "a number")))
            .transpose()
    }

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64, Error> {
        Ok(self.number(key)?.unwrap_or(default))
    }

    fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        // `4096.0` and `1e6` occur in the wild.
        match value.as_f64() {
            Some(number) if number >= 0.0 && number.fract() == 0.0 && number <= u32::MAX.into() => {
                Ok(Some(number as usize))
            }
            Some(_) | None => Err(self.wrong(key, value, "a whole number")),
        }
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize, Error> {
        Ok(self.count(key)?.unwrap_or(default))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.count(key)? {
            Some(0) => Err(Error::new(format!("{}: {key} is 0", self.file))),
            size => Ok(size),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, Error> {
        self.required(key, self.optional_size(key)?)
    }

    pub(super) fn size_or(&self, key: &str, default: usize) -> Result<usize, Error> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| self.wrong(key, value, "a string")))
            .transpose()
    }

    /// Fails if `key` is there and is not `wanted`.
    pub(super) fn only(&self, key: &str, wanted: &str) -> Result<(), Error> {
        match self.text(key)? {
            Some(text) if text != wanted => Err(Error::new(format!(
                "{}: {key} {text:?} is not supported; supported is {wanted:?}",
                self.file
            ))),
            Some(_) | None => Ok(()),
        }
    }

    /// A number, a list of numbers, or nothing.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<u32>, Error> {
        let wrong = |value| self.wrong(key, value, "a token id or a list of them");
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(value @ Value::Array(list)) => {
                list.iter().map(|item| id(item).ok_or_else(|| wrong(value))).collect()
            }
            Some(value) => Ok(vec![id(value).ok_or_else(|| wrong(value))?]),
        }
    }

    pub(super) fn architecture(&self) -> Result<String, Error> {
        let value = self.required("architectures", self.get("architectures"))?;
        let first = value.as_array().and_then(|list| list.first()).and_then(Value::as_str);
        Ok(first.ok_or_else(|| self.wrong("architectures", value, "a list of names"))?.to_owned())
    }

    pub(super) fn indexer(&self) -> Result<Indexer, Error> {
        Ok(Indexer {
            index_n_heads: self.size_or("index_n_heads", 64)?,
            index_head_dim: self.size_or("index_head_dim", 128)?,
            index_topk: self.size_or("index_topk", 2048)?,
        })
    }

    pub(super) fn gate(&self, v2: bool) -> Result<Gate, Error> {
        let scoring_func = self.text("scoring_func")?.unwrap_or(if v2 { "softmax" } else { "sigmoid" });
        let topk_method = self.text("topk_method")?.unwrap_or(if v2 { "greedy" } else { "noaux_tc" });
        let unsupported = || {
            Error::new(format!(
                "{}: scoring_func {scoring_func:?} with topk_method {topk_method:?} is not supported for this \
                 architecture; supported are softmax with greedy or group_limited_greedy (V2), sigmoid with noaux_tc",
                self.file
            ))
        };
        let (scoring, grouped) = match (v2, scoring_func, topk_method) {
            (true, "softmax", "greedy") => (Scoring::Softmax, false),
            (true, "softmax", "group_limited_greedy") => (Scoring::Softmax, true),
            (false, "sigmoid", "noaux_tc") => (Scoring::Sigmoid, true),
            _ => return Err(unsupported()),
        };
        Ok(Gate {
            scoring,
            n_group: if grouped { self.size_or("n_group", if v2 { 1 } else { 8 })? } else { 1 },
            topk_group: if grouped { self.size_or("topk_group", if v2 { 1 } else { 4 })? } else { 1 },
            // transformers reads it for V3 and later; no V2 checkpoint sets it.
            norm_topk_prob: !v2 && self.flag_or("norm_topk_prob", true)?,
            routed_scaling_factor: self.number_or("routed_scaling_factor", if v2 { 1.0 } else { 2.5 })?
                as f32,
        })
    }

    /// By layer: whether it has routed experts.
    pub(super) fn moe_layers(&self, n_layers: usize) -> Result<Vec<bool>, Error> {
        if let Some(value) = self.get("mlp_layer_types") {
            let kinds: Option<Vec<bool>> = value.as_array().and_then(|list| {
                let kind = |item: &Value| match item.as_str() {
                    Some("sparse") => Some(true),
                    Some("dense") => Some(false),
                    Some(_) | None => None,
                };
                list.iter().map(kind).collect()
            });
            return kinds.filter(|kinds| kinds.len() == n_layers).ok_or_else(|| {
                self.wrong("mlp_layer_types", value, &format!("{n_layers} of \"dense\" and \"sparse\""))
            });
        }
        let first = self.count_or("first_k_dense_replace", 0)?;
        let every = self.size_or("moe_layer_freq", 1)?;
        Ok((0..n_layers).map(|layer| layer >= first && layer.is_multiple_of(every)).collect())
    }

    /// `rope_parameters` with everything inside, or `rope_theta` and `rope_scaling` beside each other; the type as
    /// `rope_type` or as `type`.
    pub(super) fn rope(&self) -> Result<Rope, Error> {
        let (key, value) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(value), _) => ("rope_parameters", value),
            (None, Some(value)) => ("rope_scaling", value),
            (None, None) => return Ok(Rope { theta: self.number_or("rope_theta", 10_000.0)?, yarn: None }),
        };
        let object = value.as_object().ok_or_else(|| self.wrong(key, value, "an object"))?;
        let inner = Fields { object, file: format!("{}: {key}", self.file) };
        let theta = match inner.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number_or("rope_theta", 10_000.0)?,
        };
        let kind = match (inner.text("rope_type")?, inner.text("type")?) {
            (Some(new), Some(old)) if new != old => {
                return Err(Error::new(format!(
                    "{}: rope_type {new:?} and type {old:?} contradict each other",
                    inner.file
                )));
            }
            (new, old) => new.or(old).unwrap_or("default"),
        };
        match kind {
            "default" => Ok(Rope { theta, yarn: None }),
            "yarn" => Ok(Rope { theta, yarn: Some(inner.yarn(self)?) }),
            other => Err(Error::new(format!(
                "{}: rope type {other:?} is not supported; supported are \"default\" and \"yarn\"",
                inner.file
            ))),
        }
    }

    fn yarn(&self, outer: &Self) -> Result<Yarn, Error> {
        let original = match self.number("original_max_position_embeddings")? {
            Some(original) => original,
            None => outer.number_or("max_position_embeddings", 4096.0)?,
        };
        Ok(Yarn {
            factor: self.required("factor", self.number("factor")?)?,
            original_max_position_embeddings: original,
            beta_fast: self.number_or("beta_fast", 32.0)?,
            beta_slow: self.number_or("beta_slow", 1.0)?,
            mscale: self.number("mscale")?,
            mscale_all_dim: self.number("mscale_all_dim")?,
            attention_factor: self.number("attention_factor")?,
            truncate: self.flag_or("truncate", true)?,
        })
    }
}
