# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The discriminator of adversarial flow models: the generator's backbone with a [CLS] token and a scalar head.

It shares that backbone with `transformer_adversarial_flow.py`. Pipelines never need a discriminator, so that only the
generator's file has to stand alone on the Hub.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from adversarial_flow.models.second_order import (
    SecondOrderCheckpointingMixin,
    copy_matching_weights,
    shared_config,
    twice_differentiable_gelu,
)
from adversarial_flow.models.transformer_adversarial_flow import (
    AdversarialFlowBackbone,
    AdversarialFlowTransformer2DModel,
    make_norm,
)


@dataclass
class AdversarialFlowDiscriminatorOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(batch,)`): One logit for each sample; larger means more like data.
    """

    logits: torch.Tensor


class AdversarialFlowDiscriminator(SecondOrderCheckpointingMixin, AdversarialFlowBackbone):
    r"""
    The discriminator D(x_t, t, c) of adversarial flow models (arXiv 2511.22475). It sees the sample at the target time
    and never the source: x and z are drawn independently, and a D that saw both would learn an impossible task.

    Parameters: as for [`AdversarialFlowTransformer2DModel`], except that `time_conditioning` is `"none"` (one step) or
    `"source"` (the time of the sample it looks at), and that there are no `prediction_type` and `repeats`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        use_null_class: bool = False,
        time_conditioning: str = "none",
        time_scale: float = 1000.0,
        sit_convention: bool = False,
        norm_type: str = "layer_norm",
        qk_norm: bool = False,
    ):
        super().__init__()
        if time_conditioning not in ("none", "source"):
            raise ValueError(
                f"`time_conditioning` of a discriminator must be 'none' or 'source', not {time_conditioning!r}."
            )
        time_embeddings = ("time_embed",) if time_conditioning == "source" else ()
        self._build(time_embeddings)
        self._initialize_weights(time_embeddings)
        for block in self.transformer_blocks:
            block.ff.activation = twice_differentiable_gelu
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.inner_dim) * 0.02)  # (1, 1, D)
        self.norm_out = make_norm(norm_type, self.inner_dim)
        # torch's own initialisation: the first logits have a variance of 1/3, where Xavier's would have 2.
        self.proj_out = nn.Linear(self.inner_dim, 1, bias=False)

    @classmethod
    def from_transformer(
        cls, transformer: AdversarialFlowTransformer2DModel, norm_type: str = "rms_norm"
    ) -> "AdversarialFlowDiscriminator":
        r"""
        A discriminator of the transformer's sizes with every weight of it that fits, as continuous adversarial flow
        models start from (arXiv 2604.11521). What is new is said in the log.

        Args:
            transformer ([`AdversarialFlowTransformer2DModel`]): A model with one time embedding.
            norm_type (`str`, defaults to `"rms_norm"`):
                RMSNorm instead of the transformer's LayerNorm keeps the gradient norms of a discriminator that is
                differentiated twice from having spikes; neither has parameters.
        """
        discriminator = cls(
            **shared_config(transformer, cls) | {"norm_type": norm_type, "time_conditioning": "source"}
        )
        copy_matching_weights(transformer, discriminator)
        return discriminator

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AdversarialFlowDiscriminatorOutput | tuple[torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, height, width)`): Real or generated samples.
            timestep (`torch.Tensor` of shape `(batch,)` or `float`, *optional*):
                Their time in [0, 1]. Ignored with `time_conditioning="none"`.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Class indices.
            return_dict (`bool`, defaults to `True`): Return an [`AdversarialFlowDiscriminatorOutput`], not a tuple.

        Returns:
            [`AdversarialFlowDiscriminatorOutput`] or `tuple`: the logits, of shape `(batch,)`.

        Raises:
            ValueError: on a wrong input shape, or when times or labels that the model needs are missing.
        """
        hidden_states = self._embed_patches(hidden_states)  # (B, T, D)
        conditioning = self._embed_class(class_labels, hidden_states)  # (B, D)
        if self.config.time_conditioning == "source":
            conditioning = conditioning + self._embed_time(self.time_embed, timestep, hidden_states)  # (B, D)
        cls_token = self.cls_token.expand(hidden_states.shape[0], -1, -1)  # (B, 1, D)
        hidden_states = torch.cat([cls_token, hidden_states], dim=1)  # (B, 1 + T, D)
        hidden_states = self._run_blocks(hidden_states, conditioning)  # (B, 1 + T, D)
        logits = self.proj_out(self.norm_out(hidden_states[:, 0])).squeeze(-1)  # (B,)
        return AdversarialFlowDiscriminatorOutput(logits=logits) if return_dict else (logits,)
