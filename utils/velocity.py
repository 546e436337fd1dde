# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The batches of models that predict velocities (flow matching and CAFM), and the flags that both share."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from adversarial_flow.utils.arguments import check_range, check_share
from adversarial_flow.utils.batches import ImageBatches
from adversarial_flow.utils.errors import InputError
from adversarial_flow.utils.flow import expand_like, interpolate, sample_timesteps


@dataclass
class VelocityBatch:
    """A micro-batch of points on the straight paths between data and noise, with the velocities there."""

    hidden_states: torch.Tensor  # (B, C, H, W), x_t = (1 - t) x + t z
    velocity: torch.Tensor  # (B, C, H, W), z - x, or its clamped form for JiT
    timestep: torch.Tensor  # (B,), t
    class_labels: torch.Tensor | None  # (B,), some of them the null class


class VelocityBatches(ImageBatches):
    """
    Endless [`VelocityBatch`]es, for the updates of all networks in turn.

    Arguments: as for [`~utils.batches.ImageBatches`], without the counts.
    """

    def __init__(self, dataset, config, args, accelerator, vae, first_update: int):
        super().__init__(dataset, config, args, accelerator, vae, first_update, num_normals=1, num_uniforms=3)
        self.times = (args.time_sampling, args.logit_mean, args.logit_std, args.time_shift)
        self.label_dropout, self.null_class = args.label_dropout, config.num_classes
        self.time_floor = config.get("time_floor", 0.0)  # of models that predict x and divide by the time

    def __next__(self) -> VelocityBatch:
        batch = super().__next__()
        noise, labels = batch.normals[0], batch.class_labels
        timestep = sample_timesteps(batch.uniforms[:, 0], *self.times)
        if labels is not None:
            labels = torch.where(batch.uniforms[:, 1] < self.label_dropout, self.null_class, labels)
        hidden_states = interpolate(batch.images, noise, timestep)
        velocity = noise - batch.images
        if self.time_floor > 0:  # (x_t - x) / max(t, floor), what such a model can predict
            velocity = velocity * expand_like((timestep / self.time_floor).clamp(max=1), velocity)
        return VelocityBatch(hidden_states, velocity, timestep, labels)


def predict_velocity(transformer: torch.nn.Module, batch: VelocityBatch) -> torch.Tensor:
    """G(x_t, t, c) for a micro-batch, of shape `(B, C, H, W)`."""
    return transformer(batch.hidden_states, batch.timestep, class_labels=batch.class_labels, return_dict=False)[0]


def add_velocity_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("times and labels")
    group.add_argument("--time_sampling", choices=("uniform", "logit_normal"), default="uniform")
    group.add_argument("--logit_mean", type=float, default=0.8, help="Of logit_normal; times run from data to noise.")
    group.add_argument("--logit_std", type=float, default=0.8, help="Of logit_normal.")
    group.add_argument("--time_shift", type=float, default=1.0, help="Over 1: more times near noise.")
    group.add_argument("--label_dropout", type=float, default=0.1, help="Share of labels set to the null class.")


def check_velocity_arguments(args: argparse.Namespace) -> None:
    for name in ("logit_std", "time_shift"):
        check_range(args, name, open_ends=True)
    if not math.isfinite(args.logit_mean):
        raise InputError(f"--logit_mean must be a finite number, not {args.logit_mean}.")
    for name in ("pretrained_model_name_or_path", "discriminator_name_or_path"):
        value, output = getattr(args, name, None), Path(args.output_dir).resolve()
        if value is not None and output in (Path(value).resolve(), *Path(value).resolve().parents):
            raise InputError(
                f"--{name} {value} lies in --output_dir, which this run writes to: choose another folder."
            )
    check_share(args, "label_dropout")
