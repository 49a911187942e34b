//! Few colours: a palette by median cut, and pictures mapped to it.
//!
//! Results are those of Pillow's `quantize`, bit for bit, because ComfyUI's
//! ImageQuantize goes through it: which box is cut next among equals (a binary
//! heap's order), where a box is cut, how averages round, and that the nearest
//! entry is looked for at the lower corner of a cell of 4×4×4 colours.
//! Source of the method: Heckbert, "Color image quantization for frame buffer
//! display", 1982; Floyd and Steinberg, "An adaptive algorithm for spatial greyscale", 1976.

use std::collections::HashMap;

/// Red, green and blue.
pub type Rgb = [u8; 3];

/// Most different colours that are told apart; of more, the low bits are dropped.
const MAX_COLOURS: usize = 65_536;

/// Weights of the channels when the longest side of a box is looked for.
const SIDE_WEIGHTS: [i32; 3] = [77, 150, 29];

/// A box of colours: indices into the table of colours.
struct Part {
    colours: Vec<usize>,
    count: usize,
    /// The two halves after a cut.
    halves: Option<(usize, usize)>,
}

/// Colours and how often each occurs.
type Table = Vec<(Rgb, usize)>;

/// At most `colours` colours (at least 1) that stand for those of `pixels`.
pub fn palette(pixels: &[Rgb], colours: usize) -> Vec<Rgb> {
    let (table, place, shift) = tabulate(pixels);
    let mut boxes = vec![Part { colours: (0..table.len()).collect(), count: pixels.len(), halves: None }];
    let mut heap = Heap::default();
    heap.add(0, pixels.len());
    'cut: for _ in 1..colours.max(1) {
        let next = loop {
            let Some(next) = heap.remove() else { break 'cut };
            if boxes.get(next).is_some_and(|b| is_divisible(&b.colours, &table)) {
                break next;
            }
        };
        let Some(whole) = boxes.get_mut(next) else { break };
        let (high, low) = cut(std::mem::take(&mut whole.colours), whole.count, &table);
        let halves = (boxes.len(), boxes.len() + 1);
        boxes[next].halves = Some(halves);
        for half in [high, low] {
            let count = half.iter().map(|i| table[*i].1).sum();
            heap.add(boxes.len(), count);
            boxes.push(Part { colours: half, count, halves: None });
        }
    }
    averages(pixels, &boxes, &place, (table.len(), shift))
}

/// The colours that occur, where each is in that table, and how many low bits were dropped.
fn tabulate(pixels: &[Rgb]) -> (Table, HashMap<Rgb, usize>, u32) {
    for shift in 0.. {
        let mut table = Table::new();
        let mut place = HashMap::new();
        for pixel in pixels {
            let key = pixel.map(|v| v >> shift);
            let at = *place.entry(key).or_insert_with(|| {
                table.push((key, 0));
                table.len() - 1
            });
            table[at].1 += 1;
            if table.len() > MAX_COLOURS {
                break;
            }
        }
        if table.len() <= MAX_COLOURS {
            return (table, place, shift);
        }
    }
    (Table::new(), HashMap::new(), 0)
}

/// Lowest and highest value along a channel.
fn range(colours: &[usize], table: &Table, channel: usize) -> (u8, u8) {
    let values = colours.iter().map(|i| table[*i].0[channel]);
    values.fold((u8::MAX, 0), |(low, high), v| (low.min(v), high.max(v)))
}

/// Whether a box holds more than one colour.
fn is_divisible(colours: &[usize], table: &Table) -> bool {
    (0..3).any(|channel| {
        let (low, high) = range(colours, table, channel);
        low < high
    })
}

/// The upper and the lower half along the longest side: the upper one reaches down
/// to the median's value, all of it, unless that leaves nothing below.
fn cut(colours: Vec<usize>, count: usize, table: &Table) -> (Vec<usize>, Vec<usize>) {
    let mut best = (0, i32::MIN);
    for (channel, weight) in SIDE_WEIGHTS.into_iter().enumerate() {
        let (low, high) = range(&colours, table, channel);
        let side = (i32::from(high) - i32::from(low)) * weight;
        if side > best.1 {
            best = (channel, side);
        }
    }
    let value = |i: &usize| table[*i].0[best.0];
    let mut sorted = colours;
    sorted.sort_by_key(|i| std::cmp::Reverse(value(i)));
    let mut above = 0;
    let median = sorted.iter().find(|i| {
        above += table[**i].1;
        above * 2 > count
    });
    let median = median.or(sorted.last()).map_or(0, value);
    let lowest = sorted.last().map_or(0, value);
    let limit = if median == lowest { lowest.saturating_add(1) } else { median };
    sorted.into_iter().partition(|i| value(i) >= limit)
}

/// The mean colour of every box that was not cut, upper halves first.
fn averages(
    pixels: &[Rgb],
    boxes: &[Part],
    place: &HashMap<Rgb, usize>,
    (colours, shift): (usize, u32),
) -> Vec<Rgb> {
    let mut entry_of = vec![0usize; colours];
    let mut entries = 0;
    let mut open = vec![0usize];
    while let Some(at) = open.pop() {
        let Some(leaf) = boxes.get(at) else { continue };
        match leaf.halves {
            Some((high, low)) => open.extend([low, high]),
            None => {
                leaf.colours.iter().for_each(|i| entry_of[*i] = entries);
                entries += usize::from(!leaf.colours.is_empty());
            }
        }
    }
    let mut sums = vec![([0u64; 3], 0u64); entries];
    for pixel in pixels {
        let Some(at) = place.get(&pixel.map(|v| v >> shift)) else { continue };
        let Some((sum, count)) = sums.get_mut(entry_of[*at]) else { continue };
        sum.iter_mut().zip(pixel).for_each(|(s, v)| *s += u64::from(*v));
        *count += 1;
    }
    sums.iter().map(|(sum, count)| sum.map(|s| (0.5 + s as f64 / *count as f64) as u8)).collect()
}

