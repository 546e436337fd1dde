# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The discriminator for JiT: its backbone, with the logit read from the first in-context token."""

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from adversarial_flow.models.discriminator_adversarial_flow import AdversarialFlowDiscriminatorOutput
from adversarial_flow.models.second_order import (
    SecondOrderCheckpointingMixin,
    copy_matching_weights,
    shared_config,
)
from adversarial_flow.models.transformer_jit import JiTBackbone, JiTTransformer2DModel


class JiTDiscriminator(SecondOrderCheckpointingMixin, JiTBackbone):
    r"""
    The discriminator D(x_t, t, c) of continuous adversarial flow models (arXiv 2604.11521) for JiT.

    Parameters: as for [`JiTTransformer2DModel`], without `time_floor`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        bottleneck_dim: int = 128,
        in_context_length: int = 32,
        in_context_start: int = 4,
        num_classes: int = 1000,
        use_null_class: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self._build()
        self._initialize_weights()
        self.norm_out = nn.RMSNorm(self.inner_dim, elementwise_affine=False)  # eps: the dtype's, as released
        self.proj_out = nn.Linear(self.inner_dim, 1)  # torch's own initialisation: small first logits

    @classmethod
    def from_transformer(cls, transformer: JiTTransformer2DModel) -> "JiTDiscriminator":
        """A discriminator with every weight of the transformer that fits. What is new is said in the log."""
        discriminator = cls(**shared_config(transformer, cls))
        copy_matching_weights(transformer, discriminator)
        return discriminator

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AdversarialFlowDiscriminatorOutput | tuple[torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
            timestep (`torch.Tensor` of shape `(batch,)` or `float`): t in [0, 1], 1 is noise.
            class_labels (`torch.Tensor` of shape `(batch,)`): Class indices.
            return_dict (`bool`, defaults to `True`): Return an [`AdversarialFlowDiscriminatorOutput`], not a tuple.

        Returns:
            [`AdversarialFlowDiscriminatorOutput`] or `tuple`: the logits, of shape `(batch,)`.

        Raises:
            ValueError: on a wrong input shape, or without labels.
        """
        tokens, _ = self._run(hidden_states, self._times(timestep, hidden_states), class_labels)  # (B, L + T, D)
        logits = self.proj_out(self.norm_out(tokens[:, 0])).squeeze(-1)  # (B,)
        return AdversarialFlowDiscriminatorOutput(logits=logits) if return_dict else (logits,)
