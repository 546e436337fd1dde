# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What the papers say of their toys, measured over several seeds next to what the theory says."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from toy_data import MEANS, classifier_gradient, draw_data, euler_flow, exact_velocity, optimal_map, wasserstein
from toy_pictures import draw_flow, draw_maps
from toy_runs import (
    AFM,
    AT_DATA,
    AT_DATA_TWICE,
    BY_FLOW,
    CAFM,
    CAFM_INPUT,
    CONDITIONAL,
    CONTROL,
    CONTROL_RATES,
    DECAYED,
    FLOW,
    GAN,
    GUIDED_FLOW,
    HEAVIER,
    HEAVY,
    NOISE,
    ON_FLOW,
    ONE_STEP,
    SCRATCH,
    SCRATCH_INPUT,
    SEEDS,
    SMALL,
    START,
    W_GUIDED,
    Paths,
    train_all,
)

from adversarial_flow.utils.flow import interpolate


# ------------------------------------------------------------------------------------------------------------ measures


def to_data(paths: np.ndarray) -> np.ndarray:
    """The 1-Wasserstein distance of the samples to the data, for each seed."""
    return np.array([wasserstein(torch.as_tensor(p[-1])) for p in paths])


def to_optimal_map(paths: np.ndarray) -> np.ndarray:
    """E |G(z) - T(z)|^2 with the optimal map T, for each seed."""
    return np.square(paths[:, -1] - optimal_map(NOISE)[:, 0].numpy()).mean(-1)


def to_flow(paths: np.ndarray) -> np.ndarray:
    """The mean squared distance to the flow's paths at the times between noise and data, for each seed."""
    steps = paths.shape[1] - 1
    exact = [optimal_map(NOISE, timestep=1 - i / steps)[:, 0].numpy() for i in range(1, steps)]
    return np.square(paths[:, 1:-1] - np.stack(exact)).mean((-2, -1))


def cost(paths: np.ndarray) -> np.ndarray:
    """The transport cost E |G(z) - z|^2, for each seed."""
    return np.square(paths[:, -1] - paths[:, 0]).mean(-1)


def between_seeds(paths: np.ndarray) -> np.ndarray:
    """E |G(z) - G'(z)|^2 for each pair of seeds."""
    return np.array([np.square(a - b).mean() for a, b in combinations(paths[:, -1], 2)])


def velocity_error(paths: np.ndarray) -> np.ndarray:
    """E |v - E[z - x | x_t]|^2 along the paths of many Euler steps, for each seed: how far v is from the flow's."""
    steps = paths.shape[1] - 1
    errors = []
    for i in range(steps):
        time, points = 1 - i / steps, torch.as_tensor(paths[:, i].reshape(-1)).double()
        exact = exact_velocity(points, time, None, "mixture").numpy().reshape(len(paths), -1)
        errors.append(np.square((paths[:, i] - paths[:, i + 1]) * steps - exact).mean(-1))
    return np.mean(errors, axis=0)


def exact_displacement() -> np.ndarray:
    """Where guidance moves the samples of the exact flow, for all classes and noise."""
    flows = [[euler_flow(NOISE, label, w)[:, 0].numpy() for label in range(len(MEANS))] for w in (1.0, W_GUIDED)]
    return (np.array(flows[1]) - np.array(flows[0])).ravel()


