# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Images to latents of diffusers' AutoencoderKL."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from adversarial_flow.utils.errors import InputError


def load_vae(args) -> AutoencoderKL | None:
    """The frozen VAE of `--vae`: a folder, a pipeline's folder that has one, or a Hub id."""
    if args.vae is None:
        return None
    try:
        subfolder = "vae" if (Path(args.vae) / "vae").is_dir() else None
        return AutoencoderKL.from_pretrained(args.vae, subfolder=subfolder).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--vae {args.vae}: no AutoencoderKL could be loaded ({str(error).splitlines()[0]})."
        ) from error


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Samples the posterior of `images` in [-1, 1] with the given `noise`, and scales it as the VAE's config says."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    latents = posterior.mean.float() + posterior.std.float() * noise
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
