#!/usr/bin/env python3
"""Peer for `kiln bench model`: the SD1.5 UNet compiled by OpenVINO, on the CPU.

    pip install torch diffusers openvino
    python3 benches/peers/openvino_sd15.py --size 64 --size 512 [--f32] [--threads 1] [--checkpoint sd15.safetensors]

Without --checkpoint the weights are random (the time does not depend on their values); with it, they are those of an
SD1.5 file in the original layout, such as `kiln synth sd15` writes. The first run traces diffusers' module and keeps
the converted model (f16 weights, 1.7 GB, --ir); later runs need OpenVINO only. Compiled once per size with static
shapes, one stream, LATENCY hint, inference precision bf16 unless --f32. Prints CPU seconds (user and system, all
threads of the process) of one step on the cfg pair (batch 2), best of --repeats runs after one that warms up.
"""
import argparse
import pathlib
import tempfile
import time

from torch_sd15 import UNET, best


def converted(args):
    """Path of the converted UNet; made if it is not there."""
    stem = pathlib.Path(args.checkpoint).stem if args.checkpoint else "random"
    path = pathlib.Path(args.ir or pathlib.Path(tempfile.gettempdir()) / f"kiln-peer-unet-{stem}.xml")
    if path.exists():
        return path
    import warnings

    import openvino
    import torch
    from diffusers import UNet2DConditionModel
    warnings.simplefilter("ignore")  # the tracer's remarks on asserts about shapes
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET).eval()
    if args.checkpoint:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
        from safetensors.torch import load_file
        unet.load_state_dict(convert_ldm_unet_checkpoint(load_file(args.checkpoint), config=dict(unet.config)))

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, context):
            return self.unet(sample, timestep, encoder_hidden_states=context, return_dict=False)[0]

    example = (torch.randn(2, 4, 64, 64), torch.tensor([801.0, 801.0]), torch.randn(2, 77, 768))
    with torch.inference_mode():
        model = openvino.convert_model(Step(), example_input=example)
    openvino.save_model(model, path, compress_to_fp16=True)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--f32", action="store_true")
    parser.add_argument("--checkpoint", help="weights of this file instead of random ones")
    parser.add_argument("--ir", help="where the converted model is kept (.xml), default the temporary folder")
    args = parser.parse_args()

    path = converted(args)
    import numpy
    import openvino
    precision = "f32" if args.f32 else "bf16"
    core, rng = openvino.Core(), numpy.random.default_rng(0)
    print(f"openvino {openvino.__version__}, {precision}, {args.threads} thread(s), "
          f"weights {args.checkpoint or 'random'}, {time.strftime('%Y-%m-%d')}")
    print(f"{'stage':<18}{'peer CPU s':>12}")
    for size in args.size or [64, 256, 512]:
        model = core.read_model(path)
        inputs = [rng.standard_normal(shape, dtype=numpy.float32)
                  for shape in ((2, 4, size // 8, size // 8), (2,), (2, 77, 768))]
        inputs[1][:] = 801.0
        model.reshape({port: list(value.shape) for port, value in zip(model.inputs, inputs)})
        compiled = core.compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": args.threads, "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY"})
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used != precision:
            raise SystemExit(f"asked for {precision}, OpenVINO chose {used}: this CPU has no {precision} path")
        request = compiled.create_infer_request()
        seconds = best(lambda: request.infer(inputs, share_inputs=True), args.repeats)
        if not numpy.isfinite(request.get_output_tensor().data).all():
            raise SystemExit(f"cfg step {size}: the output is not finite")
        print(f"{f'cfg step {size}':<18}{seconds:>12.3f}", flush=True)
        del request, compiled, model


if __name__ == "__main__":
    main()
