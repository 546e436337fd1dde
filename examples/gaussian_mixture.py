#!/usr/bin/env python
# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The methods on data of one or two dimensions, where everything can be seen and most of it is known in closed form.

    python examples/gaussian_mixture.py afm                      # one step, with optimal transport
    python examples/gaussian_mixture.py gan                      # the same without optimal transport
    python examples/gaussian_mixture.py fm                       # flow matching
    python examples/gaussian_mixture.py cafm                     # flow matching, then continuous adversarial training
    python examples/gaussian_mixture.py afm --num_steps 4        # or any
    python examples/gaussian_mixture.py afm --dim 2 --data two_moons
    python examples/gaussian_mixture.py afm --guidance classifier
    python examples/gaussian_mixture.py --reproduce              # every claim, over 5 seeds, as a table

`toy_data.py` holds the data and what is known of them, `toy_training.py` the methods, `toy_pictures.py` the pictures,
`toy_runs.py` everything that the claims need, `toy_claims.py` the measures and the table.
"""

import argparse
import math
import tempfile
from pathlib import Path

from toy_claims import reproduce
from toy_data import DATA, DEVIATIONS, MEANS, even_noise, optimal_map, wasserstein
from toy_pictures import plot_trained
from toy_training import GUIDANCE, METHODS, Trained, setting_of, train

from adversarial_flow.utils.errors import InputError, first_line, run_script


STEPS_HELP = (
    "Generator updates: 2000, of afm and gan with several steps 4000, of cafm 400 after a flow-matching model and a "
    "warm-up. With --reproduce at most this many of each kind: a quick look at an empty table."
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS, nargs="?")
    parser.add_argument("--dim", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--data", help="Of one dimension: mixture (default), classes; of two: eight_gaussians (default), two_moons."
    )
    parser.add_argument("--steps", type=int, help=STEPS_HELP)
    parser.add_argument("--num_steps", default="1", help="Of afm and gan: steps from noise to data, or any.")
    parser.add_argument("--lambda_ot", type=float, help="Of afm (0.05; 0.5 with several steps).")
    parser.add_argument("--lambda_ot_end", type=float, help="Of afm: decay to this by a cosine.")
    parser.add_argument(
        "--guidance",
        choices=tuple(GUIDANCE["afm"]),
        help="Of one-step afm: by a classifier on the flow (classifier), by it at t = 0 (classifier_at_data), or "
        "by a flow-matching model (classifier_free), which also guides fm itself. The data are then the classes.",
    )
    parser.add_argument("--guidance_scale", type=float, help=f"Its weight; default {GUIDANCE}.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="The picture; default METHOD.png.")
    parser.add_argument(
        "--reproduce",
        action="store_true",
        help="Train everything that the claims of the papers need, over 5 seeds, and write the table and its pictures "
        "to --output (a folder; default gaussian_mixture).",
    )
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}.")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed must be a number from 0 to {2**32 - 1}, not {args.seed}.")
    if args.reproduce:
        changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        others = [f"--{name}" for name in changed if name not in ("method", "reproduce", "steps", "output")]
        if others or args.method:
            others = ", ".join([args.method] * bool(args.method) + others)
            raise InputError(f"--reproduce trains all methods with settings of its own: leave out {others}.")
        args.output = args.output or Path("gaussian_mixture")
        check_writable(args.output)
    else:
        check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Sets the defaults that depend on other flags. Raises InputError for what does not go together."""
    if args.method is None:
        raise InputError(f"Choose a method: {', '.join(METHODS)}; or --reproduce.")
    if args.guidance and args.dim != 1:
        raise InputError("--guidance is for --dim 1.")
    args.data = args.data or ("classes" if args.guidance else DATA[args.dim][0])
    if args.data not in DATA[args.dim]:
        raise InputError(f"--data {args.data}: of --dim {args.dim} there are: {', '.join(DATA[args.dim])}.")
    if args.num_steps != "any" and not (args.num_steps.isdecimal() and 0 < int(args.num_steps) <= 1000):
        raise InputError(f"--num_steps must be a number from 1 to 1000 or any, not {args.num_steps}.")
    args.num_steps = None if args.num_steps == "any" else int(args.num_steps)
    for name in ("lambda_ot", "lambda_ot_end", "guidance_scale"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InputError(f"--{name} must be a number of at least 0, not {value}.")
        if value is not None and name != "guidance_scale" and args.method != "afm":
            raise InputError(f"--{name} is for afm, not for {args.method}: leave it out.")
    if args.num_steps != 1 and args.method not in ("afm", "gan"):
        raise InputError(f"--num_steps is for afm and gan: {args.method} always samples with 64 Euler steps.")
    if args.guidance is None and args.guidance_scale is not None:
        raise InputError(
            f"--guidance_scale needs --guidance: {', '.join(GUIDANCE.get(args.method, ())) or 'afm or fm'}."
        )
    if args.guidance is not None:
        if args.guidance not in GUIDANCE.get(args.method, ()) or args.num_steps != 1:
            raise InputError(f"--guidance {args.guidance} is for one-step afm (classifier_free for fm as well).")
        if args.data != "classes":
            raise InputError(f"--guidance needs --data classes, not {args.data}.")
    args.output = args.output or Path(f"{args.method}.png")
    if args.output.suffix not in (".png", ".pdf", ".svg") or args.output.is_dir():
        raise InputError(f"--output {args.output} must be a picture: a name that ends in .png, .pdf or .svg.")
    check_writable(args.output.parent)


def check_writable(folder: Path) -> None:
    """Creates the folder. Raises InputError if that can't be done, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--output: {folder} can't be written to ({first_line(error)}): choose another.") from error


def report(name: str, trained: Trained) -> None:
    noise = even_noise(4000)
    samples = trained.sample(noise)
    print(f"{name}:")
    print(f"  1-Wasserstein distance to the data: {wasserstein(samples):.4f}")
    print(f"  mean squared distance to the optimal map: {(samples - optimal_map(noise)).square().mean():.4f}")
    print(f"  transport cost E |G(z) - z|^2: {(samples - noise).square().mean():.4f}")


def report_classes(trained: Trained) -> None:
    for label, (mean, path) in enumerate(zip(MEANS, trained.paths_by_class(even_noise(4000)))):
        samples = path[-1]
        print(
            f"Class {label}: {samples.mean():.3f} ± {samples.std():.3f} (the data: {mean} ± {DEVIATIONS['classes']})"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.reproduce:
        reproduce(args.output, args.steps)
        return
    setting = setting_of(args.method, data=args.data, seed=args.seed, num_steps=args.num_steps)
    for name in ("steps", "lambda_ot", "lambda_ot_end"):
        if getattr(args, name) is not None:
            setattr(setting, name, getattr(args, name))
    if args.guidance is not None:
        setting.guidance, setting.guidance_scale = args.guidance, GUIDANCE[args.method][args.guidance]
        if args.guidance_scale is not None:
            setting.guidance_scale = args.guidance_scale
    trained = train(setting, progress=True)
    if not all(weight.isfinite().all() for weight in trained.generator.parameters()):
        raise InputError("The training diverged: choose smaller weights (--lambda_ot, --guidance_scale).")
    if setting.num_classes:
        report_classes(trained)
    elif setting.dim == 1:
        for name, model in (("Flow matching, before CAFM", trained.start), (args.method.upper(), trained)):
            if model is not None:
                report(name, model)
    num_steps = setting.num_inference_steps
    title = f"{args.method.upper()}, {num_steps} step{'s' * (num_steps > 1)}"
    plot_trained(trained, title).savefig(args.output, dpi=150)
    print(f"Drawn: {args.output}")


if __name__ == "__main__":
    run_script(main)
