# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The losses of adversarial flow models (arXiv 2511.22475) and of continuous adversarial flow models
(arXiv 2604.11521), one equation each, without their lambdas.

Logits, derivatives and weights have shape `(batch,)`, samples and velocities `(batch, ...)`; every loss is a float32
scalar (float64 for float64 inputs).
"""

import torch
import torch.nn.functional as F


def _full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Losses of half precision logits or samples are computed in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def relativistic_loss(logits: torch.Tensor, other_logits: torch.Tensor) -> torch.Tensor:
    """mean softplus(-(a - b)): small when `logits` a exceed `other_logits` b, pair by pair."""
    return F.softplus(_full_precision(other_logits) - _full_precision(logits)).mean()


def discriminator_adversarial_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """L_adv^D = E f(D(x_t) - D(G(x_s))) with f(d) = softplus(-d)."""
    return relativistic_loss(logits_real, logits_fake)


def generator_adversarial_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """L_adv^G = E f(D(G(x_s)) - D(x_t)) with f(d) = softplus(-d); x_t has a noise of its own."""
    return relativistic_loss(logits_fake, logits_real)


def gradient_penalty(
    logits: torch.Tensor, perturbed_logits: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """
    R1 (on real samples) and R2 (on generated ones) by finite differences:
    E w(s, t) (D(x + epsilon n) - D(x))^2 / epsilon^2 with n ~ N(0, I), which tends to E w ||grad D||^2.
    """
    difference = (_full_precision(perturbed_logits) - _full_precision(logits)) / epsilon
    return (weight * difference.square()).mean()


def centering_penalty(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """L_cp = E (D(x_t) + D(G(x_s)))^2: relativistic losses leave the logits' mean free, this keeps it at 0."""
    return (_full_precision(logits_real) + _full_precision(logits_fake)).square().mean()


def optimal_transport_loss(output: torch.Tensor, source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """L_ot = E (1/n) ||G(x_s) - x_s||^2 / w(s, t), where n is the number of elements of a sample."""
    squared_distance = (_full_precision(output) - _full_precision(source)).square().reshape(len(source), -1)
    return (squared_distance.mean(1) / weight).mean()


def classifier_guidance_loss(logits: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    """
    L_cg = E CE(C(x_t', t'), c), where x_t' = (1 - t') G(z, c) + t' z' with fresh noise z' (flow-based guidance), or
    x_t' = G(z, c) at t' = 0.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): Of the classifier C at x_t' and t'.
        class_labels (`torch.Tensor` of shape `(batch,)`): c.
    """
    return F.cross_entropy(_full_precision(logits), class_labels)


def classifier_free_guidance_loss(
    output: torch.Tensor, velocity_null: torch.Tensor, velocity: torch.Tensor
) -> torch.Tensor:
    """
    L_cfg = -E (1/n) <G(z, c), v(x_t', t') - v(x_t', t', c)> (arXiv 2511.22475, Eq. 27 and 28): the difference of a
    flow-matching model's velocities at x_t' = (1 - t') G(z, c) + t' z' is the gradient of an implicit classifier.

    Args:
        output (`torch.Tensor` of shape `(batch, ...)`): G(z, c); n is the number of elements of a sample.
        velocity_null, velocity (`torch.Tensor` of shape `(batch, ...)`): Without and with the class; no gradient
            flows to them.
    """
    gradient = _full_precision(velocity_null) - _full_precision(velocity)
    return -(_full_precision(output) * gradient.detach()).mean()


# ----------------------------------------------------------------------------------------- continuous adversarial flow


def flow_matching_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_FM = E (1/n) ||G(x_t, t) - (z - x)||^2, where n is the number of elements of a sample."""
    return (_full_precision(velocity) - _full_precision(target)).square().mean()


def discriminator_velocity_loss(derivative_real: torch.Tensor, derivative_fake: torch.Tensor) -> torch.Tensor:
    """L^D = E (J(v) - 1)^2 + E (J(G) + 1)^2: the derivative along real velocities is 1, along generated ones -1."""
    real, fake = _full_precision(derivative_real), _full_precision(derivative_fake)
    return (real - 1).square().mean() + (fake + 1).square().mean()


def generator_velocity_loss(derivative_fake: torch.Tensor) -> torch.Tensor:
    """L^G = E (J(G) - 1)^2."""
    return (_full_precision(derivative_fake) - 1).square().mean()


def potential_centering_penalty(logits: torch.Tensor) -> torch.Tensor:
    """L_cp = E D(x_t, t)^2: the losses fix the derivatives of D, this its level."""
    return _full_precision(logits).square().mean()


def velocity_transport_loss(velocity: torch.Tensor) -> torch.Tensor:
    """L_ot = E (1/n) ||G(x_t, t)||^2: the transport cost of the flow, for training from scratch."""
    return _full_precision(velocity).square().mean()


def visible_signal(discriminator_loss: float) -> float:
    """
    s = 4 / L^D - 2. The best possible loss is L^D = 2 / (1 + s/2) with s = delta^T Sigma^-1 delta, delta the bias of
    the generated velocity and Sigma the covariance of the real one given x_t: s = 0 means that D sees nothing.
    """
    return 4 / discriminator_loss - 2
