//! Fields of a request body, with the parameter named in every error. Null is the same as absent.

use proto::{Code, Error};
use serde_json::{Map, Value};

pub(crate) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn new(body: &'a Value) -> Result<Self, Error> {
        body.as_object().map(Self).ok_or_else(|| {
            Error::new(Code::InvalidArgument, "invalid_json", "the request body is not a JSON object")
        })
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(key: &'static str, value: &Value, wanted: &str) -> Error {
        let mut shown = value.to_string();
        if shown.len() > 60 {
            shown = shown.chars().take(60).chain("…".chars()).collect();
        }
        Error::invalid(key, format!("{key} is {shown}, wanted {wanted}"))
    }

    pub(crate) fn required(&self, key: &'static str) -> Result<&'a Value, Error> {
        self.get(key).ok_or_else(|| Error::invalid(key, format!("{key} is missing")))
    }

    pub(crate) fn text(&self, key: &'static str) -> Result<Option<&'a str>, Error> {
        let text = |value: &'a Value| value.as_str().ok_or_else(|| Self::wrong(key, value, "a string"));
        self.get(key).map(text).transpose()
    }

    pub(crate) fn flag(&self, key: &'static str) -> Result<Option<bool>, Error> {
        let flag = |value: &Value| value.as_bool().ok_or_else(|| Self::wrong(key, value, "true or false"));
        self.get(key).map(flag).transpose()
    }

    /// A number within `from..=to`.
    pub(crate) fn number(&self, key: &'static str, (from, to): (f64, f64)) -> Result<Option<f32>, Error> {
        let number = |value: &Value| match value.as_f64() {
            Some(number) if (from..=to).contains(&number) => Ok(number as f32),
            Some(_) | None => Err(Self::wrong(key, value, &format!("a number from {from} to {to}"))),
        };
        self.get(key).map(number).transpose()
    }

    /// A whole number within `from..=to`.
    pub(crate) fn whole(&self, key: &'static str, (from, to): (u64, u64)) -> Result<Option<u32>, Error> {
        let whole = |value: &Value| match value.as_u64() {
            Some(number) if (from..=to).contains(&number) => Ok(number as u32),
            Some(_) | None => Err(Self::wrong(key, value, &format!("a whole number from {from} to {to}"))),
        };
        self.get(key).map(whole).transpose()
    }

    /// Any whole number of 64 bits; negative ones are taken as their bits.
    pub(crate) fn seed(&self, key: &'static str) -> Result<Option<u64>, Error> {
        let seed = |value: &Value| {
            let bits = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
            bits.ok_or_else(|| Self::wrong(key, value, "a whole number of 64 bits"))
        };
        self.get(key).map(seed).transpose()
    }

    /// A string, or at most `most` of them.
    pub(crate) fn texts(&self, key: &'static str, most: usize) -> Result<Vec<String>, Error> {
        let wanted = || format!("a string or a list of at most {most} strings");
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text.clone()]),
            Some(value @ Value::Array(items)) if items.len() <= most => {
                let texts: Option<Vec<String>> =
                    items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
                texts.ok_or_else(|| Self::wrong(key, value, &wanted()))
            }
            Some(value) => Err(Self::wrong(key, value, &wanted())),
        }
    }

    pub(crate) fn ids(&self, key: &'static str) -> Result<Vec<u32>, Error> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        token_ids(value).ok_or_else(|| Self::wrong(key, value, "a list of token ids"))
    }

    /// A constraint that is not built yet must not be ignored: anything but what means "none" is refused.
    pub(crate) fn refuse(
        &self,
        key: &'static str,
        means_none: impl FnOnce(&Value) -> bool,
    ) -> Result<(), Error> {
        match self.get(key) {
            Some(value) if !means_none(value) => {
                let error = Error::new(
                    Code::InvalidArgument,
                    "unsupported_parameter",
                    format!("{key} is not supported"),
                );
                Err(error.with_param(key))
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// A list of token ids; None for anything else.
pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}
