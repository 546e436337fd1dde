# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Randomness as a pure function of (seed, update, position in the global batch).

No generator carries a state from one update to the next. A run can therefore be resumed at any update, and a sample
gets the same noise whether its batch is one piece, accumulated or spread over processes.
"""

import numpy as np
import torch


SAMPLING = 1  # a third word keeps the noise of samples apart from the noise of training


def sample_seeds(seed: int, update: int, positions: list[int]) -> list[int]:
    """One 64-bit seed for each of the `positions` of the global batch of `update`."""
    words = np.random.SeedSequence((seed, update)).generate_state(max(positions) + 1, np.uint64)
    return [int(word) >> 1 for word in words[positions]]


def draw_normals_and_uniforms(
    seeds: list[int], num_normals: int, shape: tuple[int, ...], num_uniforms: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The random numbers of each sample, from a generator of its own.

    Args:
        seeds (`list` of `int`): One for each sample.
        num_normals (`int`): Number of standard normal tensors for each sample.
        shape (`tuple`): Their shape.
        num_uniforms (`int`): Number of draws from U[0, 1) for each sample.
        device (`torch.device`): Where they are drawn; different devices give different numbers.

    Returns:
        `tuple` of `torch.Tensor`: normals `(num_normals, batch, *shape)` and uniforms `(batch, num_uniforms)`.
    """
    generator = torch.Generator(device)
    normals = torch.empty(num_normals, len(seeds), *shape, device=device)
    uniforms = torch.empty(len(seeds), num_uniforms, device=device)
    for i, seed in enumerate(seeds):
        generator.manual_seed(seed)
        normals[:, i] = torch.randn(num_normals, *shape, generator=generator, device=device)
        uniforms[i] = torch.rand(num_uniforms, generator=generator, device=device)
    return normals, uniforms


def numbered_generators(seed: int, indices: range | list[int]) -> list[torch.Generator]:
    """CPU generators for sampling: the noise of image i is a function of (seed, i) alone."""
    states = [np.random.SeedSequence((seed, index, SAMPLING)).generate_state(1, np.uint64)[0] for index in indices]
    return [torch.Generator().manual_seed(int(state) >> 1) for state in states]
