# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The classifier of noisy samples that guides adversarial flow models: the generator's backbone and a [CLS] token."""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from adversarial_flow.models.transformer_adversarial_flow import AdversarialFlowBackbone, make_norm


@dataclass
class AdversarialFlowClassifierOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(batch, num_labels)`): One logit for each class.
    """

    logits: torch.Tensor


class AdversarialFlowClassifier(AdversarialFlowBackbone):
    r"""
    Classifies points x_t on the paths between data and noise (arXiv 2511.22475, guidance).

    Parameters: as for [`AdversarialFlowTransformer2DModel`], with `num_labels` (`int`, defaults to 1000), the number
    of classes told apart, and without what concerns labels and outputs of a generator.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_labels: int = 1000,
        time_scale: float = 1000.0,
        norm_type: str = "layer_norm",
        qk_norm: bool = False,
    ):
        super().__init__()
        self._build(("time_embed",))
        self._initialize_weights(("time_embed",))
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.inner_dim) * 0.02)  # (1, 1, D)
        self.norm_out = make_norm(norm_type, self.inner_dim)
        self.proj_out = nn.Linear(self.inner_dim, num_labels)

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> AdversarialFlowClassifierOutput | tuple[torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
            timestep (`torch.Tensor` of shape `(batch,)` or `float`): t in [0, 1], 1 is noise.
            return_dict (`bool`, defaults to `True`): Return an [`AdversarialFlowClassifierOutput`], not a tuple.

        Returns:
            [`AdversarialFlowClassifierOutput`] or `tuple`: the logits, of shape `(batch, num_labels)`.

        Raises:
            ValueError: on a wrong input shape.
        """
        hidden_states = self._embed_patches(hidden_states)  # (B, T, D)
        conditioning = self._embed_time(self.time_embed, timestep, hidden_states)  # (B, D)
        cls_token = self.cls_token.expand(hidden_states.shape[0], -1, -1)  # (B, 1, D)
        hidden_states = torch.cat([cls_token, hidden_states], dim=1)  # (B, 1 + T, D)
        hidden_states = self._run_blocks(hidden_states, conditioning)  # (B, 1 + T, D)
        logits = self.proj_out(self.norm_out(hidden_states[:, 0]))  # (B, num_labels)
        return AdversarialFlowClassifierOutput(logits=logits) if return_dict else (logits,)
