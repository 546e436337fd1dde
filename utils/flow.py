# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The linear flow between data (t = 0) and noise (t = 1), and the steps that a generator takes on it."""

import torch


def expand_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Appends dimensions to `values` of shape `(batch,)` until it broadcasts against `like`, `(batch, ...)`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(sample: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x + t z, for `sample` x and `noise` z of shape `(batch, ...)`, `timestep` of shape `(batch,)`."""
    timestep = expand_like(timestep, sample)
    return (1 - timestep) * sample + timestep * noise


def transport(
    model_output: torch.Tensor,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    r_timestep: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """
    The generator G from its network g (arXiv 2511.22475, parameterisation).

    `prediction_type="sample"`: G(x_s, s, t) = g. `"velocity"`: G(x_s, s, t) = x_s - (s - t) g.

    Args:
        model_output (`torch.Tensor` of shape `(batch, ...)`): g(x_s, s, t).
        hidden_states (`torch.Tensor` of shape `(batch, ...)`): x_s.
        timestep (`torch.Tensor` of shape `(batch,)`): s, the source time, in [0, 1].
        r_timestep (`torch.Tensor` of shape `(batch,)`): t, the target time, in [0, 1].
        prediction_type (`str`): `"sample"` or `"velocity"`.
    """
    if prediction_type == "sample":
        return model_output
    return hidden_states - expand_like(timestep - r_timestep, hidden_states) * model_output


def step_times(num_steps: int | None, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Source and target times of random steps, t < s.

    With `num_steps` N, s is uniform on {1/N, ..., 1} and t = s - 1/N. Both are quotients of integers, because a float
    `arange` with the step 1/N has an entry too many for some N. With `None` (any step), s ~ U(0, 1) and t ~ U(0, s).

    Args:
        num_steps (`int`, *optional*): N, or `None` for any step.
        uniforms (`torch.Tensor` of shape `(batch, 2)`): Independent draws from U[0, 1).

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch,)`: s and t.
    """
    if num_steps is None:
        timestep = 1 - uniforms[:, 0]  # in (0, 1]
        return timestep, timestep * uniforms[:, 1]
    index = (uniforms[:, 0] * num_steps).long().clamp_(max=num_steps - 1)
    return (index + 1) / num_steps, index / num_steps


def sample_timesteps(uniforms: torch.Tensor, sampling: str, mean: float, std: float, shift: float) -> torch.Tensor:
    """
    Times of training, as a function of uniform numbers: their quantiles.

    Args:
        uniforms (`torch.Tensor` of shape `(batch,)`): Draws from U[0, 1).
        sampling (`str`): `"uniform"`, or `"logit_normal"`: t = sigmoid(mean + std n) with n ~ N(0, 1).
        mean, std (`float`): Of the logit-normal distribution; 0.8 and 0.8 in JiT.
        shift (`float`): t <- shift t / (1 + (shift - 1) t); over 1 it moves times towards noise, 1 does nothing.
            (Z-Image's shift of 1/3, with its 0 = noise, is 3 here.)

    Returns:
        `torch.Tensor` of shape `(batch,)`: t in (0, 1].
    """
    timestep = 1 - uniforms  # in (0, 1]
    if sampling == "logit_normal":
        quantile = torch.special.ndtri(timestep.double().clamp(1e-7, 1 - 1e-7)).to(timestep.dtype)
        timestep = torch.sigmoid(mean + std * quantile)
    return shift * timestep / (1 + (shift - 1) * timestep)


def step_weight(timestep: torch.Tensor, r_timestep: torch.Tensor) -> torch.Tensor:
    """w(s, t) = max(|s - t|, 0.001), of shape `(batch,)`."""
    return (timestep - r_timestep).abs().clamp_min(0.001)