def displacement(paths: np.ndarray, unguided: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    How guidance moves the map, G_guided(z, c) - G(z, c), compared with [`exact_displacement`]: the slope of the one by
    the other and their correlation, for each seed.
    """
    moved = (paths[:, :, -1] - unguided[:, :, -1]).reshape(len(paths), -1)
    slopes = moved @ exact / (exact @ exact)
    return slopes, np.array([np.corrcoef(m, exact)[0, 1] for m in moved])


def share_pushed(timestep: float) -> float:
    """The share of points x_t at which the exact classifier's gradient is over 0.1, of its own class."""
    random = torch.Generator().manual_seed(0)
    x, labels = draw_data("classes", 20_000, random)
    noise = torch.randn(x.shape, generator=random)
    points = interpolate(x, noise, torch.full((len(x),), timestep))[:, 0]
    pushed = [
        classifier_gradient(points[labels == label], timestep, label, "classes").abs() > 0.1
        for label in range(len(MEANS))
    ]
    return torch.cat(pushed).double().mean().item()


# -------------------------------------------------------------------------------------------------------------- claims


@dataclass
class Finding:
    claim: str
    measured: str
    holds: bool
    reason: str = ""  # found for what does not hold


@dataclass
class Claim:
    """A section of the table: lines of measures, and what is claimed of them with what was found."""

    title: str
    columns: list[str]
    lines: list[str]
    findings: list[Finding]
    picture: str

    def section(self, number: int) -> list[str]:
        blocks = [[f"## {number}. {self.title}"]]
        blocks.append(["| " + " | ".join(self.columns) + " |", "| --- " * len(self.columns) + "|", *self.lines])
        for finding in self.findings:
            if finding.holds:
                blocks.append([f"**Holds.** {finding.claim}: {finding.measured}"])
            else:
                blocks.append([f"**Does not hold.** {finding.claim}: {finding.measured} {finding.reason}".rstrip()])
        blocks.append([f"![{self.title}]({self.picture}.png)"])
        return [line for block in blocks for line in (*block, "")]


def line(name: str, *values: np.ndarray | float | None) -> str:
    """Mean ± standard deviation of measures, a number of the theory, or nothing."""
    cells = []
    for value in values:
        deviation = f" ± {np.std(value, ddof=1):.4f}" if np.ndim(value) else ""
        cells.append("" if value is None else f"{np.mean(value):.4f}{deviation}")
    return f"| {name} | " + " | ".join(cells) + " |"


W1, MAP = "1-Wasserstein distance to the data", "E \\|G(z) - T(z)\\|²"


def one_map(paths: Paths) -> Claim:
    fits = to_data(paths[GAN]) < 0.1
    gan, afm = (between_seeds(values).mean() for values in (paths[GAN][fits], paths[AFM]))
    return Claim(
        "AFM learns the same map for every seed",
        ["", "E \\|G(z) - G'(z)\\|² of pairs of seeds", f"{MAP}, T the optimal map"],
        [line(name, between_seeds(paths[name]), to_optimal_map(paths[name])) for name in (GAN, AFM)]
        + [line("theory, with optimal transport", 0.0, 0.0)],
        [
            Finding(
                "There is one optimal map and every seed finds it; a GAN finds any, where it trains at all",
                f"{fits.sum()} of {len(fits)} GANs fit the data (the others collapse), and two of these are "
                f"{gan / afm:.0f} times further from each other than two seeds of AFM (20 at least were asked for).",
                bool(gan >= 20 * afm and to_data(paths[AFM]).max() < 0.1),
            )
        ],
        "maps",
    )


def transport_weight(paths: Paths) -> Claim:
    error = {name: to_optimal_map(paths[name]) for name in ONE_STEP}
    distance = {name: to_data(paths[name]) for name in ONE_STEP}
    identity, optimal = paths[AFM][:1, 0], optimal_map(NOISE)[:, 0].numpy()[None]
    lines = [line(name, distance[name], error[name], cost(paths[name])) for name in ONE_STEP]
    for name, samples in (("theory: the optimal map", optimal), ("theory: the identity", identity)):
        exact = np.stack([identity, samples], axis=1)  # (1, 2, noise): a path of one step
        lines.append(line(name, *(measure(exact).item() for measure in (to_data, to_optimal_map, cost))))
    moved = np.sqrt(cost(paths[HEAVIER]).mean() / np.square(optimal - identity).mean())
    closest = min(np.median(error[GAN]), np.median(error[SMALL])) / np.median(error[AFM])
    return Claim(
        "The weight of optimal transport: local minima, the optimal map, the identity",
        ["", W1, f"{MAP}, T the optimal map", "transport cost E \\|G(z) - z\\|²"],
        lines,
        [
            Finding(
                "With none or little, training ends in a local minimum",
                f"the median seed is {closest:.0f} times further from the optimal map at least than with 0.05.",
                bool(closest > 5),
            ),
            Finding(
                "With too much, the generator tends to the identity",
                f"with 5 samples move {moved:.2f} of the way of the optimal map (root mean square).",
                bool(moved < 1 / 3),
            ),
            Finding(
                "From the same start, a weight that decays is better than a constant one",
                f"1 to 0.05 ends {distance[DECAYED].mean():.4f} from the data, a constant 1 "
                f"{distance[HEAVY].mean():.4f}; it is closer on {(distance[DECAYED] < distance[HEAVY]).sum()} of "
                f"{len(SEEDS)} seeds. Here a constant 0.05 is even better, {distance[AFM].mean():.4f}: in one "
                "dimension it is small enough for the data and large enough for one map.",
                bool(distance[DECAYED].mean() < distance[HEAVY].mean()),
            ),
        ],
        "maps",
    )


def standing(num_steps: int) -> np.ndarray:
    """The paths of the identity, of shape (1, steps + 1, noise)."""
    return np.repeat(NOISE.T.numpy()[:, None], num_steps + 1, axis=1)


def follows_the_flow(paths: Paths, claim: str, names: dict[str, int]) -> Finding:
    """Of runs by name, with their numbers of steps."""
    shares = [to_flow(paths[name]) / to_flow(standing(n)) for name, n in names.items()]
    distances = [to_data(paths[name]) for name in names]
    closer = [d < to_data(paths[f"flow matching, {n} steps"]) for d, n in zip(distances, names.values())]
    return Finding(
        claim,
        f"between noise and data its error is {np.max(shares):.2f} of the identity's at most; "
        f"{' and '.join(f'{d.mean():.4f}' for d in distances)} from the data with 2 and 4 steps, closer than flow "
        "matching with as many.",
        bool(np.max(shares) < 1 / 3 and np.all(closer)),
    )


def few_steps(paths: Paths) -> Claim:
    flow, any_steps = "flow matching, {} steps", "AFM for any step, {} taken"
    fixed, any_step = ({name.format(n): n for n in (2, 4)} for name in ("AFM, {} steps", any_steps))
    distance = {name: to_data(points) for name, points in paths.items() if points.ndim == 3}
    still = {n: to_flow(standing(n)).item() for n in (2, 4)}
    exact = {n: euler_flow(NOISE, None, 1.0, n, "mixture") for n in (1, 2, 4, 64)}
    lines = [line(name, distance[name], None) for name in (AFM, any_steps.format(1))]
    lines += [line(name, distance[name], to_flow(paths[name])) for name in (*fixed, *any_step)]
    lines += [line("flow matching, 1 step", distance[flow.format(1)], None)]
    lines += [line(flow.format(n), distance[flow.format(n)], to_flow(paths[flow.format(n)])) for n in (2, 4, 64)]
    lines += [line(f"theory: the exact velocity, Euler steps: {n}", wasserstein(exact[n]), None) for n in exact]
    lines += [line(f"theory: the identity, steps: {n}", wasserstein(NOISE), still[n]) for n in still]
    one, many = distance[AFM], distance[FLOW]
    return Claim(
        "One step of AFM against many of flow matching; few steps follow the flow",
        ["", W1, "E \\|x_t - T_t(z)\\|² between noise and data, T_t the flow"],
        lines + [line("theory: the flow", 0.0, 0.0)],
        [
            Finding(
                "One step of AFM does what flow matching needs many for",
                f"{one.mean():.4f} from the data, {one.max():.4f} at most; flow matching "
                f"{distance[flow.format(4)].mean():.4f} with 4 steps and {many.mean():.4f} with 64.",
                bool((one <= many).all()),
            ),
            follows_the_flow(paths, "AFM of 2 and of 4 steps follows the flow", fixed),
            follows_the_flow(paths, "AFM of any step does too, less closely (as published)", any_step),
        ],
        "steps",
    )


def continuous(paths: Paths) -> Claim:
    names = (FLOW, SCRATCH, SCRATCH_INPUT, START, CONTROL, CAFM, CAFM_INPUT)
    distance = {name: to_data(paths[name]) for name in names}
    wrong = {name: velocity_error(paths[name]) for name in names}
    mean = {name: values.mean() for name, values in distance.items()}
    changes = {name: mean[name] / mean[START] for name in (CAFM, CONTROL)}
    better = (distance[CAFM] < np.minimum(distance[START], distance[CONTROL])).sum()
    return Claim(
        "CAFM: from scratch, after a small flow model, and with a D that takes the velocity as an input",
        ["64 Euler steps", W1, f"{MAP}, T the flow", "E \\|v - E[z - x\\|x_t]\\|² on its paths"],
        [line(name, distance[name], to_optimal_map(paths[name]), wrong[name]) for name in names]
        + [line("theory: the flow", 0.0, 0.0, 0.0)],
        [
            Finding(
                "From scratch CAFM reaches flow matching, more slowly",
                f"{mean[SCRATCH]:.4f} from the data after 2,000 updates of G and 8,000 of D, flow matching "
                f"{mean[FLOW]:.4f} after 2,000; reached would be 1.25 times its distance, it is "
                f"{mean[SCRATCH] / mean[FLOW]:.2f} times.",
                bool(mean[SCRATCH] < min(1.25 * mean[FLOW], 0.05)),
                "The difference is less than the deviation of the seeds. It is the pace (from scratch CAFM is slower, "
                "as published): on seed 10, which is not one of these, 1,000 updates of G end at 0.0286, 2,000 at "
                "0.0201, both with 8,000 of D, and flow matching at 0.0177.",
            ),
            Finding(
                "Post-training improves a flow model that is too small, more flow matching does not",
                f"{mean[START]:.4f} before; {mean[CAFM]:.4f} after CAFM, the best of the three on {better} of "
                f"{len(SEEDS)} seeds; {mean[CONTROL]:.4f} after flow matching on as many batches as both networks "
                f"saw, at the best of {len(CONTROL_RATES)} rates for each seed.",
                bool(changes[CAFM] < 0.8 and changes[CONTROL] > 0.9),
            ),
            Finding(
                "A D that takes the velocity as an input fails: it tells a predicted velocity from the real ones, "
                "z - x, which differ from sample to sample at the same x_t, and pulls the generator off their mean",
                f"{mean[CAFM_INPUT]:.4f} from the data after post-training, and the error of the velocity grows from "
                f"{wrong[START].mean():.3f} to {wrong[CAFM_INPUT].mean():.3f} (CAFM: {wrong[CAFM].mean():.3f}); "
                f"{mean[SCRATCH_INPUT]:.4f} from scratch.",
                bool(
                    mean[CAFM_INPUT] > mean[START]
                    and mean[SCRATCH_INPUT] > 3 * mean[SCRATCH]
                    and wrong[CAFM_INPUT].mean() > wrong[START].mean()
                ),
            ),
        ],
        "cafm",
    )


def guidance(paths: Paths) -> Claim:
    plain, chance = paths[CONDITIONAL], "chance: pairs of seeds without guidance"
    exact = exact_displacement()
    moved = {name: displacement(paths[name], plain, exact) for name in (ON_FLOW, BY_FLOW, AT_DATA, AT_DATA_TWICE)}
    moved[GUIDED_FLOW] = displacement(paths[GUIDED_FLOW], paths["flow"], exact)
    moved[chance] = displacement(plain[1:], plain[:-1], exact)
    slope, correlation = moved[ON_FLOW]
    at_data = np.concatenate([moved[name][1] for name in (AT_DATA, AT_DATA_TWICE)])
    return Claim(
        f"Guidance: how far each map moves as the exact flow does with classifier-free guidance {W_GUIDED:g}",
        ["G_guided(z, c) - G(z, c), four classes", "slope by the exact movement", "correlation with it"],
        [line(name, *measures) for name, measures in moved.items()] + [line("theory: the exact flow", 1.0, 1.0)],
        [
            Finding(
                "A classifier on the flow moves the one-step map as classifier-free guidance moves the flow",
                f"correlation {correlation.mean():.2f}, {correlation.min():.2f} at least; slope {slope.mean():.2f} "
                "(the weight, 5, was chosen with another seed).",
                bool(correlation.min() > 0.8 and 0.5 < slope.mean() < 1.5),
            ),
            Finding(
                "At t = 0, where the classes of most samples are certain, it does not",
                f"correlation {at_data.mean():.2f} on average over seeds and both weights (chance is "
                f"± {moved[chance][1].std(ddof=1):.2f}), {at_data.max():.2f} at most. The exact classifier pushes "
                f"{share_pushed(0.0):.0%} of the samples at t = 0, those between two classes, and "
                f"{share_pushed(0.5):.0%} at t = 0.5.",
                bool(at_data.mean() < 0.4 and correlation.min() > at_data.max()),
            ),
        ],
        "guidance",
    )


def write_table(paths: Paths, file: Path, max_steps: int | None) -> None:
    command = "python examples/gaussian_mixture.py --reproduce" + (f" --steps {max_steps}" if max_steps else "")
    text = [
        "# The toys, measured",
        "",
        f"Written by `{command}`. Mean ± standard deviation over {len(SEEDS)} seeds (or over pairs of them), on an "
        f"even grid of {len(NOISE)} quantiles of the noise.",
        "",
    ]
    for number, claim in enumerate((one_map, transport_weight, few_steps, continuous, guidance), start=1):
        text += claim(paths).section(number)
    file.write_text("\n".join(text), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ pictures

SHOWN = torch.linspace(-2.4, 2.4, 33)  # the noise of the trajectories that are drawn


def flows(paths: Paths, rows: list[list[tuple[str, str]]]) -> Figure:
    """The trajectories of the first seed: one panel for each (name, title)."""
    size = (len(rows), len(rows[0]))
    figure, axes = plt.subplots(*size, figsize=(4 * size[1], 3 * size[0]), squeeze=False, layout="constrained")
    for axis, (name, title) in zip(axes.flat, [panel for row in rows for panel in row]):
        conditional = paths[name].ndim == 4
        shown = np.searchsorted(NOISE[:, 0], SHOWN[::3] if conditional else SHOWN)
        points = torch.as_tensor(paths[name][0])[..., shown]
        draw_flow(axis, "classes" if conditional else "mixture", list(points) if conditional else [points], title)
        axis.label_outer()
    return figure


def maps(paths: Paths) -> Figure:
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, ONE_STEP):
        draw_maps(axis, NOISE, paths[name][:, -1], name)
        axis.label_outer()
    return figure


def draw_pictures(paths: Paths, folder: Path) -> None:
    pictures = {
        "maps": maps(paths),
        "steps": flows(
            paths,
            [
                [(f"flow matching, {n} steps", f"Flow matching, {n} step{'s' * (n > 1)}") for n in (1, 4, 64)],
                [(AFM, "AFM, 1 step")] + [(f"AFM, {n} steps",) * 2 for n in (2, 4)],
            ],
        ),
        "cafm": flows(
            paths,
            [
                [(START, "A small flow model"), (CONTROL, "... after more flow matching")],
                [(CAFM, "... after CAFM"), (CAFM_INPUT, "... with a D that takes the velocity")],
            ],
        ),
        "guidance": flows(
            paths,
            [
                [
                    ("flow", "Flow"),
                    (GUIDED_FLOW, f"... with classifier-free guidance {W_GUIDED:g}"),
                ],
                [(CONDITIONAL, "AFM"), (ON_FLOW, "... guided by a classifier on the flow")],
                [
                    (AT_DATA, "... guided by a classifier at t = 0"),
                    (BY_FLOW, "... guided by a flow-matching model"),
                ],
            ],
        ),
    }
    for name, picture in pictures.items():
        picture.savefig(folder / f"{name}.png", dpi=100)
        plt.close(picture)


def reproduce(folder: Path, max_steps: int | None = None) -> None:
    """Trains everything, `max_steps` updates at most, and writes `table.md` and its pictures to `folder`."""
    paths = train_all(max_steps)
    write_table(paths, folder / "table.md", max_steps)
    draw_pictures(paths, folder)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"Written: {folder / 'table.md'} and its pictures")
