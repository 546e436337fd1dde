# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Images to latents of diffusers' AutoencoderKL."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from adversarial_flow.utils.errors import InputError, first_line, listed


def load_vae(name: str | None) -> AutoencoderKL | None:
    """The frozen VAE of `--vae`: a folder, a pipeline's folder that has one, or a Hub id; `None` for `None`."""
    if name is None:
        return None
    options = {"subfolder": "vae"} if (Path(name) / "vae").is_dir() else {}
    try:
        vae, info = AutoencoderKL.from_pretrained(name, output_loading_info=True, low_cpu_mem_usage=False, **options)
    except Exception as error:  # the Hub's client and safetensors have many kinds of errors
        raise InputError(f"--vae {name}: no AutoencoderKL could be loaded ({first_line(error)}).") from error
    if info["missing_keys"]:
        raise InputError(f"--vae {name}: weights are missing: {listed(info['missing_keys'])}.")
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Samples the posterior of `images` in [-1, 1] with the given `noise`, and scales it as the VAE's config says."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    latents = posterior.mean.float() + posterior.std.float() * noise
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
