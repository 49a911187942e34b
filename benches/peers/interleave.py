#!/usr/bin/env python3
"""Alternates `kiln bench model` with its peers on the CPU and prints one table.

    pip install torch diffusers openvino
    python3 benches/peers/interleave.py --kiln target/release/kiln [--tier bf16] [--size 64 --size 512] [--rounds 3]

In every round and for every size kiln runs, then each peer, one process at a time, so that all see the same machine.
Times are CPU seconds (user and system); what counts is the smallest of all rounds, and the ratio is peer / kiln.
"of ceiling" divides kiln's best rate by the best of the ceilings that `kiln bench model` measured in the same
rounds: a bare matrix product on one core. Exits with 1 if a stage of 256² or more misses its tier's bar; at smaller
sizes reading the weights takes longer than multiplying, so a share of the arithmetic ceiling says little there.
kiln keeps cross-attention's keys and values of a prompt over the steps, the peers compute them in every step
(5.9 GFLOP and 2% of the weights).
"""
import argparse
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
BARS = {"f32": 80.0, "bf16": 60.0}
BAR_FROM = 256
ROW = re.compile(r"^(cfg step \d+|VAE decode \d+)\s+(\d.*)$")


def rows(text):
    """The stages of a program's table: {name: its columns as numbers}."""
    found = {}
    for line in text.splitlines():
        if match := ROW.match(line):
            found[match[1]] = [float(word) for word in re.findall(r"nan|\d+(?:\.\d+)?", match[2])]
    return found


def output(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed ({done.returncode}): {' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout


class Best:
    """The smallest CPU seconds of each stage and program, and kiln's rates and ceilings."""

    def __init__(self):
        self.seconds, self.rate, self.percent, self.ceiling = {}, {}, {}, []

    def time(self, program, stage, seconds):
        self.seconds[program, stage] = min(seconds, self.seconds.get((program, stage), seconds))

    def kiln(self, text):
        self.ceiling.append(float(re.search(r"^ceiling: ([\d.]+)", text, re.M)[1]))
        for stage, (cpu, _wall, _gflop, rate, percent, *_) in rows(text).items():
            self.time("kiln", stage, cpu)
            self.rate[stage] = max(rate, self.rate.get(stage, rate))
            self.percent.setdefault(stage, []).append(percent)


def commands(args, size):
    """What to run for one size, in order: [(program, command line)]."""
    common = ["--size", size, "--threads", args.threads, "--repeats", args.repeats]
    model = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    no_vae, bf16 = (["--no-vae"] if args.no_vae else []), args.tier == "bf16"
    lines = {
        "kiln": [args.kiln, "bench", "model", *common, *model, *no_vae, *(["--cpu-bf16"] if bf16 else [])],
        "openvino": [sys.executable, HERE / "openvino_sd15.py", *common, *model, *([] if bf16 else ["--f32"])],
        "torch": [sys.executable, HERE / "torch_sd15.py", *common, *no_vae, *(["--bf16"] if bf16 else [])],
    }
    return [(program, lines[program]) for program in ["kiln", *args.peer]]


def measure(args):
    best = Best()
    for number in range(args.rounds):
        for size in args.size:
            for program, command in commands(args, size):
                load = os.getloadavg()[0]
                text = output(command)
                if program == "kiln":
                    best.kiln(text)
                else:
                    for stage, columns in rows(text).items():
                        best.time(program, stage, columns[0])
                times = ", ".join(f"{stage} {columns[0]:.3f}" for stage, columns in rows(text).items())
                print(f"# round {number + 1}, load {load:.1f}, {program}: {times}", file=sys.stderr, flush=True)
    return best


def report(args, best):
    """Prints the table; True if every stage reaches its bar."""
    ceiling, bar, all_hold = max(best.ceiling), BARS[args.tier], True
    print(f"ceiling: {ceiling:.0f} GFLOP/s a core (seen: {min(best.ceiling):.0f} to {ceiling:.0f}); "
          f"bar: {bar:.0f} % ({args.tier}, from {BAR_FROM}²); {args.threads} thread(s), best of {args.rounds} x {args.repeats}")
    print(f"{'stage':<16}{'tier':>6}{'kiln CPU s':>12}{'of ceiling':>12}{'in one run':>14}"
          + "".join(f"{peer + ' CPU s':>16}{'ratio':>7}" for peer in args.peer))
    for stage, rate in best.rate.items():
        percent, ours = 100.0 * rate / ceiling, best.seconds["kiln", stage]
        holds = percent >= bar or int(stage.split()[-1]) < BAR_FROM
        all_hold &= holds
        seen = f"{min(best.percent[stage]):.0f} to {max(best.percent[stage]):.0f} %"
        line = f"{stage:<16}{args.tier:>6}{ours:>12.3f}{percent:>10.0f} %{seen:>14}"
        for peer in args.peer:
            theirs = best.seconds.get((peer, stage))
            line += f"{theirs:>16.3f}{theirs / ours:>7.2f}" if theirs else f"{'':>23}"
        print(line + ("" if holds else "  below the bar"))
    return all_hold


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kiln", default="target/release/kiln")
    parser.add_argument("--tier", choices=list(BARS), default="bf16")
    parser.add_argument("--size", type=int, action="append")
    parser.add_argument("--peer", choices=["openvino", "torch"], action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a stage per process")
    parser.add_argument("--no-vae", action="store_true")
    parser.add_argument("--checkpoint", help="an SD1.5 file for kiln and OpenVINO instead of synthetic weights")
    args = parser.parse_args()
    args.size, args.peer = args.size or [64, 256, 512], args.peer or ["openvino", "torch"]
    sys.exit(0 if report(args, measure(args)) else 1)


if __name__ == "__main__":
    main()
