//! Hooks into a UNet's forward pass.
//!
//! Some techniques change what happens inside the network: attention over parts
//! of the picture, scaled skip connections, smaller feature maps for the first
//! steps. They attach as [`UnetHook`]s, which the blocks ask where they can be changed; the
//! network itself knows none of them, and without hooks nothing is asked. A pass is recorded if
//! every hook gives a [`key`](UnetHook::key) for it; hooks that copy to and from the host give none. What a hook
//! looked at in a pass is handed to it afterwards, whether the pass was run or replayed.

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::models::ModelError;
use crate::models::layers::{Ops, fused_self_attention};
use crate::tensor::{Cols, Tensor};

/// A transformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site<'a> {
    /// Name of its stage: `input_blocks.4`, `middle_block.0`, ….
    pub stage: &'a str,
    /// Its place among the stage's transformer blocks.
    pub index: usize,
}

impl Site<'_> {
    /// Whether the stage is the lowest one.
    pub fn is_middle(&self) -> bool {
        self.stage.starts_with("middle")
    }
}

/// The pass that a hook works in.
#[derive(Clone, Copy)]
pub struct HookCall<'a> {
    /// Ops of the backend that the network runs on.
    pub ops: Ops<'a>,
    /// Noise level of the latents.
    pub sigma: f32,
    /// Height and width of the latents.
    pub size: (usize, usize),
    /// What every sample is denoised towards, by number (0: the positive side, 1: the negative one).
    pub sides: &'a [usize],
}

/// Self-attention that is about to happen.
#[derive(Clone, Copy)]
pub struct SelfAttention<'a> {
    /// The block's normalised tokens `[B, 1, S, C]`.
    pub normed: &'a Tensor,
    /// Queries, keys and values side by side `[B, 1, S, 3·C]`.
    pub qkv: &'a Tensor,
    /// Number of heads.
    pub heads: usize,
}

impl SelfAttention<'_> {
    /// The attention as it is without hooks.
    pub fn plain(&self, ops: Ops<'_>) -> Result<Tensor, ModelError> {
        ops.attention(&fused_self_attention(self.qkv, self.heads, false))
    }
}

/// What a hook makes of the input of a stage on the way up; `None` leaves a part as it is.
#[derive(Default)]
pub struct Joined {
    /// The feature map from below.
    pub h: Option<Tensor>,
    /// The skip connection.
    pub skip: Option<Tensor>,
}

/// A change to the inside of a forward pass.
pub trait UnetHook: Send + Sync {
    /// Names what the hook does in this pass, if it is a fixed sequence of ops on the device: two passes of one
    /// key and one size do the same to what they are given. `None`: the pass isn't recorded.
    fn key(&self, call: &HookCall<'_>) -> Option<u64> {
        let _ = call;
        None
    }

    /// Whether [`sources`](Self::sources) changes anything; if so, a number that no other such hook has.
    fn changes_sources(&self) -> Option<u64> {
        None
    }

    /// Changes what keys and what values of an attention are made of: the block's normalised tokens, or the
    /// text. Asked for every self-attention, and once for a text. Several hooks act one after the other.
    fn sources(&self, ops: Ops<'_>, sources: [&Tensor; 2]) -> Result<Option<[Tensor; 2]>, ModelError> {
        let _ = (ops, sources);
        Ok(None)
    }

    /// Takes the place of a block's self-attention: `[B, 1, S, C]` before the output projection.
    /// Of several hooks that answer, the one attached last counts.
    fn self_attention(
        &self,
        call: &HookCall<'_>,
        site: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        let _ = (call, site, attention);
        Ok(None)
    }

    /// Looks at a block's self-attention, once a pass at most with a result: that is handed to
    /// [`watched`](Self::watched) after the pass. Asked as [`self_attention`](Self::self_attention) is, before it.
    fn watch(
        &self,
        call: &HookCall<'_>,
        site: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        let _ = (call, site, attention);
        Ok(None)
    }

    /// Takes what [`watch`](Self::watch) made in a pass.
    fn watched(&self, call: &HookCall<'_>, made: Tensor) {
        let _ = (call, made);
    }

    /// Changes the output of stage `block` on the way down, for the stages below
    /// and, unless `is_after_skip`, for the skip connection too. Called once with
    /// `is_after_skip` false and once with it true.
    fn way_down(
        &self,
        call: &HookCall<'_>,
        block: usize,
        is_after_skip: bool,
        h: &Tensor,
    ) -> Result<Option<Tensor>, ModelError> {
        let _ = (call, block, is_after_skip, h);
        Ok(None)
    }

