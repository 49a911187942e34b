//! NumPy's `SeedSequence`: turns a seed and a place in a tree into seeds.
//!
//! The Brownian tree gives every node its own generator; the node's seed comes
//! from hashing (entropy, spawn key) into a pool of words and hashing the pool
//! out again. Source: M. E. O'Neill, "Developing a seed_seq alternative", 2015
//! (pcg-random.org), whose constants NumPy documents in NEP 19.

const INIT_A: u32 = 0x43b0_d7e5;
const MULT_A: u32 = 0x931e_8875;
const INIT_B: u32 = 0x8b51_f9dd;
const MULT_B: u32 = 0x58f3_8ded;
const MIX_LEFT: u32 = 0xca01_f9dd;
const MIX_RIGHT: u32 = 0x4973_f715;
const SHIFT: u32 = 16;

/// Fewest words of pool.
const FEWEST_WORDS: usize = 4;

/// A hashed pool of entropy from which any number of words can be generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeedSequence {
    pool: Vec<u32>,
}

impl SeedSequence {
    /// Hashes `entropy` (all 64 bits) and `spawn_key`, the path of this
    /// sequence in its tree (empty at the root), into a pool of `pool_size`
    /// words; sizes below 4 are raised to it, as NumPy demands.
    pub fn new(entropy: u64, spawn_key: &[u64], pool_size: usize) -> Self {
        let pool_size = pool_size.max(FEWEST_WORDS);
        let mut words = Vec::with_capacity(pool_size + 2 * spawn_key.len());
        push_words(&mut words, entropy);
        if !spawn_key.is_empty() {
            // Padding keeps a root with a long entropy from colliding with a child.
            let padded = words.len().max(pool_size);
            words.resize(padded, 0);
            spawn_key.iter().for_each(|&key| push_words(&mut words, key));
        }
        Self { pool: mix_pool(&words, pool_size) }
    }

    /// The first `n` 32-bit words of output.
    pub fn generate(&self, n: usize) -> Vec<u32> {
        let mut constant = INIT_B;
        let words = self.pool.iter().cycle().take(n);
        words
            .map(|&word| {
                let word = word ^ constant;
                constant = constant.wrapping_mul(MULT_B);
                let word = word.wrapping_mul(constant);
                word ^ word >> SHIFT
            })
            .collect()
    }
}

/// Little-endian 32-bit words of `value`, without leading zeros but at least one.
fn push_words(words: &mut Vec<u32>, value: u64) {
    words.push(value as u32);
    if value >> 32 != 0 {
        words.push((value >> 32) as u32);
    }
}

fn mix_pool(words: &[u32], pool_size: usize) -> Vec<u32> {
    let mut constant = INIT_A;
    let mut hash = |word: u32| {
        let word = word ^ constant;
        constant = constant.wrapping_mul(MULT_A);
        let word = word.wrapping_mul(constant);
        word ^ word >> SHIFT
    };
    let mut pool: Vec<u32> = (0..pool_size).map(|i| hash(words.get(i).copied().unwrap_or(0))).collect();
    for source in 0..pool_size {
        for target in (0..pool_size).filter(|&t| t != source) {
            pool[target] = mix(pool[target], hash(pool[source]));
        }
    }
    for &word in words.iter().skip(pool_size) {
        for slot in &mut pool {
            *slot = mix(*slot, hash(word));
        }
    }
    pool
}

fn mix(x: u32, y: u32) -> u32 {
    let mixed = MIX_LEFT.wrapping_mul(x).wrapping_sub(MIX_RIGHT.wrapping_mul(y));
    mixed ^ mixed >> SHIFT
}
