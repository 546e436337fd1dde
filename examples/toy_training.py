# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Training of the methods on data of one or two dimensions.

The losses, the gradient normalisation and the directional derivative are those of the training scripts; that they
serve a small MLP as they serve a transformer is part of the point.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import nn
from toy_data import MEANS, dimension, draw_data
from tqdm import tqdm

from adversarial_flow import DirectionalDerivative
from adversarial_flow.utils.afm import FlowBatch, adversarial_gradient, discriminator_loss
from adversarial_flow.utils.cafm import discriminator_loss as velocity_discriminator_loss
from adversarial_flow.utils.cafm import generator_loss as velocity_generator_loss
from adversarial_flow.utils.flow import interpolate, step_times, step_weight, transport
from adversarial_flow.utils.gradient_normalization import GradientNormalization, gradient_square
from adversarial_flow.utils.losses import (
    classifier_free_guidance_loss,
    classifier_guidance_loss,
    flow_matching_loss,
    optimal_transport_loss,
)
from adversarial_flow.utils.schedules import scheduled_value
from adversarial_flow.utils.training import frozen
from adversarial_flow.utils.velocity import VelocityBatch


BATCH = 512
METHODS = ("afm", "gan", "fm", "cafm")
GUIDANCE = {  # of each method, with the guidance_scale that is used when none is given
    "afm": {"classifier": 5.0, "classifier_at_data": 5.0, "classifier_free": 4.0},
    "fm": {"classifier_free": 2.0},
}
# t' ~ U(0, this). Near t' = 1 the difference of two velocities is a push that does not depend on the sample any more.
GUIDANCE_TIMES = {"classifier": 1.0, "classifier_at_data": 0.0, "classifier_free": 0.5}


@dataclass
class Setting:
    """What is trained, and how. The defaults are those of AFM; [`setting_of`] gives those of the other methods."""

    method: str = "afm"
    data: str = "mixture"
    steps: int = 2000  # generator updates
    seed: int = 0
    num_steps: int | None = 1  # of afm and gan, from noise to data; None for any
    width: int = 128  # of the generator
    num_layers: int = 4  # of the generator
    discriminator_width: int = 128
    learning_rate: float = 1e-3
    discriminator_learning_rate: float = 1e-3
    lambda_ot: float = 0.05
    lambda_ot_end: float | None = None  # decay to it by a cosine
    lambda_gp: float = 0.1
    lambda_cp: float = 0.01
    ttur: int = 1  # discriminator updates for a generator update
    pretraining: int = 0  # of cafm: updates of flow matching before it
    warmup: int = 0  # of cafm: discriminator updates before the first generator update
    velocity_as_input: bool = False  # cafm's discriminator judges velocities as an input and not by its derivative
    guidance: str | None = None  # see GUIDANCE
    guidance_scale: float = 1.0

    @property
    def dim(self) -> int:
        return dimension(self.data)

    @property
    def num_classes(self) -> int:
        return len(MEANS) if self.data == "classes" else 0

    @property
    def is_flow(self) -> bool:
        """Whether the generator is a velocity field and no map from one time to another."""
        return self.method in ("fm", "cafm")

    @property
    def prediction_type(self) -> str:
        return "velocity" if self.is_flow or self.num_steps != 1 else "sample"

    @property
    def num_inference_steps(self) -> int:
        return 64 if self.is_flow else self.num_steps or 4


