# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Pictures: grids of samples and training curves."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


CURVES = (
    ("Losses", ("discriminator_loss", "generator_loss", "optimal_transport_loss", "flow_matching_loss")),
    ("What D sees, s", ("visible_signal",)),
    ("Logits", ("logits_real", "logits_fake")),
    ("Gradient norms", ("discriminator_grad_norm", "generator_grad_norm")),
    ("Class accuracy of samples", ("class_accuracy",)),
    ("Frechet distance of samples", ("frechet_distance",)),
)


def image_grid(images: torch.Tensor, columns: int, min_side: int = 32, padding: int = 2) -> Image.Image:
    """
    A grid of images, row by row; small ones are enlarged by whole factors so that they can be looked at.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In [0, 1], one or three channels.
        columns (`int`): Images in a row.
        min_side (`int`, defaults to 32): Each image is at least this wide.
        padding (`int`, defaults to 2): White pixels between images.
    """
    count, channels, height, width = images.shape
    factor = -(-min_side // width) if width < min_side else 1
    rows = -(-count // columns)
    tile_height, tile_width = height * factor + padding, width * factor + padding
    canvas = np.full((rows * tile_height + padding, columns * tile_width + padding, channels), 255, np.uint8)
    pixels = (images.clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        top, left = (i // columns) * tile_height + padding, (i % columns) * tile_width + padding
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + height * factor, left : left + width * factor] = enlarged
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def plot_grids(grids: dict[str, Image.Image], path: str | Path) -> None:
    """Grids of samples side by side, each under its name."""
    figure, axes = plt.subplots(1, len(grids), figsize=(5 * len(grids), 5.3), squeeze=False)
    for axis, (name, grid) in zip(axes[0], grids.items()):
        axis.imshow(grid, cmap="gray")
        axis.set_title(name)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(rows: list[dict], path: str | Path, references: dict[str, float] | None = None) -> None:
    """
    Draws the curves of a `metrics.jsonl` that it has values for.

    Args:
        rows (`list` of `dict`): The lines of the log; each has a `step`.
        path (`str` or `Path`): The picture to write.
        references (`dict`, *optional*): Dashed horizontal lines by metric, such as the distance of halves of the data.
    """
    panels = [(title, [k for k in keys if any(k in row for row in rows)]) for title, keys in CURVES]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for axis, (title, keys) in zip(axes[0], panels):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points), label=key, linewidth=1.2)
            if references and key in references:
                axis.axhline(references[key], color="grey", linestyle="--", label="halves of the data")
        if "Frechet" in title or "norms" in title:
            axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
