# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""JiT, a plain transformer on large patches of pixels that predicts the clean image.

This file imports nothing but torch and diffusers, so that it can be uploaded next to its weights as it is.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


TIME_FEATURES = 256
ROTARY_THETA = 10000.0


def jit_time_features(timestep: torch.Tensor) -> torch.Tensor:
    """[cos, sin] of t * 10000^(-i / 128), in the dtype of the times, so that a derivative keeps its precision."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=timestep.dtype, device=timestep.device) * (-math.log(10000) / half)
    )
    angles = timestep[:, None] * frequencies  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)


def rotary_angles(grid_size: int, head_dim: int) -> torch.Tensor:
    """Angles of shape `(grid_size**2, head_dim)`: the row turns the first half of a head, the column the second."""
    half = head_dim // 2
    frequencies = ROTARY_THETA ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angles = (torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies).repeat_interleave(2, dim=1)
    rows = angles[:, None].expand(-1, grid_size, -1)  # (h, w, D/2H)
    columns = angles[None].expand(grid_size, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (T, D/H)


def rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring pairs of the last dimension; `values` (B, T, H, D/H), `cos` and `sin` (T, D/H)."""
    first, second = values.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return values * cos[:, None].to(values.dtype) + turned * sin[:, None].to(values.dtype)


class JiTAttnProcessor:
    """Runs the attention kernel that diffusers' dispatcher selects (`model.set_attention_backend`)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "JiTAttention", hidden_states: torch.Tensor, rotary: tuple) -> torch.Tensor:
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(2)  # (B, T, H, D/H)
        query, key = rotate(attn.norm_q(query), *rotary), rotate(attn.norm_k(key), *rotary)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.dropout(attn.to_out(hidden_states.flatten(2)))  # (B, T, D)


class JiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with RMS-normalised, rotated queries and keys."""

    _default_processor_cls = JiTAttnProcessor
    _available_processors = [JiTAttnProcessor]
    _supports_qkv_fusion = False  # the projection is already one matrix

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, rotary: tuple) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary)


