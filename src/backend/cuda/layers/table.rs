//! Layer tables in CSV: what a model computes, one row an operator.
//!
//! The columns are stage, op, dims, M, N, K, how often the operator occurs in a
//! forward pass (`count_per_forward`), and what one costs at least (`GFLOP_each`,
//! `min_MB_each`); others are not read. Elementwise operators (`elt:…`) have no
//! kernel of their own, since they are fused into others: they are left out and
//! counted. Whatever else is not understood is an error with its place: a layer
//! that is missing without a word would make a sum look better than it is.

use std::collections::BTreeMap;

/// Columns that are read.
const COLUMNS: [&str; 9] =
    ["stage", "op", "dims", "M", "N", "K", "count_per_forward", "GFLOP_each", "min_MB_each"];
/// Operators with a kernel.
const KNOWN: &str = "attention, conv, gemm, gemm(conv1x1), group_norm, layer_norm";
/// Largest extent: indices in kernels are 32-bit.
const MOST: f64 = i32::MAX as f64;
/// Largest product of a layer's extents: below it no count of elements overflows.
const LARGEST: f64 = (1u64 << 53) as f64;

/// An operator and its extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerOp {
    /// Batch, heads, head dim, queries, keys.
    Attention([usize; 5]),
    /// Batch, input channels, output channels, kernel side, stride, input height, input width.
    Conv([usize; 7]),
    /// M, N, K.
    Gemm([usize; 3]),
    /// Samples, channels, pixels, groups.
    GroupNorm([usize; 4]),
    /// Rows, channels.
    LayerNorm([usize; 2]),
}

impl LayerOp {
    /// Kind, for sums.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Attention(_) => "attention",
            Self::Conv(_) => "conv",
            Self::Gemm(_) => "gemm",
            Self::GroupNorm(_) => "group_norm",
            Self::LayerNorm(_) => "layer_norm",
        }
    }
}

/// One row of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Part of the model.
    pub stage: String,
    /// What is computed.
    pub op: LayerOp,
    /// How often in a forward pass.
    pub count: f64,
    /// Floating-point operations of one.
    pub flops: f64,
    /// Bytes that one must at least read and write.
    pub bytes: f64,
}

/// A table as it was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Rows with a kernel.
    pub layers: Vec<Layer>,
    /// Rows without: how many of each operator.
    pub left_out: BTreeMap<String, usize>,
}

/// A table that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("line {line} of the layer table{}: {reason}", column.map_or(String::new(), |name| format!(", column '{name}'")))]
pub struct LayerError {
    /// Line, from 1.
    pub line: usize,
    /// Column, if it is one that is wrong.
    pub column: Option<&'static str>,
    /// What is wrong.
    pub reason: String,
}

/// The cells of one line.
struct Row<'a> {
    line: usize,
    cells: &'a [String],
    /// Where each of [`COLUMNS`] stands.
    places: [usize; 9],
}

