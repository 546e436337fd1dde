# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The plan of a run in words, which `--dry_run` prints and stops: data, networks, updates, memory."""

import torch
from accelerate import Accelerator


GIBIBYTE = 2**30


def training_plan(
    args,
    accelerator: Accelerator,
    data_size: int,
    networks: dict[str, torch.nn.Module],
    vae: torch.nn.Module | None,
    passes: list[list[tuple[torch.nn.Module, float]]],
    updates: str,
    **more: str,
) -> str:
    """
    The plan in lines of a name and a text.

    Args:
        networks (`dict`): The trained networks by name, the averaged one first; they may be on the `meta` device.
        passes (`list`): For each forward and backward pass, the networks whose activations are held at the same time
            and the number of samples that each sees.
        updates (`str`): What the updates are.
        more (`str`): Further lines.
    """
    batch, processes = args.train_batch_size, accelerator.num_processes
    accumulation = args.gradient_accumulation_steps
    config = next(iter(networks.values())).config
    lines = {"Data": f"{data_size:,} images, {config.num_classes or 'no'} classes"}
    for name, network in networks.items():
        size = f"{network.config.in_channels} x {network.config.sample_size} x {network.config.sample_size}"
        parameters = sum(p.numel() for p in network.parameters())
        lines[name] = f"{parameters:,} parameters, {size}, patch {network.config.patch_size}"
    lines["Updates"] = (
        f"{updates}; global batch {batch * accumulation * processes} = {batch} x {accumulation} micro-steps x "
        f"{processes} processes"
    )
    lines |= more
    states = state_bytes(list(networks.values()), vae, processes)
    peak = max(sum(activation_bytes(network, samples, args, accelerator) for network, samples in p) for p in passes)
    lines["Memory"] = (
        f"about {(states + peak) / GIBIBYTE:.2f} GiB a process: weights, gradients, Adam, EMA, VAE "
        f"{states / GIBIBYTE:.2f}, activations about {peak / GIBIBYTE:.2f}"
    )
    lines["Output"] = args.output_dir
    return "\n".join(f"{name:14} {text}" for name, text in lines.items())


def state_bytes(networks: list[torch.nn.Module], vae: torch.nn.Module | None, processes: int) -> int:
    """
    Bytes, exact for float32, of the weights, gradients (twice with DDP, which keeps them in buckets) and Adam's two
    moments of all networks, the average of the first one, and the VAE.
    """
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    values = (4 + int(processes > 1)) * sum(sizes) + sizes[0]
    return 4 * (values + sum(p.numel() for p in vae.parameters()) if vae is not None else values)


def activation_bytes(network: torch.nn.Module, samples: float, args, accelerator: Accelerator) -> float:
    """
    About 34 bytes for each token, channel and layer in half precision and twice that in float32 (arXiv 2205.05198
    without the attention matrix), or, with gradient checkpointing, the input of each block.
    """
    config = network.config
    bytes_per_value = 2 if accelerator.mixed_precision == "bf16" else 4
    per_value = bytes_per_value if args.gradient_checkpointing else 17 * bytes_per_value
    tokens, width = (
        (config.sample_size // config.patch_size) ** 2,
        config.num_attention_heads * config.attention_head_dim,
    )
    return per_value * samples * tokens * width * config.num_layers * config.get("repeats", 1)