class JiTFeedForward(nn.Module):
    """SwiGLU: W3 (silu(a) * b) with [a, b] = W12 x; its inner width is two thirds of the usual one."""

    def __init__(self, dim: int, inner_dim: int, dropout: float):
        super().__init__()
        self.linear_in = nn.Linear(dim, 2 * inner_dim)
        self.linear_out = nn.Linear(inner_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, value = self.linear_in(hidden_states).chunk(2, dim=-1)
        return self.linear_out(self.dropout(F.silu(gate) * value))


class JiTTransformerBlock(nn.Module):
    """Pre-norm transformer block with adaLN-Zero conditioning and RMSNorm."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.attn = JiTAttention(dim, heads, dropout)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.ff = JiTFeedForward(dim, int(int(dim * mlp_ratio) * 2 / 3), dropout)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, rotary: tuple) -> torch.Tensor:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = (
            self.modulation(conditioning).unsqueeze(1).chunk(6, dim=-1)  # (B, 1, D) each
        )
        attn_output = self.attn(self.norm1(hidden_states) * (1 + scale_attn) + shift_attn, rotary)
        hidden_states = hidden_states + gate_attn * attn_output  # (B, T, D)
        ff_output = self.ff(self.norm2(hidden_states) * (1 + scale_ff) + shift_ff)
        return hidden_states + gate_ff * ff_output  # (B, T, D)


class JiTBackbone(ModelMixin, AttentionMixin, ConfigMixin):
    """What the generator and the discriminator share: patches, positions, time and class embeddings, blocks."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JiTTransformerBlock"]
    _repeated_blocks = ["JiTTransformerBlock"]

    def _build(self) -> None:
        """Creates the shared modules from `self.config`."""
        config = self.config
        if config.sample_size % config.patch_size != 0:
            raise ValueError(
                f"`sample_size` ({config.sample_size}) is not divisible by `patch_size` ({config.patch_size}): "
                "choose a patch size that divides it."
            )
        if config.attention_head_dim % 4 != 0:
            raise ValueError(f"`attention_head_dim` ({config.attention_head_dim}) must be divisible by 4.")
        if config.in_context_length < 1:
            raise ValueError("`in_context_length` must be at least 1: the class enters by these tokens.")
        if not 0 <= config.in_context_start < max(config.num_layers, 1):
            raise ValueError(f"`in_context_start` ({config.in_context_start}) must be the number of a block.")
        dim = config.num_attention_heads * config.attention_head_dim
        self.inner_dim = dim
        self.gradient_checkpointing = False

        patch, bottleneck = config.patch_size, config.bottleneck_dim
        self.patch_embed = nn.Conv2d(config.in_channels, bottleneck, patch, stride=patch, bias=False)
        self.patch_proj = nn.Conv2d(bottleneck, dim, 1)
        grid_size = config.sample_size // patch
        positions = get_2d_sincos_pos_embed(dim, grid_size, base_size=grid_size, output_type="pt")
        # A frozen parameter and not a buffer: it is part of a checkpoint and of the published parameter counts.
        self.pos_embed = nn.Parameter(positions.float().unsqueeze(0), requires_grad=False)  # (1, T, D)
        self.in_context_pos_embed = nn.Parameter(torch.randn(1, config.in_context_length, dim) * 0.02)
        self.time_embed = TimestepEmbedding(TIME_FEATURES, dim)
        self.class_embed = nn.Embedding(config.num_classes + int(config.use_null_class), dim)
        angles = rotary_angles(grid_size, config.attention_head_dim)
        self.register_buffer("rotary_cos", angles.cos().float(), persistent=False)  # (T, D/H)
        self.register_buffer("rotary_sin", angles.sin().float(), persistent=False)
        quarter = config.num_layers // 4
        self.transformer_blocks = nn.ModuleList(
            JiTTransformerBlock(
                dim,
                config.num_attention_heads,
                config.mlp_ratio,
                config.dropout if quarter <= i < 3 * quarter else 0.0,  # in the middle half of the blocks
            )
            for i in range(config.num_layers)
        )

    def _initialize_weights(self) -> None:
        """Xavier everywhere, N(0, 0.02) embeddings, and every block the identity at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for convolution in (self.patch_embed, self.patch_proj):  # linear layers of patches
            nn.init.xavier_uniform_(convolution.weight.flatten(1))
        nn.init.zeros_(self.patch_proj.bias)
        for embedding in (self.time_embed.linear_1, self.time_embed.linear_2, self.class_embed):
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)

    def _times(self, timestep: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
        """Times in [0, 1] of shape `(batch,)`, in float32, or float64 in such a model."""
        dtype = torch.float64 if self.pos_embed.dtype == torch.float64 else torch.float32
        return torch.as_tensor(timestep, dtype=dtype, device=like.device).expand(like.shape[0])

    def _run(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None):
        """The tokens after the last block, in-context tokens first, and the conditioning."""
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(f"`hidden_states` has shape {tuple(hidden_states.shape)}, expected (batch, *{expected}).")
        if class_labels is None:
            raise ValueError(f"This model has {config.num_classes} classes and needs `class_labels`.")
        hidden_states = self.patch_proj(self.patch_embed(hidden_states)).flatten(2).transpose(1, 2)  # (B, T, D)
        hidden_states = hidden_states + self.pos_embed  # (B, T, D)
        class_embed = self.class_embed(class_labels)  # (B, D)
        own_time = 1 - timestep  # JiT's own time runs from noise (0) to data (1)
        conditioning = self.time_embed(jit_time_features(own_time).to(self.pos_embed.dtype)) + class_embed  # (B, D)
        conditioning = F.silu(conditioning)
        rotary = self.rotary_cos, self.rotary_sin  # (T, D/H)
        for i, block in enumerate(self.transformer_blocks):
            if i == config.in_context_start:
                tokens = class_embed.unsqueeze(1) + self.in_context_pos_embed  # (B, L, D)
                hidden_states = torch.cat([tokens, hidden_states], dim=1)  # (B, L + T, D)
                unturned = self.rotary_cos.new_zeros(config.in_context_length, self.rotary_cos.shape[1])
                rotary = torch.cat([unturned + 1, self.rotary_cos]), torch.cat([unturned, self.rotary_sin])
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, rotary)
            else:
                hidden_states = block(hidden_states, conditioning, rotary)
        return hidden_states, conditioning


class JiTTransformer2DModel(JiTBackbone):
    r"""
    JiT as a model of the flow's velocity. Its network predicts the clean image x from x_t; the forward returns
    v = (x_t - x) / max(t, `time_floor`). Time runs from data (0) to noise (1).

    Parameters:
        sample_size (`int`, defaults to 256): Height and width of the (square) images.
        patch_size (`int`, defaults to 16): Side of a patch; divides `sample_size`.
        in_channels (`int`, defaults to 3): Channels of the images.
        num_layers (`int`, defaults to 12): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 12): Attention heads of a block.
        attention_head_dim (`int`, defaults to 64): Width of a head; the model's width is the product of the two.
        mlp_ratio (`float`, defaults to 4.0): Inner width of the feed-forward layers, before it is cut to two thirds.
        bottleneck_dim (`int`, defaults to 128): Channels between the two stages of the patch embedding.
        in_context_length (`int`, defaults to 32): Number of tokens that carry the class.
        in_context_start (`int`, defaults to 4): The block before which they join the patches.
        num_classes (`int`, defaults to 1000): Number of classes.
        use_null_class (`bool`, defaults to `True`): Add one label, `num_classes`, which stands for "no class".
        dropout (`float`, defaults to 0.0): In the middle half of the blocks.
        time_floor (`float`, defaults to 0.05): The smallest divisor of the velocity.
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
        time_floor: float = 0.05,
    ):
        super().__init__()
        self._build()
        self.norm_out = nn.RMSNorm(self.inner_dim, eps=1e-6)
        self.modulation_out = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        self.proj_out = nn.Linear(self.inner_dim, patch_size**2 * in_channels)
        self._initialize_weights()
        for module in (self.modulation_out, self.proj_out):  # the predicted image is zero at first
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        r_timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
            timestep (`torch.Tensor` of shape `(batch,)` or `float`): t in [0, 1], 1 is noise.
            r_timestep: Not used: a velocity has no target time.
            class_labels (`torch.Tensor` of shape `(batch,)`): Class indices.
            return_dict (`bool`, defaults to `True`): Return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            `Transformer2DModelOutput` or `tuple`: the velocity, of the shape of `hidden_states`.

        Raises:
            ValueError: on a wrong input shape, or without labels.
        """
        timestep = self._times(timestep, hidden_states)  # (B,)
        tokens, conditioning = self._run(hidden_states, timestep, class_labels)  # (B, L + T, D), (B, D)
        tokens = tokens[:, self.config.in_context_length :]  # (B, T, D)
        shift, scale = self.modulation_out(conditioning).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D)
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)  # (B, T, p*p*C)
        sample = self._unpatchify(tokens)  # (B, C, H, W), the predicted x
        divisor = timestep.clamp_min(self.config.time_floor)[:, None, None, None]  # not rounded to half precision
        velocity = ((hidden_states - sample) / divisor).to(sample.dtype)  # (B, C, H, W)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        patch, grid = self.config.patch_size, self.config.sample_size // self.config.patch_size
        tokens = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))  # (B, h, w, p, p, C)
        return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
