"""Makes the files of this folder: `python make.py`, with torch 2.15, transformers 5.24 and safetensors.

Small picture encoders of transformers with random weights, one as deep as ViT-L and up to ViT-H go by activation; the
first also under OpenCLIP's names. `outputs.safetensors` holds pictures, what PyTorch's antialiased bicubic makes
of them, and what the encoders make of that, in float32.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

HEADS = {"clip_vision.num_heads": "4"}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
SIDE = 32


def model(width, layers, act):
    torch.manual_seed(layers)
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
                              image_size=SIDE, patch_size=8, projection_dim=24, hidden_act=act, attn_implementation="eager")
    made = CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            spread = 0.1 if weight.dim() == 1 else weight.shape[1:].numel() ** -0.5
            weight.copy_((torch.randn_like(weight) * spread + (1.0 if "norm" in name and "weight" in name else 0.0)).half())
    return made


def open_clip(state):
    out = {}
    for name, weight in state.items():
        name = name.replace("vision_model.", "visual.")
        for ours, theirs in (("embeddings.class_embedding", "class_embedding"), ("embeddings.patch_embedding.", "conv1."),
                             ("embeddings.position_embedding.weight", "positional_embedding"), ("pre_layrnorm", "ln_pre"),
                             ("post_layernorm", "ln_post"), ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
                             ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
            name = name.replace(ours, theirs)
        if name == "visual_projection.weight":
            name, weight = "visual.proj", weight.t()
        if "self_attn" in name:
            if ".q_proj." not in name:
                continue
            layer, kind = name.split(".self_attn.q_proj.")
            source = f"vision_model.encoder.layers.{layer.rsplit('.', 1)[1]}.self_attn"
            name, weight = f"{layer}.attn.in_proj_{kind}", torch.cat([state[f"{source}.{p}_proj.{kind}"] for p in "qkv"])
        out[name] = weight.contiguous()
    return out


def prepared(image, crop):
    image = image.movedim(-1, 1)
    height, width = image.shape[2:]
    scale = SIDE / min(height, width)
    size = (round(scale * height), round(scale * width)) if crop else (SIDE, SIDE)
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True)
    top, left = (image.shape[2] - SIDE) // 2, (image.shape[3] - SIDE) // 2
    image = image[:, :, top:top + SIDE, left:left + SIDE]
    return ((255 * image).clip(0, 255).round() / 255 - MEAN) / STD


def main():
    torch.manual_seed(0)
    out = {"large": torch.rand(2, 75, 50, 3), "small": torch.rand(1, 20, 27, 3)}
    for name in ("large", "small"):
        out[f"{name}.center"] = prepared(out[name], True).contiguous()
        out[f"{name}.none"] = prepared(out[name], False).contiguous()
    for name, width, layers, act in (("shallow", 32, 3, "quick_gelu"), ("deep", 16, 32, "gelu")):
        made = model(width, layers, act)
        state = {k: v.half().contiguous() for k, v in made.state_dict().items() if "position_ids" not in k}
        save_file(state, f"{name}.safetensors", metadata=HEADS)
        if name == "shallow":
            save_file(open_clip(state), "shallow-open-clip.safetensors", metadata=HEADS)
        with torch.no_grad():
            result = made(pixel_values=out["large.center"], output_hidden_states=True)
        out[f"{name}.image_embeds"] = result.image_embeds
        out[f"{name}.last"] = result.last_hidden_state
        out[f"{name}.penultimate"] = result.hidden_states[-2].contiguous()
        print(name, result.image_embeds.std(), result.last_hidden_state.std())
    save_file({k: v.contiguous() for k, v in out.items()}, "outputs.safetensors")


main()