def setting_of(method: str, **changes) -> Setting:
    """The setting of a method, with changes."""
    defaults = {
        "gan": {"lambda_ot": 0.0},
        # A generator that is too small for its velocity: what post-training is for.
        "cafm": {
            "width": 4, "num_layers": 1, "pretraining": 10_000, "warmup": 1000, "steps": 400, "ttur": 8,
            "lambda_ot": 0.0, "lambda_cp": 0.001,
        },
    }  # fmt: skip
    setting = Setting(method, **defaults.get(method, {}))
    if changes.get("num_steps", 1) != 1:
        setting.steps, setting.lambda_ot = 4000, 10 * setting.lambda_ot
    return replace(setting, **changes)


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
        dim (`int`): Of the samples.
        outputs (`int`, *optional*): `dim` for a generator, the number of classes for a classifier; `None` for a
            discriminator, whose logits are `(batch,)`.
        times (`int`): How many of s and t it reads.
        num_classes (`int`): Of its labels; one more, the last, is "no class".
        extra (`int`): More inputs beside the sample, as a discriminator that is given velocities needs.
    """

    def __init__(
        self, dim: int, outputs: int | None, times: int, width: int, num_layers: int = 4, num_classes: int = 0,
        norm: bool = False, extra: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.times, self.num_classes, self.scalar = times, num_classes, outputs is None
        self.class_embed = nn.Embedding(num_classes + 1, 64) if num_classes else None
        inputs = 64 * (dim + extra + times) + (64 if num_classes else 0)
        layers = []
        for _ in range(num_layers):
            layers += [nn.Linear(inputs, width)] + ([nn.LayerNorm(width)] if norm else []) + [nn.SiLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1 if self.scalar else outputs))

    def forward(self, hidden_states, timestep=None, class_labels=None, r_timestep=None, return_dict=False):
        features = [sinusoids(hidden_states)]  # (B, 64 dim)
        if self.times:
            times = torch.stack([timestep, r_timestep][: self.times], dim=1)  # (B, times)
            features.append(sinusoids(times))
        if self.class_embed is not None:
            features.append(self.class_embed(class_labels))
        output = self.layers(torch.cat(features, dim=1))
        return (output.squeeze(-1) if self.scalar else output,)


class VelocityJudge(nn.Module):
    """What CAFM's paper argues against: a discriminator that takes velocities as inputs. Called as the derivative."""

    def __init__(self, discriminator: MLP):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, hidden_states, timestep, class_labels=None, directions=()):
        inputs = [torch.cat([hidden_states, v], dim=1) for v in directions]
        logits = [self.discriminator(x, timestep, class_labels)[0] for x in inputs]
        return torch.zeros(len(timestep)), tuple(logits)


