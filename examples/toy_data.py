# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Data of one or two dimensions, and what is known of its flow in closed form."""

import math
from functools import lru_cache

import numpy as np
import torch


MEANS = (-1.5, -0.5, 0.5, 1.5)  # of the components of both mixtures
DEVIATIONS = {"mixture": 0.05, "classes": 0.2}  # "classes" is conditional: its labels are the components
DATA = {1: tuple(DEVIATIONS), 2: ("eight_gaussians", "two_moons")}


def dimension(name: str) -> int:
    return 1 if name in DEVIATIONS else 2


def draw_data(name: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of shape `(count, dim)` and their classes, of shape `(count,)`."""
    noise = torch.randn(count, 2, generator=generator)
    if name in DEVIATIONS:
        labels = torch.randint(len(MEANS), (count,), generator=generator)
        return torch.tensor(MEANS)[labels, None] + DEVIATIONS[name] * noise[:, :1], labels
    if name == "eight_gaussians":
        labels = torch.randint(8, (count,), generator=generator)
        angles = labels * (2 * math.pi / 8)
        return 1.5 * torch.stack([angles.cos(), angles.sin()], dim=1) + 0.1 * noise, labels
    labels = torch.randint(2, (count,), generator=generator)
    angles = math.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25], dim=1)
    moons = torch.where(labels[:, None] == 0, upper, -upper)
    return 1.2 * moons + 0.07 * noise, labels


# -------------------------------------------------------------------------------------------------------- closed forms


def quantile(probabilities: np.ndarray, name: str = "mixture", timestep: float = 0.0) -> np.ndarray:
    """The inverse of the distribution function of x_t, by interpolation on a fine grid."""
    return np.interp(probabilities, *distribution(name, timestep))


@lru_cache(maxsize=128)
def distribution(name: str, timestep: float) -> tuple[np.ndarray, np.ndarray]:
    """The distribution function of x_t, and where it has these values."""
    grid = np.linspace(-8, 8, 100_001)
    deviation = math.hypot((1 - timestep) * DEVIATIONS[name], timestep)
    cumulative = np.mean([normal_cdf((grid - (1 - timestep) * mean) / deviation) for mean in MEANS], axis=0)
    return cumulative, grid


def normal_cdf(values: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.as_tensor(values)).numpy()


def even_noise(count: int) -> torch.Tensor:
    """The quantiles of N(0, 1) at `count` even probabilities, of shape `(count, 1)`: noise without chance."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()[:, None]


def optimal_map(noise: torch.Tensor, name: str = "mixture", timestep: float = 0.0) -> torch.Tensor:
    """
    The monotone map F_t^-1(Phi(z)) from N(0, 1) to the distribution of x_t, which is the optimal transport between
    them. In one dimension the paths of a flow never cross, so that it also is where the flow brings z at time t.
    """
    probabilities = normal_cdf(noise.double().numpy())
    return torch.as_tensor(quantile(probabilities, name, timestep), dtype=noise.dtype)


def wasserstein(samples: torch.Tensor, name: str = "mixture") -> float:
    """The 1-Wasserstein distance of samples of shape `(N, 1)` to the data, by their quantiles."""
    ordered = np.sort(samples.flatten().double().numpy())
    expected = quantile((np.arange(len(ordered)) + 0.5) / len(ordered), name)
    return float(np.abs(ordered - expected).mean())


def components(points: torch.Tensor, timestep: float, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The means of the components, the distances `(N, components)` of points x_t to their centers, their variance."""
    means = torch.tensor(MEANS, dtype=points.dtype)
    distance = points[:, None] - (1 - timestep) * means
    return means, distance, ((1 - timestep) * DEVIATIONS[name]) ** 2 + timestep**2


def exact_velocity(points: torch.Tensor, timestep: float, label: int | None, name: str) -> torch.Tensor:
    """E[z - x | x_t] for points x_t of shape `(N,)`, of one component or, without a label, of all."""
    means, distance, variance = components(points, timestep, name)
    clean = means + (1 - timestep) * DEVIATIONS[name] ** 2 / variance * distance  # E[x | x_t, component]
    if label is not None:
        clean = clean[:, label]
    else:
        clean = (torch.softmax(-(distance**2) / (2 * variance), dim=1) * clean).sum(1)
    return (points - clean) / timestep


def euler_flow(
    noise: torch.Tensor, label: int | None, guidance_scale: float = 1.0, num_steps: int = 400, name: str = "classes"
) -> torch.Tensor:
    """Where the exact velocity, with classifier-free guidance, brings noise of shape `(N, 1)` in Euler steps."""
    points = noise[:, 0].double()
    for i in range(num_steps, 0, -1):
        null, conditional = (exact_velocity(points, i / num_steps, c, name) for c in (None, label))
        points = points - (null + guidance_scale * (conditional - null)) / num_steps
    return points[:, None].to(noise.dtype)


def classifier_gradient(points: torch.Tensor, timestep: float, label: int, name: str) -> torch.Tensor:
    """grad log p(label | x_t) of the exact classifier at points x_t of shape `(N,)`, in float64."""
    points = points.double().requires_grad_()
    _, distance, variance = components(points, timestep, name)
    logits = -(distance**2) / (2 * variance)  # (N, components)
    (gradient,) = torch.autograd.grad(torch.log_softmax(logits, dim=1)[:, label].sum(), points)
    return gradient