    /// Changes what a stage on the way up joins.
    fn way_up(&self, call: &HookCall<'_>, h: &Tensor, skip: &Tensor) -> Result<Joined, ModelError> {
        let _ = (call, h, skip);
        Ok(Joined::default())
    }
}

/// A [`key`](UnetHook::key) of a hook's name and numbers.
pub fn key_of(hook: &'static str, numbers: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (hook, numbers).hash(&mut hasher);
    hasher.finish()
}

/// The hooks of one forward pass.
#[derive(Clone, Copy)]
pub struct Hooks<'a> {
    /// The hooks, in the order they were attached.
    pub list: &'a [Arc<dyn UnetHook>],
    /// Noise level of the latents.
    pub sigma: f32,
    /// See [`HookCall::sides`].
    pub sides: &'a [usize],
}

/// Hooks at work; without any, nothing is asked.
pub(in crate::models) struct HookScope<'a> {
    pub list: &'a [Arc<dyn UnetHook>],
    call: HookCall<'a>,
    /// What every hook has watched in this pass.
    watched: RefCell<Vec<Option<Tensor>>>,
}

/// What keys and values are made of in place of `x`; `None` if no hook changes it.
pub(super) fn sources(
    list: &[Arc<dyn UnetHook>],
    ops: Ops<'_>,
    x: &Tensor,
) -> Result<Option<[Tensor; 2]>, ModelError> {
    let mut held: Option<[Tensor; 2]> = None;
    for hook in list.iter().filter(|hook| hook.changes_sources().is_some()) {
        let sources = held.as_ref().map_or([x, x], |[keys, values]| [keys, values]);
        held = hook.sources(ops, sources)?.or(held);
    }
    Ok(held)
}

/// Equal parts of the channels of several tensors `[B, 1, S, C]` side by side: part `i` is of the `i`th.
pub(super) fn spliced(ops: Ops<'_>, from: &[&Tensor]) -> Result<Tensor, ModelError> {
    let width = from.first().map_or(0, |x| x.shape().c);
    let part = width / from.len().max(1);
    let parts = from.iter().enumerate().map(|(i, x)| Cols::range(x, i * part, part));
    ops.concat(&parts.collect::<Vec<_>>())
}

impl<'a> HookScope<'a> {
    /// The hooks of a pass.
    pub fn new(list: &'a [Arc<dyn UnetHook>], call: HookCall<'a>) -> Self {
        Self { list, call, watched: RefCell::default() }
    }

    /// What the hooks have watched since this was asked last, in their order.
    pub fn take_watched(&self) -> Vec<Option<Tensor>> {
        self.watched.take()
    }

    /// Hands every hook what it has watched.
    pub fn hand_out(&self, watched: Vec<Option<Tensor>>) {
        for (hook, made) in self.list.iter().zip(watched) {
            if let Some(made) = made {
                hook.watched(&self.call, made);
            }
        }
    }

    /// Names the pass of a network called `work` under these hooks; `None` if one of them has no key.
    pub fn key(&self, work: u64) -> Option<u64> {
        let keys: Option<Vec<u64>> = self.list.iter().map(|hook| hook.key(&self.call)).collect();
        Some(key_of("hooks", (work, keys?)))
    }

    /// A block's self-attention.
    pub fn attend(&self, site: Site<'_>, attention: &SelfAttention<'_>) -> Result<Tensor, ModelError> {
        for (i, hook) in self.list.iter().enumerate().rev() {
            if let Some(made) = hook.watch(&self.call, site, attention)? {
                let mut watched = self.watched.borrow_mut();
                watched.resize_with(self.list.len(), || None);
                watched[i] = Some(made);
            }
            if let Some(attended) = hook.self_attention(&self.call, site, attention)? {
                return Ok(attended);
            }
        }
        attention.plain(self.call.ops)
    }

    /// A stage's output on the way down, if a hook changes it.
    pub fn down(&self, block: usize, is_after_skip: bool, h: &Tensor) -> Result<Option<Tensor>, ModelError> {
        let mut held: Option<Tensor> = None;
        for hook in self.list {
            let changed = hook.way_down(&self.call, block, is_after_skip, held.as_ref().unwrap_or(h))?;
            held = changed.or(held);
        }
        Ok(held)
    }

    /// The two inputs of a stage on the way up.
    pub fn up(&self, h: Tensor, skip: Tensor) -> Result<(Tensor, Tensor), ModelError> {
        let (mut h, mut skip) = (h, skip);
        for hook in self.list {
            let joined = hook.way_up(&self.call, &h, &skip)?;
            h = joined.h.unwrap_or(h);
            skip = joined.skip.unwrap_or(skip);
        }
        Ok((h, skip))
    }
}
