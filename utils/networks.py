# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The configs of both networks from files, flags and data, and the networks themselves."""

import json
from pathlib import Path

from diffusers import AutoencoderKL

from adversarial_flow.models import AdversarialFlowDiscriminator, AdversarialFlowTransformer2DModel
from adversarial_flow.utils.data import TrainingData
from adversarial_flow.utils.errors import InputError


DEFAULT_SIZES = {"patch_size": 2, "num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}  # DiT-S/2


def read_config(name_or_path: str | None, flag: str) -> dict:
    """
    The entries of a network's config: a JSON file, or a folder or Hub id with a `config.json`;
    `DEFAULT_SIZES` for `None`.

    Raises:
        InputError: if there is none.
    """
    if name_or_path is None:
        return dict(DEFAULT_SIZES)
    path = Path(name_or_path)
    try:
        if path.is_dir():
            path = path / "config.json"
        elif not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name_or_path, "config.json"))
        values = json.loads(path.read_text())
    except Exception as error:  # the Hub's client has many kinds of errors, all mean that there is no config
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{flag} {name_or_path}: no config could be read there ({reason}).") from error
    return {key: value for key, value in values.items() if not key.startswith("_")}


def network_configs(args, data: TrainingData, vae: AutoencoderKL | None) -> tuple[dict, dict]:
    """The configs of the generator and of the discriminator: sizes from files, the rest from flags and data."""
    path = args.model_config_name_or_path
    transformer = read_config(path, "--model_config_name_or_path")
    discriminator = dict(transformer)
    if args.discriminator_config_name_or_path is not None:
        discriminator = read_config(args.discriminator_config_name_or_path, "--discriminator_config_name_or_path")
    shared = {"sample_size": data.resolution, "in_channels": data.channels, "num_classes": len(data.id2label) or None}
    if vae is not None:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if vae.config.in_channels != data.channels:
            raise InputError(
                f"--vae {args.vae} takes {vae.config.in_channels} channels, the images have {data.channels}."
            )
        if data.resolution % factor != 0:
            raise InputError(f"--resolution {data.resolution} is not divisible by the VAE's factor {factor}.")
        shared.update(sample_size=data.resolution // factor, in_channels=vae.config.latent_channels)
    limit = transformer.get("num_classes")
    if limit is not None:
        if (shared["num_classes"] or 0) > limit:
            raise InputError(
                f"the data has {shared['num_classes']} classes and --model_config_name_or_path {path} says {limit}: "
                "raise or remove its num_classes, or choose other data."
            )
        shared["num_classes"] = limit
    time_conditioning = {1: "none", None: "source_target"}.get(args.num_steps, "source")
    transformer.update(
        shared, time_conditioning=time_conditioning, prediction_type=args.prediction_type, repeats=args.repeats
    )
    discriminator.update(shared, time_conditioning="none" if args.num_steps == 1 else "source")
    for key in ("prediction_type", "repeats"):
        discriminator.pop(key, None)
    return transformer, discriminator


def make_networks(
    configs: tuple[dict, dict],
) -> tuple[AdversarialFlowTransformer2DModel, AdversarialFlowDiscriminator]:
    try:
        return AdversarialFlowTransformer2DModel(**configs[0]), AdversarialFlowDiscriminator(**configs[1])
    except (TypeError, ValueError) as error:
        raise InputError(f"the networks' config does not work (--model_config_name_or_path): {error}") from error
