"""Speed and memory of the directional derivative: reverse mode against forward mode, which the released code uses.

    python benchmarks/derivative.py [--quick]

Every measurement runs in a process of its own, one after another, and is the median of `--repeats` steps after one
that is not counted; nothing else should run. Writes benchmarks/derivative.json and .md, and prints ratios.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from adversarial_flow import AdversarialFlowDiscriminator, AdversarialFlowTransformer2DModel, DirectionalDerivative
from adversarial_flow.utils.losses import (
    discriminator_velocity_loss,
    flow_matching_loss,
    generator_velocity_loss,
    potential_centering_penalty,
)
from adversarial_flow.utils.training import frozen


SIZES = {
    "width 384, 6 layers": {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 64},
    "width 768, 4 layers": {"num_layers": 4, "num_attention_heads": 12, "attention_head_dim": 64},
}
STEPS = ("plain", "reverse D", "forward D", "reverse G", "forward G", "flow matching")
TTUR = 16


def make_step(name: str, size: dict, batch: int):
    """A function that makes one step, without the optimiser, which costs the same in all of them."""
    torch.manual_seed(0)
    config = {"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "time_conditioning": "source"}
    config |= {"time_scale": 1.0, **size}
    x, real, velocity = torch.randn(3, batch, 4, 32, 32)
    t, labels = torch.rand(batch), torch.arange(batch)
    network = AdversarialFlowTransformer2DModel if name == "flow matching" else AdversarialFlowDiscriminator
    model = network(**config, norm_type="layer_norm" if name == "flow matching" else "rms_norm")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)

    def flow_matching():
        flow_matching_loss(model(x, t, class_labels=labels).sample, real).backward()

    def plain():
        model(x, t, labels).logits.sum().backward()

    derivative = None
    if name[-2:] in (" D", " G"):
        method = name.split()[0]
        derivative = DirectionalDerivative(model, method.replace("compiled", "reverse"), compile=method == "compiled")

    def discriminator():
        logits, (a, b) = derivative(x, t, labels, (real, velocity))
        (discriminator_velocity_loss(a, b) + 0.001 * potential_centering_penalty(logits)).backward()

    def generator():
        direction = velocity.clone().requires_grad_()
        with frozen(model):
            _, (a,) = derivative(x, t, labels, (direction,))
        generator_velocity_loss(a).backward()

    steps = {"flow matching": flow_matching, "plain": plain}
    step = steps.get(name) or (discriminator if name.endswith("D") else generator)

    def run():
        model.zero_grad()
        step()

    return run


def measure(name: str, size: str, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step, and the peak memory of this process over what it held before the first one."""
    step = make_step(name, SIZES[size], batch)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds[1:]), "gibibytes": (peak - before) / 2**20}


def report(results: dict) -> str:
    lines = ["| network | batch | step | reverse | forward | times faster | times less memory |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for key, row in results.items():
        size, batch = key.rsplit(", batch ", 1)
        for step in ("D", "G"):
            reverse, forward = row[f"reverse {step}"], row[f"forward {step}"]
            cells = [f"{m['seconds']:.2f} s, {m['gibibytes']:.2f} GiB" for m in (reverse, forward)]
            cells += [f"{forward[k] / max(reverse[k], 1e-9):.2f}" for k in ("seconds", "gibibytes")]
            lines.append(f"| {size} | {batch} | {step} | {' | '.join(cells)} |")
    lines += ["", "| network | batch | D step | over forward mode | over its floor | CAFM over flow matching |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for key, row in results.items():
        size, batch = key.rsplit(", batch ", 1)
        seconds = {name: value["seconds"] for name, value in row.items()}
        forward_g = seconds["flow matching"] / 3  # a forward is a third of a forward and a backward
        for step in [name for name in ("reverse D", "compiled D") if name in seconds]:
            iteration = TTUR * (seconds[step] + forward_g) + seconds["reverse G"] + seconds["flow matching"]
            cells = [
                f"{step.removesuffix(' D')}: {seconds[step]:.2f} s",
                f"{seconds['forward D'] / seconds[step]:.2f} times faster",
                f"{seconds[step] / (2 * seconds['plain']):.2f}",
                f"{iteration / ((TTUR + 1) * seconds['flow matching']):.2f}",
            ]
            lines.append(f"| {size} | {batch} | {' | '.join(cells)} |")
    lines += [
        "",
        "The floor of a D step is two forward and backward passes of D. A CAFM iteration is "
        f"{TTUR} D steps, each with a forward of G, and one G step; it is compared with as many flow-matching steps "
        "of the same network, on as many images.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="The smaller network and batch 4 only.")
    parser.add_argument("--compile", action="store_true", help="Measure the compiled D step too (minutes to compile).")
    parser.add_argument("--measure", nargs=3, metavar=("STEP", "SIZE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        step, size, batch = args.measure
        print(json.dumps(measure(step, size, int(batch), args.repeats)))
        return
    results = {}
    for size in list(SIZES)[: 1 if args.quick else None]:
        for batch in args.batch_sizes[: 1 if args.quick else None]:
            row = results[f"{size}, batch {batch}"] = {}
            for step in (*STEPS, *(["compiled D"] if args.compile else [])):
                command = [
                    sys.executable,
                    __file__,
                    "--repeats",
                    str(args.repeats),
                    "--measure",
                    step,
                    size,
                    str(batch),
                ]
                row[step] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(size, batch, step, row[step], flush=True)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n")
    path.with_suffix(".md").write_text(f"# The derivative: reverse against forward mode\n\n{report(results)}\n")
    print("\n" + report(results))


if __name__ == "__main__":
    main()
