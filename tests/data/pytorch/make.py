"""Makes the PyTorch files of this folder: `python make.py`, with torch 2.15 (any version since 1.6 gives the same contents)."""

import io
import pickletools
import struct
import sys
import types
from collections import OrderedDict

import torch


def values(*shape, scale=1.0, seed=0):
    count = torch.Size(shape).numel()
    return (torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + seed) * scale).reshape(shape)


def callback():
    """An object of a class that readers don't have, as Lightning leaves them in checkpoints."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind
    parts = module.__name__.split(".")
    for i in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    sys.modules[module.__name__] = module
    made = kind()
    made.best_score = torch.tensor(0.5)
    return kind, made


def checkpoint():
    base = torch.arange(12, dtype=torch.float32)
    state = OrderedDict(
        whole=base.reshape(3, 4),
        turned=base.reshape(3, 4).t(),
        part=base[4:8],
        columns=base.reshape(3, 4)[:, 1:3],
        half=torch.tensor([0.5, -2.0], dtype=torch.float16),
        brain=torch.tensor([1.5, -3.0], dtype=torch.bfloat16),
        double=torch.tensor([0.1], dtype=torch.float64),
        ids=torch.arange(3).expand((1, -1)),
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(7.0),
        empty=torch.zeros(0, 3),
        learned=torch.nn.Parameter(torch.tensor([1.0, 2.0])),
    )
    state._metadata = OrderedDict([("", {"version": 1})])
    kind, made = callback()
    return {"epoch": 3, "global_step": 10**12, "callbacks": {kind: made}, "lr": 0.25, "state_dict": state}


def rrdb():
    """ESRGAN with one block of width 8 and growth 4, twice as large, under RealESRGAN's names."""
    shapes = {"conv_first": (8, 12), "conv_body": (8, 8), "conv_up1": (8, 8), "conv_up2": (8, 8),
              "conv_hr": (8, 8), "conv_last": (3, 8)}
    for dense in (1, 2, 3):
        for conv in range(1, 6):
            shapes[f"body.0.rdb{dense}.conv{conv}"] = (8 if conv == 5 else 4, 8 + 4 * (conv - 1))
    state = OrderedDict()
    for seed, (name, (out, into)) in enumerate(shapes.items()):
        state[f"{name}.weight"] = values(out, into, 3, 3, scale=0.2, seed=seed).half()
        state[f"{name}.bias"] = values(out, scale=0.1, seed=seed + 0.5).half()
    return state


def without_source(path):
    """Takes the source code out that the old form keeps beside a module: its path and its text, in the fourth pickle."""
    data = open(path, "rb").read()
    stream = io.BytesIO(data)
    ops = [list(pickletools.genops(stream)) for _ in range(4)][3]
    texts = [(at, argument) for op, argument, at in ops if op.name == "BINUNICODE"]
    found = next(i for i, (_, text) in enumerate(texts) if text.endswith("container.py"))
    for (at, text), short in reversed(list(zip(texts[found:], ["container.py", "class ParameterDict: ..."]))):
        end = at + 5 + len(text.encode())
        data = data[:at] + b"X" + struct.pack("<I", len(short)) + short.encode() + data[end:]
    open(path, "wb").write(data)


def old_names(state):
    """The same under the names of the first ESRGAN files."""
    places = {"conv_first": "model.0", "conv_body": "model.1.sub.1", "conv_up1": "model.3", "conv_up2": "model.6",
              "conv_hr": "model.8", "conv_last": "model.10"}
    renamed = OrderedDict()
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        if layer.startswith("body."):
            _, block, dense, conv = layer.split(".")
            layer = f"model.1.sub.{block}.{dense.upper()}.{conv}.0"
        renamed[f"{places.get(layer, layer)}.{kind}"] = tensor
    return renamed


def mlp(width, seed):
    """A hypernetwork's network: layers 1, 2, 1, each with a norm; `linear.1` is the activation."""
    return OrderedDict([
        ("linear.0.weight", values(2 * width, width, scale=0.2, seed=seed).half()),
        ("linear.0.bias", values(2 * width, scale=0.1, seed=seed + 1).half()),
        ("linear.2.weight", 1 + values(2 * width, scale=0.1, seed=seed + 2).half()),
        ("linear.2.bias", values(2 * width, scale=0.1, seed=seed + 3).half()),
        ("linear.3.weight", values(width, 2 * width, scale=0.2, seed=seed + 4).half()),
        ("linear.3.bias", values(width, scale=0.1, seed=seed + 5).half()),
        ("linear.4.weight", 1 + values(width, scale=0.1, seed=seed + 6).half()),
        ("linear.4.bias", values(width, scale=0.1, seed=seed + 7).half()),
    ])


def main():
    old = {"_use_new_zipfile_serialization": False}
    torch.save(checkpoint(), "checkpoint.ckpt")
    torch.save(checkpoint(), "checkpoint-old.ckpt", **old)
    torch.save({"a": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)}, "float8.pt")
    torch.save({"a": torch.tensor([1.0 + 2.0j])}, "complex.pt")
    torch.save({"a": torch.zeros(1).expand(4)}, "expanded.pt")
    torch.save({"a": torch.eye(2).to_sparse()}, "sparse.pt")
    torch.save({"note": "no tensors", "callback": callback()[1].__class__}, "empty.pt")
    module = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
    torch.save(module, "module.pt")
    word = values(2, 32, scale=0.1).float()
    inversion = {"string_to_token": {"*": 265}, "string_to_param": {"*": word}, "name": "word", "step": 500,
                 "sd_checkpoint": None, "sd_checkpoint_name": None}
    torch.save(inversion, "word.pt")
    torch.save(inversion | {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(word)})}, "word-old.pt", **old)
    without_source("word-old.pt")
    torch.save({"<word>": word[0]}, "word.bin")
    state = rrdb()
    torch.save({"params_ema": state, "params": OrderedDict((k, v * 0) for k, v in state.items())}, "esrgan.pth")
    torch.save(old_names(state), "esrgan-old.pth", **old)
    facts = {"step": 1, "name": "hyper", "layer_structure": [1, 2, 1], "activation_func": "relu", "is_layer_norm": True,
             "weight_initialization": "Normal", "sd_checkpoint": None, "sd_checkpoint_name": None,
             "activate_output": False, "last_layer_dropout": False}
    torch.save({32: (mlp(32, 0), mlp(32, 10)), 64: (mlp(64, 20), mlp(64, 30))} | facts, "hypernetwork.pt")


main()