/// A binary heap by pixel count, largest first, in the textbook's order among equals.
#[derive(Default)]
struct Heap(Vec<(usize, usize)>);

impl Heap {
    fn add(&mut self, item: usize, count: usize) {
        self.0.push((item, count));
        let mut at = self.0.len();
        while at > 1 && count > self.0[at / 2 - 1].1 {
            self.0.swap(at - 1, at / 2 - 1);
            at /= 2;
        }
    }

    fn remove(&mut self) -> Option<usize> {
        let last = self.0.pop()?;
        let Some(first) = self.0.first().copied() else { return Some(last.0) };
        let mut at = 1;
        while at * 2 <= self.0.len() {
            let mut child = at * 2;
            if child < self.0.len() && self.0[child - 1].1 < self.0[child].1 {
                child += 1;
            }
            if last.1 > self.0[child - 1].1 {
                break;
            }
            self.0[at - 1] = self.0[child - 1];
            at = child;
        }
        self.0[at - 1] = last;
        Some(first.0)
    }
}

/// Looks up the nearest entry of a palette.
struct Nearest<'a> {
    palette: &'a [Rgb],
    cells: HashMap<Rgb, usize>,
}

impl<'a> Nearest<'a> {
    fn new(palette: &'a [Rgb]) -> Self {
        Self { palette, cells: HashMap::new() }
    }

    /// The entry nearest to the lower corner of the colour's cell, the first among equals: a colour that the palette
    /// has may become another one of its cell.
    fn entry(&mut self, colour: Rgb) -> Rgb {
        let palette = self.palette;
        let corner = colour.map(|v| v & !3);
        let found = *self.cells.entry(corner).or_insert_with(|| {
            let distance = |c: &Rgb| -> i32 {
                c.iter().zip(corner).map(|(a, b)| (i32::from(*a) - i32::from(b)).pow(2)).sum()
            };
            (0..palette.len()).min_by_key(|i| distance(&palette[*i])).unwrap_or(0)
        });
        palette.get(found).copied().unwrap_or(colour)
    }
}

/// Every pixel as its nearest palette colour.
pub fn map_nearest(pixels: &[Rgb], palette: &[Rgb]) -> Vec<Rgb> {
    let mut nearest = Nearest::new(palette);
    pixels.iter().map(|p| nearest.entry(*p)).collect()
}

/// Every pixel as a palette colour, with each pixel's error spread to its neighbours
/// (Floyd-Steinberg, always from left to right, in sixteenths).
pub fn map_floyd_steinberg(pixels: &[Rgb], width: usize, palette: &[Rgb]) -> Vec<Rgb> {
    let mut nearest = Nearest::new(palette);
    let mut out = Vec::with_capacity(pixels.len());
    // The errors that the row below gets, one place to the right.
    let mut below = vec![[0i32; 3]; width + 1];
    for row in pixels.chunks(width.max(1)) {
        // Carried to the right; to the place below; to the place below on the right.
        let (mut right, mut under, mut beyond) = ([0i32; 3], [0i32; 3], [0i32; 3]);
        for (x, pixel) in row.iter().enumerate() {
            let wanted: [i32; 3] = std::array::from_fn(|c| {
                (i32::from(pixel[c]) + (right[c] + below[x + 1][c]) / 16).clamp(0, 255)
            });
            let chosen = nearest.entry(wanted.map(|v| v as u8));
            out.push(chosen);
            for (c, (want, got)) in wanted.iter().zip(chosen).enumerate() {
                let error = want - i32::from(got);
                below[x][c] = 3 * error + under[c];
                under[c] = 5 * error + beyond[c];
                beyond[c] = error;
                right[c] = 7 * error;
            }
        }
        // What Pillow leaves behind a row is blue's for all three channels.
        below[row.len()] = [under[2], beyond[2], beyond[2]];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The upper half takes in the median, so that three of four colours are above the cut.
    #[test]
    fn colours_are_rounded_means_of_boxes() {
        let pixels = [[10, 0, 0], [11, 0, 0], [200, 5, 5], [201, 6, 5]];
        assert_eq!(palette(&pixels, 2), [[137, 4, 3], [10, 0, 0]]);
        assert_eq!(palette(&pixels, 1), [[106, 3, 3]]);
        assert_eq!(palette(&[[7, 8, 9]; 5], 16), [[7, 8, 9]]);
    }

    /// Values of Pillow 13: the corner decides, also for a colour that the palette has.
    #[test]
    fn cells_have_one_colour() {
        let grey = |v: u8| [v; 3];
        let palette = [grey(3), grey(0), grey(9)];
        assert_eq!(
            map_nearest(&[grey(3), grey(2), grey(0), grey(6), grey(7)], &palette),
            [0, 0, 0, 3, 3].map(grey)
        );
    }

    /// The mean survives dithering, which plain mapping loses, but for what leaves at the edges.
    #[test]
    fn dithering_keeps_the_mean() {
        let grey = vec![[64u8; 3]; 256 * 256];
        let black_and_white = [[0, 0, 0], [255, 255, 255]];
        let mean = |p: &[Rgb]| p.iter().map(|c| f64::from(c[0])).sum::<f64>() / p.len() as f64;
        assert_eq!(mean(&map_nearest(&grey, &black_and_white)), 0.0);
        let dithered = mean(&map_floyd_steinberg(&grey, 256, &black_and_white));
        assert!((dithered - 64.0).abs() < 1.0, "{dithered}");
    }
}
