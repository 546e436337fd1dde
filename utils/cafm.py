# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""One update of the continuous adversarial flow objective, and which network is updated next."""

import torch

from adversarial_flow.utils.losses import (
    discriminator_velocity_loss,
    generator_velocity_loss,
    potential_centering_penalty,
    velocity_transport_loss,
    visible_signal,
)
from adversarial_flow.utils.velocity import VelocityBatch


def discriminator_loss(
    derivative: torch.nn.Module, batch: VelocityBatch, velocity: torch.Tensor, lambda_cp: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The discriminator's whole loss, L^D + lambda_cp L_cp, and its terms. Both velocities are judged at the same x_t.

    Args:
        derivative ([`~utils.derivative.DirectionalDerivative`]): Of the discriminator.
        velocity (`torch.Tensor` of shape `(B, C, H, W)`): Of the generator, without graph.
    """
    logits, (real, fake) = derivative(
        batch.hidden_states, batch.timestep, batch.class_labels, (batch.velocity, velocity)
    )
    adversarial = discriminator_velocity_loss(real, fake)
    centering = potential_centering_penalty(logits)
    terms = {
        "discriminator_loss": adversarial,
        "centering_penalty": centering,
        "derivative_real": real.mean(),
        "derivative_fake": fake.mean(),
        "logits": logits.mean(),
    }
    return adversarial + lambda_cp * centering, {name: value.detach() for name, value in terms.items()}


def generator_loss(
    derivative: torch.nn.Module, batch: VelocityBatch, velocity: torch.Tensor, lambda_ot: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The generator's whole loss, L^G + lambda_ot L_ot, and its terms. The discriminator is frozen by the caller."""
    _, (fake,) = derivative(batch.hidden_states, batch.timestep, batch.class_labels, (velocity,))
    adversarial, transport = generator_velocity_loss(fake), velocity_transport_loss(velocity)
    terms = {"generator_loss": adversarial, "velocity_transport_loss": transport}
    return adversarial + lambda_ot * transport, {name: value.detach() for name, value in terms.items()}


class Phases:
    """
    Which network is updated next: `warmup` updates of D before the first update of G, `ttur` between two of them.

    Args:
        warmup (`int`, *optional*): W; `None` ends the warm-up when D sees a `signal`.
        ttur (`int`): N.
        signal (`float`): The s of [`~utils.losses.visible_signal`], averaged over about 50 updates, that ends it.
    """

    DECAY = 0.98

    def __init__(self, warmup: int | None, ttur: int, signal: float):
        self.warmup, self.ttur, self.signal = warmup, ttur, signal
        self.discriminator_updates = self.generator_updates = 0
        self.average_loss = 2.0  # of a discriminator that sees nothing

    def generator_is_next(self) -> bool:
        if self.warmup is None:
            return False
        return self.discriminator_updates >= self.warmup + self.ttur * self.generator_updates

    @property
    def visible_signal(self) -> float:
        return visible_signal(self.average_loss)

    def after_discriminator(self, loss: torch.Tensor | float | None) -> None:
        """Counts an update of D; `loss` is `None` if it was skipped."""
        self.discriminator_updates += 1
        if loss is not None:
            self.average_loss += (1 - self.DECAY) * (float(loss) - self.average_loss)
        if self.warmup is None and self.visible_signal >= self.signal:
            self.warmup = self.discriminator_updates

    def after_generator(self) -> None:
        self.generator_updates += 1

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """The counts, and the end of the warm-up if it was found; the flags are this run's."""
        for name in ("discriminator_updates", "generator_updates", "average_loss"):
            setattr(self, name, state[name])
        if self.warmup is None:
            self.warmup = state["warmup"]
