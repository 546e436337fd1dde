# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What discriminators that are differentiated twice share: gradient checkpointing, and a start from a generator."""

import contextlib
import inspect
import logging
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


logger = logging.getLogger(__name__)


class SameAttention:
    """A context, to be entered any number of times, that allows the attention kernels allowed when it was made."""

    def __init__(self):
        allowed = {
            SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
            SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
            SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
            SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        }
        self.kernels = [kernel for kernel, enabled in allowed.items() if enabled]

    def __enter__(self):
        self.context = sdpa_kernel(self.kernels)
        self.context.__enter__()

    def __exit__(self, *exception):
        return self.context.__exit__(*exception)


def checkpoint_with_same_attention(function: Callable, *args):
    """
    Gradient checkpointing that recomputes with the attention kernels of the forward. A second derivative needs the
    math kernel (`sdpa_kernel(SDPBackend.MATH)` around the forward), and the backward comes after that context.
    """
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), SameAttention())
    )


class SecondOrderCheckpointingMixin:
    """For diffusers models: gradient checkpointing through which a second derivative can be taken."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """Trades compute for memory."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or checkpoint_with_same_attention)


def shared_config(transformer: torch.nn.Module, cls: type) -> dict:
    """The entries of a transformer's config that a discriminator class has too."""
    names = set(inspect.signature(cls.__init__).parameters)
    return {key: value for key, value in transformer.config.items() if key in names}


def copy_matching_weights(transformer: torch.nn.Module, discriminator: torch.nn.Module) -> None:
    """Copies every weight whose name and shape the discriminator has too, and says in the log what is new."""
    own = discriminator.state_dict()
    matching = {name: value for name, value in transformer.state_dict().items() if name in own}
    matching = {name: value for name, value in matching.items() if value.shape == own[name].shape}
    discriminator.load_state_dict(matching, strict=False)
    new = ", ".join(sorted(set(own) - set(matching)))
    logger.info(f"The discriminator starts with {len(matching)} weights of the transformer; new: {new}.")