@dataclass
class Trained:
    """An averaged generator and what it was trained for."""

    generator: MLP
    setting: Setting
    start: "Trained | None" = None  # of cafm: the flow-matching model before it

    @torch.no_grad()
    def path(
        self, noise: torch.Tensor, num_steps: int | None = None, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The points of samples on their way from noise to data, of shape `(steps + 1, batch, dim)`."""
        num_steps, points = num_steps or self.setting.num_inference_steps, [noise]
        guidance_scale = self.setting.guidance_scale if self.setting.is_flow else 1.0
        for i in range(num_steps, 0, -1):
            source, target = (torch.full((len(noise),), j / num_steps) for j in (i, i - 1))
            output = self._output(points[-1], source, target, class_labels, guidance_scale)
            points.append(transport(output, points[-1], source, target, self.setting.prediction_type))
        return torch.stack(points)

    def paths_by_class(self, noise: torch.Tensor, num_steps: int | None = None) -> list[torch.Tensor]:
        """[`path`] of all noise for each class in turn; of a model without classes, once."""
        labels = [torch.full((len(noise),), label) for label in range(self.setting.num_classes)]
        return [self.path(noise, num_steps, label) for label in labels or [None]]

    def _output(self, points, source, target, labels, guidance_scale: float) -> torch.Tensor:
        output = self.generator(points, source, labels, r_timestep=target)[0]
        if guidance_scale == 1:
            return output
        null = self.generator(points, source, torch.full_like(labels, self.generator.num_classes))[0]
        return null + guidance_scale * (output - null)

    def sample(
        self, noise: torch.Tensor, num_steps: int | None = None, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.path(noise, num_steps, class_labels)[-1]


def seeded(seed: int, stream: int = 0) -> torch.Generator:
    """
    Seeds the initialisation of networks and returns the generator of batches. What is trained after another network of
    the same seed takes another stream: it sees other batches than that network, and than those of the next seeds.
    """
    seed += stream * 1_000_003
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def make_optimizer(model: nn.Module, learning_rate: float, steps: int, beta1: float = 0.0, beta2: float = 0.9):
    """Adam and a learning rate that falls to 0 by a cosine over the generator's updates."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(beta1, beta2))
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def make_average(generator: MLP) -> tuple[EMAModel, MLP]:
    return EMAModel(generator.parameters(), decay=0.99, min_decay=0.99), copy.deepcopy(generator)


def ot_weight(setting: Setting, step: int) -> float:
    end = setting.lambda_ot if setting.lambda_ot_end is None else setting.lambda_ot_end
    return scheduled_value(setting.lambda_ot, end, step, setting.steps)


# ----------------------------------------------------------------------------------------- adversarial flow, and a GAN


def flow_batch(setting: Setting, generator: torch.Generator) -> FlowBatch:
    x, labels = draw_data(setting.data, BATCH, generator)
    noise = torch.randn(4, *x.shape, generator=generator)
    timestep, r_timestep = step_times(setting.num_steps, torch.rand(BATCH, 2, generator=generator))
    return FlowBatch(
        source=interpolate(x, noise[0], timestep),
        target=interpolate(x, noise[1], r_timestep),
        timestep=timestep,
        r_timestep=r_timestep,
        weight=step_weight(timestep, r_timestep),
        class_labels=labels if setting.num_classes else None,
        penalty_noise=noise[2:],
        penalised=torch.arange(BATCH // 4),
        penalty_share=1.0,
        augmentation=torch.zeros(BATCH, 0),
    )


def train_adversarial(setting: Setting, guide: nn.Module | None = None, progress: bool = False) -> Trained:
    """AFM; with `lambda_ot` 0 a plain (relativistic) GAN. `guide` is the network of [`train_guide`]."""
    random, dim, classes = seeded(setting.seed), setting.dim, setting.num_classes
    times = {1: 0, None: 2}.get(setting.num_steps, 1)
    generator = MLP(dim, dim, times, setting.width, setting.num_layers, num_classes=classes)
    discriminator = MLP(dim, None, min(times, 1), setting.discriminator_width, num_classes=classes)
    optimizer_g, schedule_g = make_optimizer(generator, setting.learning_rate, setting.steps)
    optimizer_d, schedule_d = make_optimizer(discriminator, setting.discriminator_learning_rate, setting.steps)
    normalization, (ema, result) = GradientNormalization(), make_average(generator)
    guidance = guidance_loss(setting, guide)

    def generate(batch: FlowBatch) -> torch.Tensor:
        output = generator(batch.source, batch.timestep, batch.class_labels, r_timestep=batch.r_timestep)[0]
        return transport(output, batch.source, batch.timestep, batch.r_timestep, setting.prediction_type)

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
        transport_loss = optimal_transport_loss(fake, batch.source, batch.weight)
        other = ot_weight(setting, step) * transport_loss
        if step >= setting.steps // 2:  # guidance is for a model that is good already
            other = other + guidance(fake, batch.class_labels, random)
        optimizer_g.zero_grad()
        torch.autograd.backward([fake, other], [factor * gradient, torch.ones(())])
        optimizer_g.step()
        schedule_g.step()
        schedule_d.step()
        ema.step(generator.parameters())
        if step % 50 == 0:
            bar.set_postfix(D=terms["discriminator_loss"].item(), G=loss.item(), OT=transport_loss.item())
    ema.copy_to(result.parameters())
    return Trained(result, setting)


def train_guide(setting: Setting, progress: bool = False) -> nn.Module | None:
    """What guides AFM: a classifier of points on the flow, or a conditional flow-matching model."""
    if setting.guidance is None:
        return None
    if setting.guidance == "classifier_free":
        flow = setting_of("fm", data=setting.data, seed=setting.seed, steps=setting.steps)
        return train_flow_matching(flow, progress=progress).generator
    random = seeded(setting.seed)
    classifier = MLP(setting.dim, setting.num_classes, 1, setting.width, norm=True)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, betas=(0.9, 0.95))
    bar = tqdm(range(setting.steps // 2), desc="classifier", disable=not progress)
    for _ in bar:
        batch = velocity_batch(setting, random, label_dropout=0.0)
        loss = F.cross_entropy(classifier(batch.hidden_states, batch.timestep)[0], batch.class_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.requires_grad_(False)


def guidance_loss(setting: Setting, guide: nn.Module | None) -> Callable:
    """
    The generator's loss of guidance, as a function of its samples, their classes and the random generator.

    With the flow (`"classifier"`, `"classifier_free"`), the guide sees the samples at a random time t' with fresh
    noise, as it was trained. `"classifier_at_data"` shows them as they are, at t' = 0.
    """
    if setting.guidance is None:
        return lambda fake, labels, random: 0.0

    def loss(fake: torch.Tensor, labels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        noise, uniforms = torch.randn(fake.shape, generator=random), torch.rand(len(fake), generator=random)
        time = GUIDANCE_TIMES[setting.guidance] * uniforms
        noised = interpolate(fake, noise, time)
        if setting.guidance != "classifier_free":
            return setting.guidance_scale * classifier_guidance_loss(guide(noised, time)[0], labels)
        with torch.no_grad():
            null = guide(noised, time, torch.full_like(labels, setting.num_classes))[0]
            conditional = guide(noised, time, labels)[0]
        return setting.guidance_scale * classifier_free_guidance_loss(fake, null, conditional)

    return loss


# ----------------------------------------------------------------------------------- flow matching, and continuous AFM


def velocity_batch(setting: Setting, generator: torch.Generator, label_dropout: float = 0.1) -> VelocityBatch:
    x, labels = draw_data(setting.data, BATCH, generator)
    noise, timestep = torch.randn(x.shape, generator=generator), torch.rand(BATCH, generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < label_dropout
    labels = torch.where(dropped, setting.num_classes, labels) if setting.num_classes else None
    return VelocityBatch(interpolate(x, noise, timestep), noise - x, timestep, labels)


def velocity_network(setting: Setting, start: MLP | None) -> MLP:
    """A new one, or a copy of `start`."""
    if start is not None:
        return copy.deepcopy(start)
    dim, classes = setting.dim, setting.num_classes
    return MLP(dim, dim, 1, setting.width, setting.num_layers, num_classes=classes, norm=True)


def train_flow_matching(setting: Setting, start: MLP | None = None, progress: bool = False) -> Trained:
    """Flow matching from scratch, or further from `start`, on other batches than `start` has seen."""
    random = seeded(setting.seed, stream=0 if start is None else 1)
    generator = velocity_network(setting, start)
    optimizer, schedule = make_optimizer(generator, setting.learning_rate, setting.steps, 0.9, 0.999)
    ema, result = make_average(generator)
    bar = tqdm(range(setting.steps), desc="fm", disable=not progress)
    for step in bar:
        batch = velocity_batch(setting, random)
        velocity = generator(batch.hidden_states, batch.timestep, batch.class_labels)[0]
        loss = flow_matching_loss(velocity, batch.velocity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.step(generator.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=loss.item())
    ema.copy_to(result.parameters())
    return Trained(result, setting)


def train_continuous(setting: Setting, start: MLP | None = None, progress: bool = False) -> Trained:
    """CAFM, from a flow-matching model, or from scratch."""
    random, dim = seeded(setting.seed, stream=2), setting.dim
    generator = velocity_network(setting, start)
    options = {"num_classes": setting.num_classes, "norm": True}
    extra = dim if setting.velocity_as_input else 0
    discriminator = MLP(dim, None, 1, setting.discriminator_width, extra=extra, **options)
    derivative = (VelocityJudge if setting.velocity_as_input else DirectionalDerivative)(discriminator)
    optimizer_g, schedule_g = make_optimizer(generator, setting.learning_rate, setting.steps)
    optimizer_d, schedule_d = make_optimizer(discriminator, setting.discriminator_learning_rate, setting.steps)
    ema, result = make_average(generator)

    def update_discriminator() -> dict:
        batch = velocity_batch(setting, random)
        with torch.no_grad():
            velocity = generator(batch.hidden_states, batch.timestep, batch.class_labels)[0]
        loss, terms = velocity_discriminator_loss(derivative, batch, velocity, setting.lambda_cp)
        optimizer_d.zero_grad()
        loss.backward()
        optimizer_d.step()
        return terms

    for _ in tqdm(range(setting.warmup), desc="warm-up", disable=not progress):
        update_discriminator()
    bar = tqdm(range(setting.steps), desc="cafm", disable=not progress)
    for step in bar:
        for _ in range(setting.ttur):
            terms = update_discriminator()
        batch = velocity_batch(setting, random)
        velocity = generator(batch.hidden_states, batch.timestep, batch.class_labels)[0]
        with frozen(derivative):
            loss, _ = velocity_generator_loss(derivative, batch, velocity, ot_weight(setting, step))
            optimizer_g.zero_grad()
            loss.backward()
        optimizer_g.step()
        schedule_g.step()
        schedule_d.step()
        ema.step(generator.parameters())
        if step % 50 == 0:
            bar.set_postfix(D=terms["discriminator_loss"].item(), G=loss.item())
    ema.copy_to(result.parameters())
    return Trained(result, setting)


def pretrain(setting: Setting, progress: bool = False) -> Trained:
    """The flow-matching model that CAFM of this setting starts from."""
    same = {name: getattr(setting, name) for name in ("data", "seed", "width", "num_layers")}
    return train_flow_matching(setting_of("fm", steps=setting.pretraining, **same), progress=progress)


def train(setting: Setting, progress: bool = False) -> Trained:
    """Trains by the method of the setting, after what it needs: a guide, or a flow-matching model for CAFM."""
    if setting.method in ("afm", "gan"):
        return train_adversarial(setting, train_guide(setting, progress), progress)
    if setting.method == "fm":
        return train_flow_matching(setting, progress=progress)
    start = pretrain(setting, progress)
    return replace(train_continuous(setting, start.generator, progress), start=start)
