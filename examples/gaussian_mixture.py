#!/usr/bin/env python
# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The methods on data of one or two dimensions, where everything can be seen and most of it is known in closed form.

    python examples/gaussian_mixture.py afm                      # one step, with optimal transport
    python examples/gaussian_mixture.py gan                      # the same without optimal transport
    python examples/gaussian_mixture.py fm                       # flow matching
    python examples/gaussian_mixture.py cafm                     # flow matching, then continuous adversarial training
    python examples/gaussian_mixture.py afm --dim 2 --data two_moons

The losses, the gradient normalisation and the directional derivative are those of the training scripts.
"""

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from adversarial_flow import DirectionalDerivative
from adversarial_flow.utils.afm import FlowBatch, adversarial_gradient, discriminator_loss
from adversarial_flow.utils.cafm import discriminator_loss as velocity_discriminator_loss
from adversarial_flow.utils.cafm import generator_loss as velocity_generator_loss
from adversarial_flow.utils.errors import InputError, run_script
from adversarial_flow.utils.flow import interpolate, step_times, step_weight, transport
from adversarial_flow.utils.gradient_normalization import GradientNormalization, gradient_square
from adversarial_flow.utils.losses import flow_matching_loss, optimal_transport_loss
from adversarial_flow.utils.schedules import scheduled_value
from adversarial_flow.utils.training import frozen
from adversarial_flow.utils.velocity import VelocityBatch


matplotlib.use("Agg")

MEANS, DEVIATION = (-1.5, -0.5, 0.5, 1.5), 0.05  # of the mixture
BATCH = 512
METHODS = ("afm", "gan", "fm", "cafm")
DATA = {1: ("mixture",), 2: ("eight_gaussians", "two_moons")}


# ---------------------------------------------------------------------------------------------------------------- data


def draw_data(name: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of shape `(count, dim)` and their classes, of shape `(count,)`."""
    noise = torch.randn(count, 2, generator=generator)
    if name == "mixture":
        labels = torch.randint(len(MEANS), (count,), generator=generator)
        return torch.tensor(MEANS)[labels, None] + DEVIATION * noise[:, :1], labels
    if name == "eight_gaussians":
        labels = torch.randint(8, (count,), generator=generator)
        angles = labels * (2 * math.pi / 8)
        return 1.5 * torch.stack([angles.cos(), angles.sin()], dim=1) + 0.1 * noise, labels
    labels = torch.randint(2, (count,), generator=generator)
    angles = math.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25], dim=1)
    moons = torch.where(labels[:, None] == 0, upper, -upper)
    return 1.2 * moons + 0.07 * noise, labels


def mixture_quantile(probabilities: np.ndarray) -> np.ndarray:
    """The inverse of the mixture's distribution function, by interpolation on a fine grid."""
    grid = np.linspace(-2.5, 2.5, 200_001)
    cumulative = np.mean([normal_cdf((grid - mean) / DEVIATION) for mean in MEANS], axis=0)
    return np.interp(probabilities, cumulative, grid)


def normal_cdf(values: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.as_tensor(values)).numpy()


def optimal_map(noise: torch.Tensor) -> torch.Tensor:
    """The monotone map from N(0, 1) to the mixture, which is the optimal transport between them: F^-1(Phi(z))."""
    return torch.as_tensor(mixture_quantile(normal_cdf(noise.double().numpy())), dtype=noise.dtype)


def wasserstein(samples: torch.Tensor) -> float:
    """The 1-Wasserstein distance of samples of shape `(N, 1)` to the mixture, by their quantiles."""
    ordered = np.sort(samples.flatten().double().numpy())
    quantiles = mixture_quantile((np.arange(len(ordered)) + 0.5) / len(ordered))
    return float(np.abs(ordered - quantiles).mean())


# ------------------------------------------------------------------------------------------------------------ networks


