# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Discriminator augmentation: one random translation and three random erasings, the same for real and generated.

The transformations depend on given uniform numbers alone and are differentiable with respect to the images.
"""

import torch


NUM_ERASINGS = 3
NUM_AUGMENTATION_UNIFORMS = 3 + 5 * NUM_ERASINGS


def translate(images: torch.Tensor, uniforms: torch.Tensor, probability: float, limit: float = 0.3) -> torch.Tensor:
    """
    Shifts each image by whole pixels, up to `limit` of its width and height, and fills with zeros.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): What is shifted.
        uniforms (`torch.Tensor` of shape `(batch, 3)`): Whether, and the two shifts.
        probability (`float`): Of shifting an image at all.
        limit (`float`, defaults to 0.3): Largest shift as a share of the side.
    """
    batch, _, height, width = images.shape
    applied = uniforms[:, 0] < probability
    shift_y = ((2 * uniforms[:, 1] - 1) * limit * height).round().long() * applied
    shift_x = ((2 * uniforms[:, 2] - 1) * limit * width).round().long() * applied
    rows = torch.arange(height, device=images.device) - shift_y[:, None]  # (B, H), the row that each one comes from
    columns = torch.arange(width, device=images.device) - shift_x[:, None]  # (B, W)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    sample = torch.arange(batch, device=images.device)[:, None, None]
    shifted = images[sample, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return shifted.permute(0, 3, 1, 2) * inside[:, None]  # (B, C, H, W)


def erase(
    images: torch.Tensor, uniforms: torch.Tensor, probability: float, area: tuple[float, float] = (0.1, 0.5)
) -> torch.Tensor:
    """
    Sets a rectangle of each image to zero; its share of the area is in `area`, its aspect ratio in (0.3, 3.3).

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): What is erased from.
        uniforms (`torch.Tensor` of shape `(batch, 5)`): Whether, the area, the aspect ratio, and the position.
        probability (`float`): Of erasing at all.
        area (`tuple`, defaults to `(0.1, 0.5)`): Smallest and largest share of the image's area.
    """
    _, _, height, width = images.shape
    applied = uniforms[:, 0] < probability
    share = area[0] + (area[1] - area[0]) * uniforms[:, 1]
    aspect = torch.exp(torch.log(torch.tensor(3.3, device=images.device)) * (2 * uniforms[:, 2] - 1))
    box_height = ((share * aspect).sqrt() * height).round().clamp(1, height)
    box_width = ((share / aspect).sqrt() * width).round().clamp(1, width)
    top = (uniforms[:, 3] * (height - box_height + 1)).floor()
    left = (uniforms[:, 4] * (width - box_width + 1)).floor()
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    in_rows = (row >= top[:, None]) & (row < (top + box_height)[:, None])  # (B, H)
    in_columns = (column >= left[:, None]) & (column < (left + box_width)[:, None])  # (B, W)
    erased = in_rows[:, :, None] & in_columns[:, None, :] & applied[:, None, None]  # (B, H, W)
    return images.masked_fill(erased[:, None], 0)


def augment(images: torch.Tensor, uniforms: torch.Tensor, probability: float) -> torch.Tensor:
    """
    A translation and three erasings, each with `probability` (arXiv 2511.22475, "discriminator augmentation").

    Calling it with the same `uniforms`, of shape `(batch, NUM_AUGMENTATION_UNIFORMS)`, transforms the real and the
    generated sample of a pair in the same way.
    """
    if probability == 0:
        return images
    images = translate(images, uniforms[:, :3], probability)
    for erasing in uniforms[:, 3:].unflatten(1, (NUM_ERASINGS, 5)).unbind(1):
        images = erase(images, erasing, probability)
    return images
