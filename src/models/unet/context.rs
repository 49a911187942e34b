//! Cross-attention keys and values, kept between steps.
//!
//! They depend on the prompt only: a run of twenty steps needs them once. The
//! cache lives with the loaded UNet and goes when it is unloaded.

use std::sync::{Arc, Mutex, PoisonError};

use super::hooks::UnetHook;
use super::{ContextKv, Unet};
use crate::models::ModelError;
use crate::tensor::HostTensor;

/// How many different batches of conditionings are kept.
const KEPT: usize = 8;

/// A batch of conditionings, by identity, and the hooks that change them: the tensors are held, so an address
/// can't be reused.
type Key = (Vec<Arc<HostTensor>>, Vec<u64>);

/// Least recently used first.
#[derive(Default)]
pub(in crate::models) struct ContextCache(Mutex<Vec<(Key, Arc<ContextKv>)>>);

fn same((a, hooks): &Key, b: &[Arc<HostTensor>], others: &[u64]) -> bool {
    hooks == others && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

impl ContextCache {
    /// The entry of `conds` under hooks with these numbers, made of their stack by `make` if it is not there.
    pub fn get(
        &self,
        conds: &[Arc<HostTensor>],
        hooks: &[u64],
        make: impl FnOnce(&HostTensor) -> Result<ContextKv, ModelError>,
    ) -> Result<Arc<ContextKv>, ModelError> {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = cache.iter().position(|(key, _)| same(key, conds, hooks)) {
            let entry = cache.remove(at);
            let kv = entry.1.clone();
            cache.push(entry);
            return Ok(kv);
        }
        let kv = Arc::new(make(&stack(conds)?)?);
        if cache.len() == KEPT {
            cache.remove(0);
        }
        cache.push(((conds.to_vec(), hooks.to_vec()), kv.clone()));
        Ok(kv)
    }
}

impl Unet {
    /// Keys and values for one model call on a batch of conditionings `[1, T, context_dim]`.
    ///
    /// Conditionings of different lengths are repeated to a common multiple;
    /// attention over repeated keys gives the same result.
    pub fn context(&self, conds: &[Arc<HostTensor>]) -> Result<Arc<ContextKv>, ModelError> {
        self.context_under(conds, &[])
    }

    /// The same under hooks, as far as they change what keys and values are made of.
    pub fn context_under(
        &self,
        conds: &[Arc<HostTensor>],
        hooks: &[Arc<dyn UnetHook>],
    ) -> Result<Arc<ContextKv>, ModelError> {
        let numbers: Vec<u64> = hooks.iter().filter_map(|hook| hook.changes_sources()).collect();
        self.contexts.get(conds, &numbers, |context| self.context_kv_hooked(context, hooks))
    }
}

fn stack(conds: &[Arc<HostTensor>]) -> Result<HostTensor, ModelError> {
    let width = conds.first().map_or(0, |c| c.dim(2));
    let tokens = conds.iter().fold(1, |n, c| lcm(n, c.dim(1)));
    let mut data = Vec::new();
    let mut batch = 0;
    for cond in conds {
        if cond.dim(2) != width {
            return Err(ModelError::Input {
                what: "width of the text conditioning",
                expected: width,
                found: cond.dim(2),
            });
        }
        for row in 0..cond.dim(0) {
            for _ in 0..tokens / cond.dim(1).max(1) {
                data.extend_from_slice(cond.row(row));
            }
            batch += 1;
        }
    }
    let found = data.len();
    HostTensor::new(&[batch, tokens, width], data).ok_or(ModelError::Input {
        what: "elements of the text conditioning",
        expected: batch * tokens * width,
        found,
    })
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a.max(1), b.max(1));
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a.max(1) / x * b.max(1)
}
