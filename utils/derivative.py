# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The directional derivative of a discriminator, with which CAFM (arXiv 2604.11521) judges velocities."""

import contextlib

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


METHODS = ("reverse", "forward", "finite")
TWICE_DIFFERENTIABLE = (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH)


class DirectionalDerivative(nn.Module):
    r"""
    J(x_t, t; v) = <grad_x D(x_t, t), v> + dD/dt (x_t, t), the derivative of D along a path with velocity v.

    D is scalar, so that in `"reverse"` mode one reverse pass gives grad_x D and dD/dt, and then J of any number of
    directions is an inner product. While the discriminator's parameters are trained, the pass is itself
    differentiated: it then runs the math kernel of attention, the only one that can be. When they are frozen nothing
    of second order is built, any kernel serves, and J is linear in the direction.

    This module, and not the discriminator, is what `accelerator.prepare` gets: autocast and the hooks of DDP have to
    surround the inner derivative.

    Args:
        discriminator (`nn.Module`): Called as `discriminator(x_t, t, class_labels, return_dict=False)[0]`.
        method (`str`, defaults to `"reverse"`):
            `"reverse"`; `"forward"`, `torch.func.jvp` for all directions at once, exact as well and slower; or
            `"finite"`, central differences, an approximation that needs first derivatives of D only.
        epsilon (`float`, defaults to 1e-4): Half of the time between the two ends of a finite difference.
        compile (`bool`, defaults to `False`):
            Run the reverse mode of a trained discriminator through `torch.compile`. A compiled module can't be
            differentiated twice, but a compiled function that contains the inner reverse pass can be differentiated
            once from outside.

    Raises:
        ValueError: for another method, an attention backend that can't be differentiated twice, or finite differences
            of a discriminator with dropout.
    """

    def __init__(
        self, discriminator: nn.Module, method: str = "reverse", epsilon: float = 1e-4, compile: bool = False
    ):
        super().__init__()
        if compile and method != "reverse":
            raise ValueError(f"`compile` is for the method 'reverse', not {method!r}.")
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, not {method!r}.")
        self.discriminator, self.method, self.epsilon = discriminator, method, epsilon
        if method != "finite":
            self._check_attention()
        elif any(isinstance(module, nn.Dropout) and module.p > 0 for module in discriminator.modules()):
            raise ValueError("Finite differences need the same discriminator at both ends: set its dropout to 0.")
        self._compiled = torch.compile(self._functional_reverse, fullgraph=True) if compile else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        directions: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, ...)`): x_t; no gradient flows to it.
            timestep (`torch.Tensor` of shape `(batch,)`): t in [0, 1].
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Class indices.
            directions (`tuple` of `torch.Tensor` of shape `(batch, ...)`): The velocities v.

        Returns:
            `tuple`: the logits D(x_t, t), of shape `(batch,)`, and one J of shape `(batch,)` for each direction.
        """
        hidden_states, timestep = hidden_states.detach(), timestep.detach()
        derivative = {"reverse": self._reverse, "forward": self._forward, "finite": self._finite}[self.method]
        return derivative(hidden_states, timestep, class_labels, tuple(directions))

    def _logits(self, hidden_states, timestep, class_labels) -> torch.Tensor:
        return self.discriminator(hidden_states, timestep, class_labels, return_dict=False)[0]  # (B,)

    def _reverse(self, hidden_states, timestep, class_labels, directions):
        second_order = torch.is_grad_enabled() and any(p.requires_grad for p in self.discriminator.parameters())
        if second_order and self._compiled is not None:
            with sdpa_kernel(SDPBackend.MATH):
                return self._compiled(hidden_states, timestep, class_labels, directions)
        hidden_states, timestep = hidden_states.requires_grad_(), timestep.requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext():
            logits = self._logits(hidden_states, timestep, class_labels)
            gradient, time_derivative = torch.autograd.grad(
                logits.sum(), (hidden_states, timestep), create_graph=second_order, materialize_grads=True
            )
        logits = logits if second_order else logits.detach()
        return logits, tuple(inner_product(gradient, v) + time_derivative for v in directions)

    def _functional_reverse(self, hidden_states, timestep, class_labels, directions):
        """The same as `_reverse` in a form that is traced without a break."""
        logits, pull_back = torch.func.vjp(lambda x, t: self._logits(x, t, class_labels), hidden_states, timestep)
        gradient, time_derivative = pull_back(torch.ones_like(logits))
        return logits, tuple(inner_product(gradient, v) + time_derivative for v in directions)

    def _forward(self, hidden_states, timestep, class_labels, directions):
        def along(direction):
            return torch.func.jvp(
                lambda x, t: self._logits(x, t, class_labels),
                (hidden_states, timestep),
                (direction, torch.ones_like(timestep)),
            )

        if not directions:
            return self._logits(hidden_states, timestep, class_labels), ()
        with sdpa_kernel(SDPBackend.MATH):
            # The same dropout for all directions
            along_all = torch.func.vmap(along, out_dims=(None, 0), randomness="same")
            logits, derivatives = along_all(torch.stack(directions))
        return logits, derivatives.unbind()

    def _finite(self, hidden_states, timestep, class_labels, directions):
        logits = self._logits(hidden_states, timestep, class_labels)
        derivatives = []
        for direction in directions:
            ahead, behind = (
                self._logits(hidden_states + step * direction, timestep + step, class_labels)
                for step in (self.epsilon, -self.epsilon)
            )
            derivatives.append((ahead - behind) / (2 * self.epsilon))
        return logits, tuple(derivatives)

    def _check_attention(self) -> None:
        for processor in getattr(self.discriminator, "attn_processors", {}).values():
            backend = getattr(processor, "_attention_backend", None)
            backend = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
            if AttentionBackendName(backend) not in TWICE_DIFFERENTIABLE:
                raise ValueError(
                    f"The discriminator's attention backend {AttentionBackendName(backend).value!r} can't be "
                    "differentiated twice: use discriminator.set_attention_backend('native') or '_native_math', or "
                    "the method 'finite'."
                )


def inner_product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """<a, b> for each sample, of shape `(batch,)`; in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return (first.to(dtype) * second.to(dtype)).reshape(len(first), -1).sum(1)
