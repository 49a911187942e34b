//! The VAE of the diffusers library under the names of latent diffusion.

/// Begins of names inside encoder, decoder and middle: stored, ours.
const ATTENTION: [(&str, &str); 9] = [
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
    ("query.", "q."),
    ("key.", "k."),
    ("value.", "v."),
    ("proj_attn.", "proj_out."),
];

/// What `name` becomes in a VAE of so many levels; `None` if it keeps its name.
pub(super) fn rename(name: &str, levels: usize) -> Option<String> {
    let (coder, rest) = name.split_once('.').filter(|(coder, _)| matches!(*coder, "encoder" | "decoder"))?;
    let inner = inside(rest, levels)?;
    Some(format!("{coder}.{inner}"))
}

fn inside(name: &str, levels: usize) -> Option<String> {
    if let Some(rest) = name.strip_prefix("conv_norm_out.") {
        return Some(format!("norm_out.{rest}"));
    }
    if let Some(rest) = name.strip_prefix("mid_block.attentions.0.") {
        let (from, to) = ATTENTION.iter().find(|(from, _)| rest.starts_with(from))?;
        return Some(format!("mid.attn_1.{to}{}", &rest[from.len()..]));
    }
    if let Some(rest) = name.strip_prefix("mid_block.resnets.") {
        let (index, rest) = rest.split_once('.')?;
        return Some(format!("mid.block_{}.{}", index.parse::<usize>().ok()? + 1, residual(rest)));
    }
    let (side, rest) = [("down", "down_blocks."), ("up", "up_blocks.")]
        .into_iter()
        .find_map(|(side, prefix)| Some((side, name.strip_prefix(prefix)?)))?;
    let (level, rest) = rest.split_once('.')?;
    let level = level.parse::<usize>().ok()?;
    // The way up is counted from the coarsest level there, from the finest here.
    let level = if side == "up" { levels.checked_sub(level + 1)? } else { level };
    if let Some(rest) = rest.strip_prefix("resnets.") {
        let (block, rest) = rest.split_once('.')?;
        return Some(format!("{side}.{level}.block.{block}.{}", residual(rest)));
    }
    let sampler = format!("{side}samplers.0.");
    Some(format!("{side}.{level}.{side}sample.{}", rest.strip_prefix(&sampler)?))
}

fn residual(name: &str) -> String {
    match name.strip_prefix("conv_shortcut.") {
        Some(rest) => format!("nin_shortcut.{rest}"),
        None => name.to_owned(),
    }
}
