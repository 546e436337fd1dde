# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What discriminators that are differentiated twice share: checkpointing, GELU, and a start from a generator."""

import contextlib
import inspect
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
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


def twice_differentiable_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """
    The tanh GELU of `F.gelu`, with the same values and derivatives, whose second derivative takes a third of the
    passes over memory that torch's takes, for reverse mode over reverse or forward mode. Compiled code fuses those by
    itself.
    """
    if torch.compiler.is_compiling():
        return F.gelu(hidden_states, approximate="tanh")
    return _GELU.apply(hidden_states)


class _GELU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return _GELUBackward.apply(gradient, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):
        return torch.ops.aten.gelu_backward(tangent, *ctx.saved_tensors, approximate="tanh")


class _GELUBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient, x):
        return torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient_of_gradient):
        gradient, x = ctx.saved_tensors
        first = torch.ops.aten.gelu_backward(gradient_of_gradient, x, approximate="tanh")
        return first, gelu_second_derivative(x) * gradient * gradient_of_gradient


def gelu_second_derivative(x: torch.Tensor) -> torch.Tensor:
    """
    Of f(x) = x / 2 (1 + tanh u) with u = k (x + c x^3): f'' = (1 - tanh^2 u) (u' (1 - x u' tanh u) + 3 k c x^2).
    In place where that is possible.
    """
    k, c = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    tanh = square.mul(k * c).add_(k).mul_(x).tanh_()
    slope = square.mul(3 * k * c).add_(k)  # u'
    factor = (x * tanh).mul_(slope).neg_().add_(1).mul_(slope).add_(square, alpha=3 * k * c)
    return tanh.square_().neg_().add_(1).mul_(factor)


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
