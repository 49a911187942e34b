//! Names, types and shapes of a file's tensors, and questions about them.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::path::PathBuf;
use std::str::FromStr;

use super::{DetectError, Kind, kind};
use crate::models::layouts::Names;
use crate::tensor::DType;
use crate::weights::WeightsFile;

/// A tensor that a network needs.
pub(super) type Needed = (String, Vec<usize>);

/// What a file's header says, without its data.
pub(super) struct Layout<'a> {
    pub file: PathBuf,
    tensors: BTreeMap<&'a str, (DType, &'a [usize])>,
    pub metadata: &'a BTreeMap<String, String>,
}

impl<'a> Layout<'a> {
    /// The layout of `file` under the names of its directory.
    pub fn of(file: &'a WeightsFile, names: &'a Names) -> Self {
        Self::new(file.path().to_path_buf(), names.iter(), file.metadata())
    }

    /// The layout of `file` under the names it uses itself.
    pub fn as_stored(file: &'a WeightsFile) -> Self {
        let tensors = file.infos().map(|t| (t.name, (t.dtype, t.shape)));
        Self::new(file.path().to_path_buf(), tensors, file.metadata())
    }

    pub fn new(
        file: PathBuf,
        tensors: impl IntoIterator<Item = (&'a str, (DType, &'a [usize]))>,
        metadata: &'a BTreeMap<String, String>,
    ) -> Self {
        Self { file, tensors: tensors.into_iter().collect(), metadata }
    }

    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.tensors.keys().copied()
    }

    pub fn shape(&self, name: &str) -> Option<&'a [usize]> {
        self.tensors.get(name).map(|(_, shape)| *shape)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether any name begins with `prefix`.
    pub fn has_prefix(&self, prefix: &str) -> bool {
        let from = (Bound::Included(prefix), Bound::Unbounded);
        self.tensors.range::<str, _>(from).next().is_some_and(|(name, _)| name.starts_with(prefix))
    }

    /// How many of `{prefix}0.`, `{prefix}1.`, … there are in a row.
    pub fn count(&self, prefix: &str) -> usize {
        (0..self.tensors.len()).take_while(|i| self.has_prefix(&format!("{prefix}{i}."))).count()
    }

    /// The shape of a tensor that `network` needs, with `N` dimensions, none of them 0.
    pub fn dims<const N: usize>(&self, network: &'static str, name: &str) -> Result<[usize; N], DetectError> {
        let Some(shape) = self.shape(name) else {
            return Err(self.missing(network, name));
        };
        match <[usize; N]>::try_from(shape) {
            Ok(dims) if !dims.contains(&0) => Ok(dims),
            _ => Err(self.odd(name, format!("{N} dimensions, none of them 0,"))),
        }
    }

    pub fn missing(&self, network: &'static str, name: &str) -> DetectError {
        DetectError::Missing { file: self.file.clone(), network, name: name.to_owned() }
    }

    /// The error for a tensor whose shape is not `wanted`.
    pub fn odd(&self, name: &str, wanted: String) -> DetectError {
        let found = self.shape(name).unwrap_or_default().to_vec();
        DetectError::Shape { file: self.file.clone(), name: name.to_owned(), found, wanted }
    }

    pub fn is_not(&self, wanted: Kind) -> DetectError {
        DetectError::Kind { file: self.file.clone(), found: kind::kind_in(self), wanted }
    }

    pub fn bad_metadata(&self, key: &'static str, wanted: &'static str) -> DetectError {
        let value = self.metadata.get(key).cloned().unwrap_or_default();
        DetectError::Metadata { file: self.file.clone(), key, value, wanted }
    }

    /// The metadata value of `key` as a number.
    pub fn number<T: FromStr>(
        &self,
        key: &'static str,
        wanted: &'static str,
    ) -> Result<Option<T>, DetectError> {
        match self.metadata.get(key) {
            Some(text) => text.trim().parse().map(Some).map_err(|_| self.bad_metadata(key, wanted)),
            None => Ok(None),
        }
    }

    /// The number of groups of group norms; 32 unless the metadata say otherwise.
    pub fn norm_groups(&self) -> Result<usize, DetectError> {
        Ok(self.number("group_norm.num_groups", "a whole number of groups")?.unwrap_or(32))
    }

    /// Checks that `value` is a divisor of `channels`.
    pub fn divides(
        &self,
        what: &'static str,
        value: usize,
        channels: usize,
        key: &'static str,
    ) -> Result<(), DetectError> {
        if value > 0 && channels.is_multiple_of(value) {
            return Ok(());
        }
        Err(DetectError::Divide { file: self.file.clone(), what, value, channels, key })
    }

    /// Checks that all of `needed` are there, in that shape, as floating-point numbers. A
    /// 1×1 convolution may be stored as the matrix it is.
    pub fn check(&self, network: &'static str, needed: &[Needed]) -> Result<(), DetectError> {
        for (name, wanted) in needed {
            let Some(&(dtype, shape)) = self.tensors.get(name.as_str()) else {
                return Err(self.missing(network, name));
            };
            let is_matrix =
                matches!(wanted.as_slice(), [.., 1, 1]) && wanted.len() == 4 && shape == &wanted[..2];
            if shape != wanted.as_slice() && !is_matrix {
                return Err(self.odd(name, format!("{wanted:?}")));
            }
            let is_float = matches!(
                dtype,
                DType::F32 | DType::F16 | DType::BF16 | DType::F64 | DType::F8E4M3 | DType::F8E5M2
            );
            if !is_float {
                return Err(DetectError::DType { file: self.file.clone(), name: name.clone(), dtype });
            }
        }
        Ok(())
    }

    /// Names under `prefixes` that are not in `explained`.
    pub fn unexplained(&self, prefixes: &[&str], explained: &[Needed]) -> Vec<String> {
        let explained: HashSet<&str> = explained.iter().map(|(name, _)| name.as_str()).collect();
        let is_ours = |name: &&str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        self.names().filter(is_ours).filter(|name| !explained.contains(name)).map(str::to_owned).collect()
    }
}

/// `name.weight` of `shape` and `name.bias` as long as its first extent.
pub(super) fn affine(needed: &mut Vec<Needed>, name: &str, shape: &[usize]) {
    needed.push((format!("{name}.weight"), shape.to_vec()));
    needed.push((format!("{name}.bias"), shape[..1].to_vec()));
}
