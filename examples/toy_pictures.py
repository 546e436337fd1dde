# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what the toys have learned."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from toy_data import draw_data, optimal_map
from toy_training import Trained

from adversarial_flow.utils.flow import interpolate


LIMIT = 2.6  # of the axes of one dimension


def draw_flow(axes: Axes, data: str, groups: Sequence[torch.Tensor], title: str = "") -> None:
    """
    The probability flow as a histogram over time (noise is on the left), and trajectories over it.

    Args:
        data (`str`): The name of the data.
        groups (sequence of `torch.Tensor` of shape `(steps + 1, count)`): Trajectories, a colour for each group.
    """
    random = torch.Generator().manual_seed(12345)
    x, _ = draw_data(data, 20_000, random)
    noise, times = torch.randn(x.shape, generator=random), torch.linspace(1, 0, 200)
    points = [interpolate(x, noise, t.expand(len(x))).flatten() for t in times]
    counts = np.stack([np.histogram(p, bins=260, range=(-LIMIT, LIMIT), density=True)[0] for p in points], axis=1)
    # The root, so that the wide and thin distribution of noise is seen beside the narrow one of the data
    axes.imshow(counts**0.5, extent=(1, 0, -LIMIT, LIMIT), origin="lower", aspect="auto", cmap="Blues")
    colors = ["tab:red", "tab:orange", "tab:green", "tab:purple"]
    for group, color in zip(groups, colors):
        axes.plot(np.linspace(1, 0, len(group)), group.numpy(), color=color, linewidth=0.8)
    axes.set(xlabel="t (1: noise, 0: data)", ylabel="x", title=title, ylim=(-LIMIT, LIMIT))


def draw_maps(axes: Axes, noise: torch.Tensor, samples: Sequence[torch.Tensor | np.ndarray], title: str = "") -> None:
    """What each of several maps makes of ordered noise of shape `(count, 1)`, and the optimal map."""
    for of_one in samples:
        axes.plot(noise[:, 0], of_one, linewidth=1)
    axes.plot(noise[:, 0], optimal_map(noise)[:, 0], "k--", linewidth=1)
    axes.set(title=title, xlabel="noise z", ylabel="G(z); dashed: optimal", xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT))


def trajectories(trained: Trained, num_steps: int | None = None) -> list[torch.Tensor]:
    """The paths of an even grid of noise, for [`draw_flow`]; of conditional models one group for each class."""
    noise = torch.linspace(-2, 2, 11) if trained.setting.num_classes else torch.linspace(-2.4, 2.4, 33)
    return [points.squeeze(-1) for points in trained.paths_by_class(noise[:, None], num_steps)]


def plot_trained(trained: Trained, title: str, num_steps: int | None = None) -> Figure:
    """One dimension: the flow with the learned trajectories, and the samples; two: arrows from noise to samples."""
    setting, random = trained.setting, torch.Generator().manual_seed(2)
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 3.6), width_ratios=(3, 1) if setting.dim == 1 else (1, 1), layout="constrained"
    )
    data, labels = draw_data(setting.data, 10_000, random)
    noise = torch.randn(data.shape, generator=random)
    samples = trained.sample(noise, num_steps, labels if setting.num_classes else None)
    if setting.dim == 1:
        draw_flow(axes[0], setting.data, trajectories(trained, num_steps), title)
        for values, label in ((data, "data"), (samples, "samples")):
            bins = np.linspace(-LIMIT, LIMIT, 200)
            options = {"bins": bins, "density": True, "orientation": "horizontal", "histtype": "step"}
            axes[1].hist(values.flatten().numpy(), label=label, **options)
        axes[1].set(ylim=(-LIMIT, LIMIT), xlabel="density")
    else:
        start, end = noise[:300].T.numpy(), samples[:300].T.numpy()
        axes[0].quiver(*start, *(end - start), angles="xy", scale_units="xy", scale=1, width=0.002, color="tab:red")
        axes[0].plot(*start, ".", color="tab:blue", markersize=2)
        axes[0].set(title=title, aspect="equal")
        for values, label in ((data, "data"), (samples, "samples")):
            axes[1].plot(*values[:2000].T.numpy(), ".", markersize=1, label=label)
        axes[1].set(aspect="equal")
    axes[1].legend(loc="upper right", fontsize=7)
    return figure
