# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""One update of the adversarial flow objective: its batch, the discriminator's loss, the generator's gradient."""

import math
from dataclasses import dataclass

import torch

from adversarial_flow.utils.augmentation import NUM_AUGMENTATION_UNIFORMS, augment
from adversarial_flow.utils.batches import ImageBatches
from adversarial_flow.utils.flow import interpolate, step_times, step_weight, transport
from adversarial_flow.utils.losses import (
    centering_penalty,
    discriminator_adversarial_loss,
    generator_adversarial_loss,
    gradient_penalty,
)


@dataclass
class FlowBatch:
    """A micro-batch of source samples x_s and independent target samples x_t, with all random numbers it needs."""

    source: torch.Tensor  # (B, C, H, W), x_s
    target: torch.Tensor  # (B, C, H, W), x_t, of another noise than x_s
    timestep: torch.Tensor  # (B,), s
    r_timestep: torch.Tensor  # (B,), t
    weight: torch.Tensor  # (B,), w(s, t)
    class_labels: torch.Tensor | None  # (B,)
    penalty_noise: torch.Tensor  # (2, B, C, H, W), for R1 and R2
    penalised: torch.Tensor  # (P,), indices of the samples that R1 and R2 look at
    penalty_share: float  # P/B here over P/B of the global batch: averages over micro-batches and ranks add up
    augmentation: torch.Tensor  # (B, NUM_AUGMENTATION_UNIFORMS)


class FlowBatches(ImageBatches):
    """
    Endless [`FlowBatch`]es, for D's and G's updates in turn.

    Arguments: as for [`~utils.batches.ImageBatches`], without the counts.
    """

    def __init__(self, dataset, config, args, accelerator, vae, first_update: int):
        counts = {"num_normals": 4, "num_uniforms": 3 + NUM_AUGMENTATION_UNIFORMS}
        super().__init__(dataset, config, args, accelerator, vae, first_update, **counts)
        self.num_steps = args.num_steps
        # The penalised positions are spread evenly over the global batch, at least one of them.
        self.num_penalised = max(1, math.ceil(round(args.gp_batch_ratio * self.sampler.global_batch, 6)))

    def __next__(self) -> FlowBatch:
        batch, count, global_batch = super().__next__(), self.num_penalised, self.sampler.global_batch
        timestep, r_timestep = step_times(self.num_steps, batch.uniforms[:, :2])
        penalised = [
            i for i, p in enumerate(batch.positions) if (p + 1) * count // global_batch > p * count // global_batch
        ]
        return FlowBatch(
            source=interpolate(batch.images, batch.normals[0], timestep),
            target=interpolate(batch.images, batch.normals[1], r_timestep),
            timestep=timestep,
            r_timestep=r_timestep,
            weight=step_weight(timestep, r_timestep),
            class_labels=batch.class_labels,
            penalty_noise=batch.normals[2:4],
            penalised=torch.tensor(penalised, dtype=torch.long, device=self.device),
            penalty_share=(len(penalised) / len(batch.positions)) / (count / global_batch),
            augmentation=batch.uniforms[:, 3:],
        )


def generate(transformer: torch.nn.Module, batch: FlowBatch, prediction_type: str) -> torch.Tensor:
    """G(x_s, s, t, c) for a micro-batch, of shape `(B, C, H, W)`."""
    output = transformer(
        batch.source,
        timestep=batch.timestep,
        r_timestep=batch.r_timestep,
        class_labels=batch.class_labels,
        return_dict=False,
    )[0]
    return transport(output, batch.source, batch.timestep, batch.r_timestep, prediction_type)


def _repeat(values: torch.Tensor | None, *indices: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else torch.cat([values[index] for index in indices])


def discriminator_loss(
    discriminator: torch.nn.Module,
    batch: FlowBatch,
    fake: torch.Tensor,
    lambda_gp: float,
    lambda_cp: float,
    epsilon: float,
    augmentation_probability: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The discriminator's whole loss, L_adv^D + lambda_gp (R1 + R2) + lambda_cp L_cp, and its terms.

    Real and generated samples and the perturbed ones of both go through the discriminator in one forward.
    """
    real = augment(batch.target, batch.augmentation, augmentation_probability)
    fake = augment(fake, batch.augmentation, augmentation_probability)
    every, some = torch.arange(len(real), device=real.device), batch.penalised
    perturbed_real = real[some] + epsilon * batch.penalty_noise[0, some]
    perturbed_fake = fake[some] + epsilon * batch.penalty_noise[1, some]
    logits = discriminator(
        torch.cat([real, fake, perturbed_real, perturbed_fake]),
        timestep=_repeat(batch.r_timestep, every, every, some, some),
        class_labels=_repeat(batch.class_labels, every, every, some, some),
        return_dict=False,
    )[0]
    logits_real, logits_fake, logits_perturbed_real, logits_perturbed_fake = logits.split(
        [len(every), len(every), len(some), len(some)]
    )
    adversarial = discriminator_adversarial_loss(logits_real, logits_fake)
    centering = centering_penalty(logits_real, logits_fake)
    r1 = r2 = adversarial.new_zeros(())
    if len(some) > 0:
        r1 = batch.penalty_share * gradient_penalty(
            logits_real[some], logits_perturbed_real, batch.weight[some], epsilon
        )
        r2 = batch.penalty_share * gradient_penalty(
            logits_fake[some], logits_perturbed_fake, batch.weight[some], epsilon
        )
    loss = adversarial + lambda_gp * (r1 + r2) + lambda_cp * centering
    terms = {
        "discriminator_loss": adversarial,
        "r1_penalty": r1,
        "r2_penalty": r2,
        "centering_penalty": centering,
        "logits_real": logits_real.mean(),
        "logits_fake": logits_fake.mean(),
    }
    return loss, {name: value.detach() for name, value in terms.items()}


def adversarial_gradient(
    discriminator: torch.nn.Module, batch: FlowBatch, fake: torch.Tensor, augmentation_probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gradient of L_adv^G at the output `fake` of the generator, before normalisation, and the loss itself.

    The discriminator gets no gradients; the caller may freeze it to save memory.
    """
    fake = fake.detach().requires_grad_()
    augmented_fake = augment(fake, batch.augmentation, augmentation_probability)
    real = augment(batch.target, batch.augmentation, augmentation_probability)
    with torch.no_grad():  # no gradient flows through the real samples: a forward without a graph is enough
        logits_real = discriminator(real, batch.r_timestep, batch.class_labels, return_dict=False)[0]
    logits_fake = discriminator(augmented_fake, batch.r_timestep, batch.class_labels, return_dict=False)[0]
    loss = generator_adversarial_loss(logits_real, logits_fake)
    (gradient,) = torch.autograd.grad(loss, fake)
    return gradient, loss.detach()