impl Row<'_> {
    fn fail(&self, column: usize, reason: String) -> LayerError {
        LayerError { line: self.line, column: Some(COLUMNS[column]), reason }
    }

    fn cell(&self, column: usize) -> &str {
        self.cells.get(self.places[column]).map_or("", |cell| cell.trim())
    }

    /// A number that is not negative.
    fn number(&self, column: usize) -> Result<f64, LayerError> {
        let text = self.cell(column);
        let value = text.parse::<f64>().ok().filter(|v| v.is_finite() && *v >= 0.0);
        value.ok_or_else(|| self.fail(column, format!("'{text}' is no number from 0 on")))
    }

    /// A whole number from 1 on.
    fn extent(&self, column: usize) -> Result<usize, LayerError> {
        let value = self.number(column).ok().filter(|v| (1.0..=MOST).contains(v) && v.fract() == 0.0);
        let wrong =
            || self.fail(column, format!("'{}' is no whole number from 1 to {MOST}", self.cell(column)));
        value.map(|v| v as usize).ok_or_else(wrong)
    }

    /// The numbers in the cell of dims.
    fn dims(&self) -> Result<Vec<usize>, LayerError> {
        let text = self.cell(2);
        let bytes = text.as_bytes();
        let negative = bytes.windows(2).any(|pair| pair[0] == b'-' && pair[1].is_ascii_digit());
        let parts = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
        let numbers: Option<Vec<usize>> = parts
            .map(|part| part.parse::<usize>().ok().filter(|n| (1..=MOST as usize).contains(n)))
            .collect();
        let numbers = numbers.filter(|_| !negative);
        let wrong = || self.fail(2, format!("'{text}' has a number that is not from 1 to {MOST}"));
        self.within(2, numbers.ok_or_else(wrong)?)
    }

    /// The same extents, if a layer can be as large.
    fn within(&self, column: usize, extents: Vec<usize>) -> Result<Vec<usize>, LayerError> {
        match extents.iter().map(|n| *n as f64).product::<f64>() <= LARGEST {
            true => Ok(extents),
            false => Err(self.fail(column, format!("{extents:?} is too large for any device"))),
        }
    }

    /// The operator; none if it has no kernel of its own.
    fn op(&self) -> Result<Option<LayerOp>, LayerError> {
        let op = self.cell(1);
        if op.starts_with("elt:") {
            return Ok(None);
        }
        let wrong = |form: &str| self.fail(2, format!("'{}' is not of the form {form}", self.cell(2)));
        Ok(Some(match op {
            "attention" => {
                let dims = self.dims()?.try_into();
                LayerOp::Attention(
                    dims.map_err(|_| wrong("b2 h8 d40 q4096 kv77 (batch, heads, head dim, …)"))?,
                )
            }
            "conv" => match self.dims()?[..] {
                [b, cin, cout, side, width, stride, h, w, ..] if side == width => {
                    LayerOp::Conv([b, cin, cout, side, stride, h, w])
                }
                _ => return Err(wrong("b2 320->640 3x3 s1 64x64->64x64 (square kernels only)")),
            },
            "gemm" | "gemm(conv1x1)" => {
                let extents = [self.extent(3)?, self.extent(4)?, self.extent(5)?];
                self.within(3, extents.to_vec())?;
                LayerOp::Gemm(extents)
            }
            "group_norm" => match self.dims()?[..] {
                [n, c, h, w, groups] => LayerOp::GroupNorm([n, c, h * w, groups]),
                _ => return Err(wrong("(2, 320, 64, 64) g32")),
            },
            "layer_norm" => match self.dims()?[..] {
                [ref outer @ .., c] if !outer.is_empty() => LayerOp::LayerNorm([outer.iter().product(), c]),
                _ => return Err(wrong("(2, 77, 768)")),
            },
            _ => {
                let reason =
                    format!("'{op}' is not known; there are {KNOWN}, and elt:… without a kernel of its own");
                return Err(self.fail(1, reason));
            }
        }))
    }
}

/// Reads a table in CSV.
pub fn parse(text: &str) -> Result<Table, LayerError> {
    // Spreadsheets begin UTF-8 with a mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut lines = text.lines().enumerate();
    let header = lines.next().map(|(_, line)| fields(line)).unwrap_or_default();
    let mut places = [0; 9];
    for (place, name) in places.iter_mut().zip(COLUMNS) {
        *place = header.iter().position(|field| field.trim() == name).ok_or_else(|| LayerError {
            line: 1,
            column: None,
            reason: format!("no column '{name}'; needed are {}", COLUMNS.join(", ")),
        })?;
    }
    let mut table = Table::default();
    for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let cells = fields(line);
        let row = Row { line: number + 1, cells: &cells, places };
        let (count, flops, bytes) = (row.number(6)?, row.number(7)? * 1e9, row.number(8)? * 1e6);
        match row.op()? {
            Some(op) => table.layers.push(Layer { stage: row.cell(0).to_owned(), op, count, flops, bytes }),
            None => *table.left_out.entry(row.cell(1).to_owned()).or_default() += 1,
        }
    }
    Ok(table)
}

