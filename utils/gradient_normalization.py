# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Gradient normalisation of the adversarial loss (the operator phi of arXiv 2511.22475).

It makes `lambda_ot` mean the same for every model size, batch size and scale of the discriminator's logits.
"""

import torch
from torch import nn


def gradient_square(gradient: torch.Tensor) -> torch.Tensor:
    """
    ||g||^2 n, where n is the number of elements of g.

    For the gradient of a mean over the batch this is the mean over the samples of ||g_i||^2 times the elements of one
    sample: it does not depend on the batch size, so that micro-batches and processes can be averaged.
    """
    gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
    return gradient.square().sum() * gradient.numel()


class GradientNormalization(nn.Module):
    r"""
    Tracks the mean square of the adversarial gradient at the generator's output and gives the factor that brings its
    root mean square to one: g <- g / (sqrt(v) + eps), v an exponential average of [`gradient_square`].

    The average is bias-corrected, as in Adam: without it the first gradient would be sqrt(10) times too large. The
    factor is asked for once for each generator update, after the squares of all its micro-batches and processes have
    been averaged; 1 / accumulation is applied to the result, so that it does not cancel.

    The state stays on the CPU in float64, which some accelerators do not have.

    Args:
        decay (`float`, defaults to 0.9): Decay of the average, the second Adam beta in the paper.
        eps (`float`, defaults to 1e-8): Keeps the factor finite for a vanishing gradient.
    """

    def __init__(self, decay: float = 0.9, eps: float = 1e-8):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("square_avg", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, square: torch.Tensor) -> torch.Tensor:
        """Takes the mean square of one update into the average and returns the factor 1 / (sqrt(v) + eps)."""
        self.num_updates += 1
        self.square_avg.lerp_(square.cpu().to(self.square_avg), 1 - self.decay)
        corrected = self.square_avg / (1 - self.decay ** self.num_updates.double())
        return (1 / (corrected.sqrt() + self.eps)).to(square.dtype).to(square.device)