def sinusoids(values: torch.Tensor, scale: float = 100.0, count: int = 64) -> torch.Tensor:
    """Sines and cosines of `scale * values`, for values of shape `(batch, n)`: `(batch, n * count)`."""
    frequencies = scale * torch.exp(-math.log(10000) * torch.arange(count // 2) / (count // 2))
    angles = values[..., None] * frequencies  # (B, n, count/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)


class MLP(nn.Module):
    """
    A network with the signature of the package's transformers and discriminators, for data of shape `(batch, dim)`.

    Args:
        outputs (`int`, *optional*): `dim` for a generator; `None` for a discriminator, whose logits are `(batch,)`.
        times (`int`): How many of s and t it reads.
        extra (`int`): More inputs beside the sample, as a discriminator that is given velocities needs.
    """

    def __init__(
        self, dim: int, outputs: int | None, times: int, width: int, num_layers: int = 4, num_classes: int = 0,
        norm: bool = False, extra: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.times, self.scalar = times, outputs is None
        self.class_embed = nn.Embedding(num_classes + 1, 64) if num_classes else None  # the last one is "no class"
        inputs = 64 * (dim + extra + times) + (64 if num_classes else 0)
        layers = []
        for _ in range(num_layers):
            layers += [nn.Linear(inputs, width)] + ([nn.LayerNorm(width)] if norm else []) + [nn.SiLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1 if self.scalar else outputs))

    def forward(self, hidden_states, timestep=None, class_labels=None, r_timestep=None, return_dict=False):
        features = [sinusoids(hidden_states)]
        if self.times:
            times = torch.stack([timestep, r_timestep][: self.times], dim=1)  # (B, times)
            features.append(sinusoids(times))
        if self.class_embed is not None:
            features.append(self.class_embed(class_labels))
        output = self.layers(torch.cat(features, dim=1))
        return (output.squeeze(-1) if self.scalar else output,)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Setting:
    """What is trained, and how."""

    method: str = "afm"
    data: str = "mixture"
    steps: int = 2000  # generator updates
    seed: int = 0
    num_steps: int | None = 1  # of afm and gan; None for any
    width: int = 128
    discriminator_width: int = 128
    learning_rate: float = 1e-3
    lambda_ot: float = 0.05
    lambda_ot_end: float | None = None
    lambda_gp: float = 0.1
    lambda_cp: float = 0.01
    ttur: int = 1  # discriminator updates for a generator update
    velocity_as_input: bool = False  # cafm's discriminator judges velocities as an input and not by its derivative

    @property
    def dim(self) -> int:
        return 1 if self.data in DATA[1] else 2


@dataclass
class Trained:
    """An averaged generator and what it was trained for."""

    generator: MLP
    setting: Setting

    @torch.no_grad()
    def path(self, noise: torch.Tensor, num_steps: int | None = None) -> torch.Tensor:
        """The points of a sample on its way from noise to data, of shape `(steps + 1, batch, dim)`."""
        flow = self.setting.method in ("fm", "cafm")
        num_steps = num_steps or (64 if flow else self.setting.num_steps or 4)
        points = [noise]
        for i in range(num_steps, 0, -1):
            source, target = (torch.full((len(noise),), j / num_steps) for j in (i, i - 1))
            output = self.generator(points[-1], source, r_timestep=target)[0]
            kind = "sample" if not flow and self.setting.num_steps == 1 else "velocity"
            points.append(transport(output, points[-1], source, target, kind))
        return torch.stack(points)

    def sample(self, noise: torch.Tensor, num_steps: int | None = None) -> torch.Tensor:
        return self.path(noise, num_steps)[-1]


def adam(model: nn.Module, setting: Setting) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=setting.learning_rate, betas=(0.0, 0.9))


def averaged(generator: MLP, setting: Setting) -> tuple[EMAModel, MLP]:
    return EMAModel(generator.parameters(), decay=0.99, min_decay=0.99), copy.deepcopy(generator)


def flow_batch(setting: Setting, generator: torch.Generator) -> FlowBatch:
    x, _ = draw_data(setting.data, BATCH, generator)
    noise = torch.randn(4, *x.shape, generator=generator)
    timestep, r_timestep = step_times(setting.num_steps, torch.rand(BATCH, 2, generator=generator))
    return FlowBatch(
        source=interpolate(x, noise[0], timestep),
        target=interpolate(x, noise[1], r_timestep),
        timestep=timestep,
        r_timestep=r_timestep,
        weight=step_weight(timestep, r_timestep),
        class_labels=None,
        penalty_noise=noise[2:],
        penalised=torch.arange(BATCH // 4),
        penalty_share=1.0,
        augmentation=torch.zeros(BATCH, 0),
    )


def train_adversarial(setting: Setting, progress: bool = False) -> Trained:
    """AFM; with `lambda_ot` 0 a plain (relativistic) GAN."""
    torch.manual_seed(setting.seed)
    random, dim = torch.Generator().manual_seed(setting.seed), setting.dim
    times = {1: 0, None: 2}.get(setting.num_steps, 1)
    generator = MLP(dim, dim, times, setting.width)
    discriminator = MLP(dim, None, min(times, 1), setting.discriminator_width)
    optimizer_g, optimizer_d = adam(generator, setting), adam(discriminator, setting)
    normalization, (ema, result) = GradientNormalization(), averaged(generator, setting)
    kind = "sample" if setting.num_steps == 1 else "velocity"

    def generate(batch: FlowBatch) -> torch.Tensor:
        output = generator(batch.source, batch.timestep, r_timestep=batch.r_timestep)[0]
        return transport(output, batch.source, batch.timestep, batch.r_timestep, kind)

    bar = tqdm(range(setting.steps), desc=setting.method, disable=not progress)
    for step in bar:
        for _ in range(setting.ttur):
            batch = flow_batch(setting, random)
            with torch.no_grad():
                fake = generate(batch)
            loss, terms = discriminator_loss(
                discriminator, batch, fake, setting.lambda_gp, setting.lambda_cp, 0.01, augmentation_probability=0
            )
            optimizer_d.zero_grad()
            loss.backward()
            optimizer_d.step()

        batch = flow_batch(setting, random)
        fake = generate(batch)
        gradient, loss = adversarial_gradient(discriminator, batch, fake, augmentation_probability=0)
        factor = normalization.update(gradient_square(gradient))
        end = setting.lambda_ot if setting.lambda_ot_end is None else setting.lambda_ot_end
        weight = scheduled_value(setting.lambda_ot, end, step, setting.steps)
        transport_loss = optimal_transport_loss(fake, batch.source, batch.weight)
        optimizer_g.zero_grad()
        torch.autograd.backward([fake, weight * transport_loss], [factor * gradient, torch.ones(())])
        optimizer_g.step()
        ema.step(generator.parameters())
        if step % 50 == 0:
            bar.set_postfix(D=terms["discriminator_loss"].item(), G=loss.item(), OT=transport_loss.item())
    ema.copy_to(result.parameters())
    return Trained(result, setting)


def velocity_batch(setting: Setting, generator: torch.Generator) -> VelocityBatch:
    x, _ = draw_data(setting.data, BATCH, generator)
    noise, timestep = torch.randn(x.shape, generator=generator), torch.rand(BATCH, generator=generator)
    return VelocityBatch(interpolate(x, noise, timestep), noise - x, timestep, None)


def train_flow_matching(setting: Setting, start: MLP | None = None, progress: bool = False) -> Trained:
    torch.manual_seed(setting.seed)
    random, dim = torch.Generator().manual_seed(setting.seed + 1000 * (start is not None)), setting.dim
    generator = MLP(dim, dim, 1, setting.width, norm=True) if start is None else copy.deepcopy(start)
    optimizer = torch.optim.Adam(generator.parameters(), lr=setting.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    ema, result = averaged(generator, setting)
    bar = tqdm(range(setting.steps), desc="fm", disable=not progress)
    for step in bar:
        batch = velocity_batch(setting, random)
        loss = flow_matching_loss(generator(batch.hidden_states, batch.timestep)[0], batch.velocity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.step(generator.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=loss.item())
    ema.copy_to(result.parameters())
    return Trained(result, setting)


class VelocityJudge(nn.Module):
    """What the paper argues against: a discriminator that takes the velocity as an input. Called as the derivative."""

    def __init__(self, discriminator: MLP):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, hidden_states, timestep, class_labels=None, directions=()):
        logits = [self.discriminator(torch.cat([hidden_states, v], dim=1), timestep)[0] for v in directions]
        return torch.zeros(len(timestep)), tuple(logits)


def train_continuous(setting: Setting, start: MLP | None = None, warmup: int = 0, progress: bool = False) -> Trained:
    """CAFM, from a flow-matching model, or from scratch."""
    torch.manual_seed(setting.seed + 1)
    random, dim = torch.Generator().manual_seed(setting.seed + 1), setting.dim
    generator = MLP(dim, dim, 1, setting.width, norm=True) if start is None else copy.deepcopy(start)
    discriminator = MLP(dim, None, 1, setting.discriminator_width, norm=True, extra=dim * setting.velocity_as_input)
    derivative = (VelocityJudge if setting.velocity_as_input else DirectionalDerivative)(discriminator)
    optimizer_g, optimizer_d = adam(generator, setting), adam(discriminator, setting)
    ema, result = averaged(generator, setting)

    def update_discriminator() -> dict:
        batch = velocity_batch(setting, random)
        with torch.no_grad():
            velocity = generator(batch.hidden_states, batch.timestep)[0]
        loss, terms = velocity_discriminator_loss(derivative, batch, velocity, setting.lambda_cp)
        optimizer_d.zero_grad()
        loss.backward()
        optimizer_d.step()
        return terms

    for _ in range(warmup):
        update_discriminator()
    bar = tqdm(range(setting.steps), desc="cafm", disable=not progress)
    for step in bar:
        for _ in range(setting.ttur):
            terms = update_discriminator()
        batch = velocity_batch(setting, random)
        velocity = generator(batch.hidden_states, batch.timestep)[0]
        with frozen(derivative):
            loss, _ = velocity_generator_loss(derivative, batch, velocity, setting.lambda_ot)
            optimizer_g.zero_grad()
            loss.backward()
        optimizer_g.step()
        ema.step(generator.parameters())
        if step % 50 == 0:
            bar.set_postfix(D=terms["discriminator_loss"].item(), G=loss.item())
    ema.copy_to(result.parameters())
    return Trained(result, setting)


CAFM = {"method": "cafm", "ttur": 8, "lambda_cp": 0.001, "lambda_ot": 0.0, "learning_rate": 1e-4}


def train(setting: Setting, start: MLP | None = None, progress: bool = False) -> Trained:
    """Trains by the method of the setting; CAFM from a flow-matching model of the same size."""
    if setting.method in ("afm", "gan"):
        return train_adversarial(setting, progress)
    if setting.method == "fm":
        return train_flow_matching(setting, progress=progress)
    if start is None:
        start_setting = Setting("fm", setting.data, setting.steps, setting.seed, width=setting.width)
        start = train_flow_matching(start_setting, progress=progress).generator
    steps = max(setting.steps // 10, 1)
    return train_continuous(
        Setting(**vars(setting) | CAFM | {"steps": steps}), start, warmup=setting.steps, progress=progress
    )


# ------------------------------------------------------------------------------------------------------------ pictures


def plot_flow(trained: Trained, path: Path, title: str) -> None:
    """
    The probability flow as a histogram over time (noise is on the left) with the learned trajectories on it, and what
    they end in. For data of two dimensions: arrows from noise to samples.
    """
    random = torch.Generator().manual_seed(12345)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 1) if trained.setting.dim == 1 else (1, 1))
    data, _ = draw_data(trained.setting.data, 20_000, random)
    noise = torch.randn(data.shape, generator=random)
    samples = trained.sample(noise)
    if trained.setting.dim == 1:
        times = torch.linspace(0, 1, 200)
        points = interpolate(data[None].expand(200, -1, 1), noise[None].expand(200, -1, 1), times)
        counts = np.stack([np.histogram(p.flatten(), bins=200, range=(-3, 3), density=True)[0] for p in points], 1)
        axes[0].imshow(counts[:, ::-1] ** 0.5, extent=(1, 0, -3, 3), origin="lower", aspect="auto", cmap="Blues")
        lines = trained.path(torch.linspace(-2.6, 2.6, 41)[:, None]).squeeze(-1)  # (steps + 1, 41)
        axes[0].plot(np.linspace(1, 0, len(lines)), lines.numpy(), color="tab:red", linewidth=0.8)
        axes[0].set(xlabel="t (1: noise, 0: data)", ylabel="x", title=title)
        bins = np.linspace(-3, 3, 200)
        for values, label in ((data, "data"), (samples, "samples")):
            options = {"bins": bins, "density": True, "orientation": "horizontal", "histtype": "step"}
            axes[1].hist(values.flatten().numpy(), label=label, **options)
    else:
        start, end = noise[:300].T.numpy(), samples[:300].T.numpy()
        axes[0].quiver(*start, *(end - start), angles="xy", scale_units="xy", scale=1, width=0.002, color="tab:red")
        axes[0].plot(*start, ".", color="tab:blue", markersize=2)
        axes[0].set(title=title, aspect="equal")
        for values, label in ((data, "data"), (samples, "samples")):
            axes[1].plot(*values[:2000].T.numpy(), ".", markersize=1, label=label)
        axes[1].set(aspect="equal")
    axes[1].legend(loc="upper right", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--dim", type=int, choices=(1, 2), default=1)
    parser.add_argument("--data", help="Of two dimensions: eight_gaussians (default) or two_moons.")
    parser.add_argument("--steps", type=int, default=2000, help="Generator updates.")
    parser.add_argument("--num_steps", default="1", help="Of afm and gan: steps from noise to data, or any.")
    parser.add_argument("--lambda_ot", type=float, default=0.05, help="Of afm.")
    parser.add_argument("--lambda_ot_end", type=float, help="Of afm: decay to this by a cosine.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="The picture; default METHOD.png.")
    args = parser.parse_args(argv)
    args.data = args.data or DATA[args.dim][0]
    if args.data not in DATA[args.dim]:
        raise InputError(f"--data {args.data}: of --dim {args.dim} there are: {', '.join(DATA[args.dim])}.")
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}.")
    if args.num_steps != "any" and not (args.num_steps.isdigit() and int(args.num_steps) > 0):
        raise InputError(f"--num_steps must be a positive number or any, not {args.num_steps}.")
    args.num_steps = None if args.num_steps == "any" else int(args.num_steps)
    args.output = args.output or Path(f"{args.method}.png")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    weights = {"lambda_ot": args.lambda_ot, "lambda_ot_end": args.lambda_ot_end}
    weights = weights if args.method == "afm" else {"lambda_ot": 0.0}
    trained = train(Setting(args.method, args.data, args.steps, args.seed, args.num_steps, **weights), progress=True)
    noise = torch.randn(20_000, trained.setting.dim, generator=torch.Generator().manual_seed(2))
    samples = trained.sample(noise)
    print(f"Transport cost E |G(z) - z|^2: {(samples - noise).square().sum(1).mean():.4f}")
    if trained.setting.dim == 1:
        print(f"1-Wasserstein distance to the data: {wasserstein(samples):.4f}")
        print(f"Mean squared distance to the optimal map: {(samples - optimal_map(noise)).square().mean():.4f}")
    plot_flow(trained, args.output, args.method.upper())
    print(f"Drawn: {args.output}")


if __name__ == "__main__":
    run_script(main)