/// Cells of a line; a quoted cell may hold commas.
fn fields(line: &str) -> Vec<String> {
    let (mut cells, mut cell, mut is_quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => cells.push(std::mem::take(&mut cell)),
            c => cell.push(c),
        }
    }
    cells.push(cell);
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "stage,op,dims,M,N,K,count_per_forward,GFLOP_each,min_MB_each
unet,attention,b2 h8 d40 q64 kv77,64,77,40,5,0.5,1.5
unet,conv,b2 320->640 3x3 s2 8x6->4x3,24,640,2880,1,2,3
unet,gemm,,128,1280,5120,1,1.678,14.748
unet,group_norm,\"(2, 1280, 8, 8) g32\",,,,12,0.0,0.6553
unet,layer_norm,\"(2, 77, 768)\",,,,2,0,0.5
unet,elt:silu,\"(2, 640, 32, 32)\",,,,6,0.0,5.2
";

    #[test]
    fn rows_with_a_kernel_become_layers() {
        let table = parse(TABLE).unwrap();
        let ops: Vec<LayerOp> = table.layers.iter().map(|l| l.op).collect();
        assert_eq!(
            ops,
            [
                LayerOp::Attention([2, 8, 40, 64, 77]),
                LayerOp::Conv([2, 320, 640, 3, 2, 8, 6]),
                LayerOp::Gemm([128, 1280, 5120]),
                LayerOp::GroupNorm([2, 1280, 64, 32]),
                LayerOp::LayerNorm([154, 768]),
            ]
        );
        let first = &table.layers[0];
        assert_eq!((first.count, first.flops, first.bytes), (5.0, 0.5e9, 1.5e6));
        assert_eq!(table.left_out, BTreeMap::from([("elt:silu".to_owned(), 1)]));
        assert_eq!(
            parse(&format!("\u{feff}{}", TABLE.replace('\n', "\r\n"))),
            Ok(table),
            "as a spreadsheet writes it"
        );
    }

    /// The error of the table with `from` replaced by `to`.
    fn refused(from: &str, to: &str) -> String {
        assert!(TABLE.contains(from));
        parse(&TABLE.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn a_bad_table_names_its_line_and_column() {
        let error = parse("stage,op\n").unwrap_err().to_string();
        assert!(
            error.starts_with("line 1 of the layer table: no column 'dims'; needed are stage, op,"),
            "{error}"
        );
        assert!(parse("").unwrap_err().to_string().contains("no column 'stage'"));
        for (from, to, place, what) in [
            ("unet,conv", "unet,convv", "line 3 of the layer table, column 'op'", "'convv' is not known"),
            ("unet,gemm", "unet,", "line 4 of the layer table, column 'op'", "'' is not known"),
            (
                "b2 h8 d40 q64 kv77",
                "b2 h8",
                "line 2 of the layer table, column 'dims'",
                "'b2 h8' is not of the form",
            ),
            ("3x3", "3x1", "line 3 of the layer table, column 'dims'", "square kernels only"),
            ("kv77", "kv-77", "line 2 of the layer table, column 'dims'", "not from 1 to 2147483647"),
            ("(2, 77, 768)", "(2, 0, 768)", "line 6 of the layer table, column 'dims'", "not from 1"),
            (
                "5120,1,",
                "51.5,1,",
                "line 4 of the layer table, column 'K'",
                "'51.5' is no whole number from 1",
            ),
            (",128,1280", ",-128,1280", "line 4 of the layer table, column 'M'", "'-128' is no whole number"),
            (
                "5,0.5",
                "five,0.5",
                "line 2 of the layer table, column 'count_per_forward'",
                "'five' is no number",
            ),
            (
                "5,0.5",
                "nan,0.5",
                "line 2 of the layer table, column 'count_per_forward'",
                "'nan' is no number",
            ),
            (
                "0.5,1.5",
                "-1,1.5",
                "line 2 of the layer table, column 'GFLOP_each'",
                "'-1' is no number from 0 on",
            ),
            ("5.2\n", "inf\n", "line 7 of the layer table, column 'min_MB_each'", "'inf' is no number"),
            (
                "128,1280,5120",
                "2000000,2000000,2000000",
                "line 4 of the layer table, column 'M'",
                "too large",
            ),
            (",0,0.5\n", "\n", "line 6 of the layer table, column 'GFLOP_each'", "'' is no number"),
        ] {
            let error = refused(from, to);
            assert!(error.starts_with(place) && error.contains(what), "{to}: {error}");
        }
    }
}
