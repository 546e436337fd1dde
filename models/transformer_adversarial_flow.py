# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The generator of adversarial flow models: a DiT backbone with zero, one or two time embeddings.

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


def time_features(timestep: torch.Tensor) -> torch.Tensor:
    """
    [cos, sin] of t * 10000^(-i / 128), in the dtype of the times: diffusers' `Timesteps` computes in float32 always,
    and a derivative with respect to float64 times would lose its precision there.
    """
    half = TIME_FEATURES // 2
    exponents = torch.arange(half, dtype=timestep.dtype, device=timestep.device) * (-math.log(10000) / half)
    angles = timestep[:, None] * exponents.exp()  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)


def make_norm(norm_type: str, dim: int) -> nn.Module:
    """A norm without affine parameters (adaLN supplies scale and shift): `"layer_norm"` or `"rms_norm"`."""
    norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[norm_type]
    return norm(dim, eps=1e-6, elementwise_affine=False)


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return hidden_states * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # (B, T, D)


def gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    return F.gelu(hidden_states, approximate="tanh")


class AdversarialFlowAttnProcessor:
    """Runs the attention kernel that diffusers' dispatcher selects (`model.set_attention_backend`)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "AdversarialFlowAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(2)  # (B, T, H, D/H)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states.flatten(2))  # (B, T, D)


class AdversarialFlowAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with one fused projection for query, key and value."""

    _default_processor_cls = AdversarialFlowAttnProcessor
    _available_processors = [AdversarialFlowAttnProcessor]
    _supports_qkv_fusion = False  # the projection is already one matrix

    def __init__(self, dim: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else None
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class AdversarialFlowFeedForward(nn.Module):
    """Linear, tanh GELU, linear."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, inner_dim)
        self.activation = gelu
        self.linear_2 = nn.Linear(inner_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(hidden_states)))


class AdversarialFlowTransformerBlock(nn.Module):
    """Pre-norm transformer block with adaLN-Zero conditioning (DiT, arXiv 2212.09748, section 3.2)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, norm_type: str, qk_norm: bool):
        super().__init__()
        self.norm1 = make_norm(norm_type, dim)
        self.attn = AdversarialFlowAttention(dim, heads, qk_norm)
        self.norm2 = make_norm(norm_type, dim)
        self.ff = AdversarialFlowFeedForward(dim, int(dim * mlp_ratio))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = self.modulation(conditioning).chunk(6, dim=1)
        attn_output = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn))
        hidden_states = hidden_states + gate_attn.unsqueeze(1) * attn_output  # (B, T, D)
        ff_output = self.ff(modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        return hidden_states + gate_ff.unsqueeze(1) * ff_output  # (B, T, D)


class AdversarialFlowBackbone(ModelMixin, AttentionMixin, ConfigMixin):
    """What the generator and the discriminator share: patches, positions, time and class embeddings, blocks."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["AdversarialFlowTransformerBlock"]
    _repeated_blocks = ["AdversarialFlowTransformerBlock"]

    def _build(self, time_embeddings: tuple[str, ...]) -> None:
        """Creates the shared modules from `self.config` and one time embedder for each name given."""
        config = self.config
        if config.sample_size % config.patch_size != 0:
            raise ValueError(
                f"`sample_size` ({config.sample_size}) is not divisible by `patch_size` ({config.patch_size}): "
                "choose a patch size that divides it."
            )
        if config.norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"`norm_type` must be 'layer_norm' or 'rms_norm', not {config.norm_type!r}.")
        num_classes, use_null_class = config.get("num_classes"), config.get("use_null_class")  # a classifier has none
        if use_null_class and num_classes is None:
            raise ValueError("`use_null_class` needs `num_classes`: an unconditional model has no class to drop.")
        dim = config.num_attention_heads * config.attention_head_dim
        if dim % 4 != 0:
            raise ValueError(f"`num_attention_heads * attention_head_dim` ({dim}) must be divisible by 4.")
        self.inner_dim = dim
        self.gradient_checkpointing = False

        self.patch_embed = nn.Conv2d(config.in_channels, dim, config.patch_size, stride=config.patch_size)
        grid_size = config.sample_size // config.patch_size
        positions = get_2d_sincos_pos_embed(dim, grid_size, base_size=grid_size, output_type="pt")
        # A frozen parameter and not a buffer: it is part of a checkpoint and of the published parameter counts.
        self.pos_embed = nn.Parameter(positions.float().unsqueeze(0), requires_grad=False)  # (1, T, D)
        for name in time_embeddings:
            setattr(self, name, TimestepEmbedding(TIME_FEATURES, dim))
        if num_classes is not None:
            self.class_embed = nn.Embedding(num_classes + int(use_null_class), dim)
        self.transformer_blocks = nn.ModuleList(
            AdversarialFlowTransformerBlock(
                dim, config.num_attention_heads, config.mlp_ratio, config.norm_type, config.qk_norm
            )
            for _ in range(config.num_layers)
        )

    def _initialize_weights(self, time_embeddings: tuple[str, ...]) -> None:
        """DiT's initialisation: Xavier everywhere, N(0, 0.02) embeddings, and every block the identity at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.inner_dim, -1))  # the convolution is a linear layer
        nn.init.zeros_(self.patch_embed.bias)
        for name in time_embeddings:
            nn.init.normal_(getattr(self, name).linear_1.weight, std=0.02)
            nn.init.normal_(getattr(self, name).linear_2.weight, std=0.02)
        if self.config.get("num_classes") is not None:
            nn.init.normal_(self.class_embed.weight, std=0.02)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)

    def _embed_patches(self, hidden_states: torch.Tensor) -> torch.Tensor:
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(f"`hidden_states` has shape {tuple(hidden_states.shape)}, expected (batch, *{expected}).")
        hidden_states = self.patch_embed(hidden_states)  # (B, D, H/p, W/p)
        return hidden_states.flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D)

    def _embed_time(self, embedder: nn.Module, timestep: torch.Tensor | float | None, like: torch.Tensor):
        """Embeds times in [0, 1], a scalar or one for each sample; the sinusoids are never in half precision."""
        if timestep is None:
            raise ValueError("This model is conditioned on the time and needs `timestep`.")
        dtype = torch.float64 if self.pos_embed.dtype == torch.float64 else torch.float32
        timestep = torch.as_tensor(timestep, dtype=dtype, device=like.device).expand(like.shape[0])
        if self.config.get("sit_convention"):
            timestep = 1 - timestep
        return embedder(time_features(timestep * self.config.time_scale).to(self.pos_embed.dtype))  # (B, D)

    def _embed_class(self, class_labels: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if self.config.num_classes is None:
            return like.new_zeros(like.shape[0], self.inner_dim)  # (B, D)
        if class_labels is None:
            raise ValueError(f"This model has {self.config.num_classes} classes and needs `class_labels`.")
        return self.class_embed(class_labels)  # (B, D)

    def _run_blocks(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        conditioning = F.silu(conditioning)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)  # (B, T, D)
        return hidden_states


class AdversarialFlowTransformer2DModel(AdversarialFlowBackbone):
    r"""
    The generator G of adversarial flow models (arXiv 2511.22475): a DiT that moves a sample from a source time to a
    target time. Time runs from data (0) to noise (1).

    Parameters:
        sample_size (`int`, defaults to 32): Height and width of the (square) input, in pixels or latent pixels.
        patch_size (`int`, defaults to 2): Side of a patch; divides `sample_size`.
        in_channels (`int`, defaults to 4): Channels of the input and of the output.
        num_layers (`int`, defaults to 28): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 16): Attention heads of a block.
        attention_head_dim (`int`, defaults to 72): Width of a head; the model's width is the product of the two.
        mlp_ratio (`float`, defaults to 4.0): Inner width of the feed-forward layers over the model's width.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes; `None` for an unconditional model.
        use_null_class (`bool`, defaults to `False`): Add one label, `num_classes`, which stands for "no class".
        time_conditioning (`str`, defaults to `"none"`):
            `"none"` for one step, `"source"` for a fixed number of steps, `"source_target"` for any step.
        prediction_type (`str`, defaults to `"sample"`):
            What the network's output g means: `"sample"`, the result itself, G = g; or `"velocity"`, the velocity of
            the step, G(x_s, s, t) = x_s - (s - t) g(x_s, s, t). See [`~utils.flow.transport`].
        time_scale (`float`, defaults to 1000.0):
            Times in [0, 1] enter the sinusoidal embedding multiplied by this: 1000 in DiT, 1 in SiT.
        sit_convention (`bool`, defaults to `False`):
            The weights are those of a SiT: inside, time runs from noise (0) to data (1), and the output is x - z with
            twice the channels, of which the second half is not used. The forward hides all of it.
        norm_type (`str`, defaults to `"layer_norm"`): `"layer_norm"` or `"rms_norm"`, both without parameters.
        qk_norm (`bool`, defaults to `False`): RMS-normalise queries and keys, which training in bfloat16 needs.
        repeats (`int`, defaults to 1):
            Apply the whole stack of blocks this many times (the paper's 56- and 112-layer models). One-step only; the
            repetitions are told apart by a time embedding of 1, 1 - 1/repeats, ...
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
        prediction_type: str = "sample",
        norm_type: str = "layer_norm",
        qk_norm: bool = False,
        repeats: int = 1,
    ):
        super().__init__()
        if time_conditioning not in ("none", "source", "source_target"):
            raise ValueError(
                f"`time_conditioning` must be 'none', 'source' or 'source_target', not {time_conditioning!r}."
            )
        if prediction_type not in ("sample", "velocity"):
            raise ValueError(f"`prediction_type` must be 'sample' or 'velocity', not {prediction_type!r}.")
        if sit_convention and (time_conditioning, prediction_type) != ("source", "velocity"):
            raise ValueError("`sit_convention` needs time_conditioning='source' and prediction_type='velocity'.")
        if repeats < 1 or (repeats > 1 and time_conditioning != "none"):
            raise ValueError(
                "`repeats` must be at least 1, and more than 1 needs time_conditioning='none' (one step)."
            )
        time_embeddings = {"none": (), "source": ("time_embed",), "source_target": ("time_embed", "r_time_embed")}
        time_embeddings = time_embeddings[time_conditioning] if repeats == 1 else ("time_embed",)
        self._build(time_embeddings)
        self.norm_out = make_norm(norm_type, self.inner_dim)
        self.modulation_out = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        out_channels = 2 * in_channels if sit_convention else in_channels
        self.proj_out = nn.Linear(self.inner_dim, patch_size**2 * out_channels)
        self._initialize_weights(time_embeddings)
        for module in (self.modulation_out, self.proj_out):  # the output is zero at first
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        r_timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, height, width)`): The sample at the source time.
            timestep (`torch.Tensor` of shape `(batch,)` or `float`, *optional*):
                Source time in [0, 1], 1 is noise. Ignored with `time_conditioning="none"`.
            r_timestep (`torch.Tensor` of shape `(batch,)` or `float`, *optional*):
                Target time in [0, 1], below the source. Used with `time_conditioning="source_target"` only.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Class indices.
            return_dict (`bool`, defaults to `True`): Return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            `Transformer2DModelOutput` or `tuple`: g, of the shape of `hidden_states`; `prediction_type` says what it
            means.

        Raises:
            ValueError: on a wrong input shape, or when times or labels that the model needs are missing.
        """
        hidden_states = self._embed_patches(hidden_states)  # (B, T, D)
        conditioning = self._embed_class(class_labels, hidden_states)  # (B, D)
        if self.config.time_conditioning != "none":
            conditioning = conditioning + self._embed_time(self.time_embed, timestep, hidden_states)
        if self.config.time_conditioning == "source_target":
            conditioning = conditioning + self._embed_time(self.r_time_embed, r_timestep, hidden_states)

        repeats = self.config.repeats
        if repeats == 1:
            hidden_states = self._run_blocks(hidden_states, conditioning)  # (B, T, D)
        else:
            for i in range(repeats):
                repeat_embed = self._embed_time(self.time_embed, 1 - i / repeats, hidden_states)
                hidden_states = self._run_blocks(hidden_states, conditioning + repeat_embed)  # (B, T, D)

        shift, scale = self.modulation_out(F.silu(conditioning)).chunk(2, dim=1)
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))  # (B, T, p*p*C)
        sample = self._unpatchify(hidden_states)  # (B, C, H, W)
        if self.config.sit_convention:
            sample = -sample.chunk(2, dim=1)[0]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _unpatchify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        patch, grid = self.config.patch_size, self.config.sample_size // self.config.patch_size
        hidden_states = hidden_states.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))  # (B, h, w, p, p, C)
        return hidden_states.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
