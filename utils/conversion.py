# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Plain checkpoints of DiT, SiT, JiT and the released AFM and CAFM models to this project's networks, and back.

A network's sizes are read off the shapes of its weights. What shapes can't tell (heads, steps, repetitions) comes from
the released file's name or from flags.
"""

import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from adversarial_flow.models import (
    AdversarialFlowClassifier,
    AdversarialFlowDiscriminator,
    AdversarialFlowTransformer2DModel,
    JiTDiscriminator,
    JiTTransformer2DModel,
)
from adversarial_flow.utils.errors import InputError


State = dict[str, torch.Tensor]

# ---------------------------------------------------------------------------------------------------- names of weights

# Theirs and ours, without ".weight" and ".bias"; * is the number of a block.
DIT_NAMES = {
    "pos_embed": "pos_embed",
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "t_tgt_embedder.mlp.0": "r_time_embed.linear_1",
    "t_tgt_embedder.mlp.2": "r_time_embed.linear_2",
    "y_embedder.embedding_table": "class_embed",
    "blocks.*.attn.qkv": "transformer_blocks.*.attn.to_qkv",
    "blocks.*.attn.proj": "transformer_blocks.*.attn.to_out",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.linear_1",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.linear_2",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.modulation",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
}
DISCRIMINATOR_NAMES = DIT_NAMES | {"dis_embed": "cls_token", "final_layer.1": "proj_out"}
CLASSIFIER_NAMES = DIT_NAMES | {"cls_embed": "cls_token", "final_layer.1": "proj_out"}
JIT_NAMES = {
    "pos_embed": "pos_embed",
    "in_context_posemb": "in_context_pos_embed",
    "x_embedder.proj1": "patch_embed",
    "x_embedder.proj2": "patch_proj",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "class_embed",
    "blocks.*.norm1": "transformer_blocks.*.norm1",
    "blocks.*.norm2": "transformer_blocks.*.norm2",
    "blocks.*.attn.q_norm": "transformer_blocks.*.attn.norm_q",
    "blocks.*.attn.k_norm": "transformer_blocks.*.attn.norm_k",
    "blocks.*.attn.qkv": "transformer_blocks.*.attn.to_qkv",
    "blocks.*.attn.proj": "transformer_blocks.*.attn.to_out",
    "blocks.*.mlp.w12": "transformer_blocks.*.ff.linear_in",
    "blocks.*.mlp.w3": "transformer_blocks.*.ff.linear_out",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.modulation",
    "final_layer.norm_final": "norm_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
}
JIT_DISCRIMINATOR_NAMES = JIT_NAMES | {"proj_out.1": "proj_out"}
NAMES = {
    AdversarialFlowTransformer2DModel: DIT_NAMES,
    AdversarialFlowDiscriminator: DISCRIMINATOR_NAMES,
    AdversarialFlowClassifier: CLASSIFIER_NAMES,
    JiTTransformer2DModel: JIT_NAMES,
    JiTDiscriminator: JIT_DISCRIMINATOR_NAMES,
}
# Buffers that official JiT files hold: functions of the sizes, which the networks here compute.
COMPUTED = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
COMPUTED += ("feat_rope_incontext.freqs_cos", "feat_rope_incontext.freqs_sin")


def rename(name: str, names: dict[str, str]) -> str | None:
    """The other name of a weight by a table of names; `None` if the table has none."""
    stem, kind = name, ""
    if name.endswith((".weight", ".bias")):
        stem, kind = name.rsplit(".", 1)
        kind = f".{kind}"
    parts = stem.split(".")
    number = parts[1] if parts[0] in ("blocks", "transformer_blocks") and len(parts) > 1 else None
    if number is not None:
        parts[1] = "*"
    other = names.get(".".join(parts))
    return other and other.replace("*", number or "*") + kind


def to_project_names(state: State, cls: type, source: str) -> State:
    """
    The weights of a plain checkpoint by the names of `cls`.

    Raises:
        InputError: if a name is not known; each is named, ten at most.
    """
    renamed = {name: rename(name, NAMES[cls]) for name in state if name not in COMPUTED}
    unknown = [name for name, other in renamed.items() if other is None]
    if unknown:
        raise InputError(f"{source}: weights that no known network has: {listed(unknown)}.")
    result = {other: state[name] for name, other in renamed.items()}
    if "cls_token" in result:
        result["cls_token"] = result["cls_token"].reshape(1, 1, -1)
    return result


def to_plain_names(model: torch.nn.Module) -> State:
    """The weights of a network by the names of the plain architecture."""
    inverse = {
        ours: theirs for theirs, ours in NAMES[type(model)].items()
    }  # of two names for a head the class's own comes last
    state = {rename(name, inverse): value for name, value in model.state_dict().items()}
    for name in ("dis_embed", "cls_embed"):
        if name in state:
            state[name] = state[name].flatten()
    return state


def listed(names: list[str]) -> str:
    """Up to ten names, then a count."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# ---------------------------------------------------------------------------------------------------------- what it is


@dataclass
class Hints:
    """What the shapes of weights can't tell; `None` is not known."""

    num_attention_heads: int | None = None
    num_steps: int | str | None = None  # a number or "any"
    repeats: int | None = None
    in_context_start: int | None = None


def known_hints(file_name: str) -> Hints:
    """What the name of a released file says."""
    sizes = {"b2": 12, "m2": 16, "l2": 16, "xl2": 16}
    stem = Path(file_name).stem
    size = stem.split("_")[0]
    for steps in (1, 2, 4):
        if size in sizes and f"_{steps}nfe_" in f"{stem}_":
            repeats = 2 if "_56layer_" in stem else 4 if "_112layer_" in stem else 1
            return Hints(num_attention_heads=sizes[size], num_steps=steps, repeats=repeats)
    if stem in ("sit_xl2_cafm", "SiT-XL-2-256"):
        return Hints(num_attention_heads=16)
    return Hints()


WIDTHS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # heads of the published DiT and SiT sizes
JIT_STARTS = {(12, 768): 4, (24, 1024): 8, (32, 1280): 10}  # first block with in-context tokens, by depth and width


def num_blocks(state: State) -> int:
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)


def network_class(state: State, source: str) -> type:
    """The class of this project for a plain checkpoint."""
    if "x_embedder.proj1.weight" in state:
        return JiTDiscriminator if "proj_out.1.weight" in state else JiTTransformer2DModel
    if "x_embedder.proj.weight" in state:
        if "dis_embed" in state:
            return AdversarialFlowDiscriminator
        return AdversarialFlowClassifier if "cls_embed" in state else AdversarialFlowTransformer2DModel
    raise InputError(
        f"{source}: neither a DiT, a SiT nor a JiT: there is no x_embedder.proj.weight and no x_embedder.proj1.weight."
    )


def infer_config(state: State, hints: Hints, source: str, sit: bool | None = None) -> tuple[type, dict, int | None]:
    """
    The class, the config and the pipeline's number of steps (`None` for any number and for velocities of a flow) of a
    plain checkpoint.

    Args:
        sit (`bool`, *optional*): Of a discriminator: whether it is one of SiT; by default its label rows tell.

    Raises:
        InputError: if the shapes and the hints do not tell, naming the flag that would.
    """
    cls = network_class(state, source)
    try:
        if issubclass(cls, (JiTTransformer2DModel, JiTDiscriminator)):
            return cls, _jit_config(state, hints, source), None
        return cls, *_dit_config(cls, state, hints, source, sit)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: the architecture can't be inferred, a weight is missing ({error}).") from error


def _sizes(state: State, patch_weight: str, width: int) -> dict:
    patch = state[patch_weight].shape[-1]
    return {
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": state[patch_weight].shape[1],
        "num_layers": num_blocks(state),
        "num_attention_heads": None,
        "attention_head_dim": width,
    }


def _heads(hints: Hints, width: int, source: str) -> int:
    heads = hints.num_attention_heads or WIDTHS.get(width)
    if heads is None or width % heads != 0:
        raise InputError(f"{source}: the number of heads of width {width} is not known: pass --num_attention_heads.")
    return heads


def _dit_config(cls: type, state: State, hints: Hints, source: str, sit: bool | None) -> tuple[dict, int | None]:
    width = state["x_embedder.proj.weight"].shape[0]
    config = _sizes(state, "x_embedder.proj.weight", width)
    heads = _heads(hints, width, source)
    config.update(num_attention_heads=heads, attention_head_dim=width // heads)
    config["mlp_ratio"] = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    if cls is AdversarialFlowClassifier:
        return config | {"num_labels": state["final_layer.1.weight"].shape[0]}, None
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    if cls is AdversarialFlowTransformer2DModel:
        outputs = state["final_layer.linear.weight"].shape[0] // config["patch_size"] ** 2
        sit = outputs == 2 * config["in_channels"]
    elif sit is None:
        sit = rows == 1001  # ImageNet's classes and the null class, which AFM's networks do not have
    config.update(num_classes=rows - sit, use_null_class=bool(sit))
    timed, target = "t_embedder.mlp.0.weight" in state, "t_tgt_embedder.mlp.0.weight" in state
    if sit:
        if not timed:
            raise InputError(f"{source}: a SiT without a time embedding (t_embedder.*).")
        config.update(time_conditioning="source", time_scale=1.0, sit_convention=True)
        if cls is AdversarialFlowDiscriminator:
            return config | {"norm_type": "rms_norm"}, None
        return config | {"prediction_type": "velocity"}, None
    if cls is AdversarialFlowDiscriminator:
        return config | {"time_conditioning": "source" if timed else "none"}, None
    if target:
        return config | {"time_conditioning": "source_target", "prediction_type": "velocity"}, None
    if not timed:
        return config | {"time_conditioning": "none", "prediction_type": "sample"}, 1
    if hints.repeats is not None and hints.repeats > 1:
        return config | {"time_conditioning": "none", "prediction_type": "sample", "repeats": hints.repeats}, 1
    if not isinstance(hints.num_steps, int) or hints.num_steps < 2:
        raise InputError(
            f"{source}: a generator with one time embedding makes either a fixed number of steps or one step with "
            "repeated blocks, and its weights do not tell: pass --num_steps (2, 4, ...) or --repeats (2, 4)."
        )
    return config | {"time_conditioning": "source", "prediction_type": "velocity"}, hints.num_steps


def _jit_config(state: State, hints: Hints, source: str) -> dict:
    width = state["x_embedder.proj2.weight"].shape[0]
    config = _sizes(state, "x_embedder.proj1.weight", width)
    head_dim = state["blocks.0.attn.q_norm.weight"].shape[0]
    start = hints.in_context_start
    if start is None:
        start = JIT_STARTS.get((config["num_layers"], width))
    if start is None:
        raise InputError(
            f"{source}: a JiT of {config['num_layers']} blocks of width {width} is none of the published sizes: pass "
            "--in_context_start, the number of the block at which the in-context tokens join."
        )
    inner = state["blocks.0.mlp.w3.weight"].shape[1]  # int(int(width * mlp_ratio) * 2 / 3)
    ratio = 4.0 if int(width * 4 * 2 / 3) == inner else (math.ceil(1.5 * inner) + 0.25) / width
    return config | {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": ratio,
        "bottleneck_dim": state["x_embedder.proj1.weight"].shape[0],
        "in_context_length": state["in_context_posemb"].shape[1],
        "in_context_start": start,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "use_null_class": True,
        "dropout": 0.2 if width == 1280 else 0.0,  # of the published training of H
    }


def make_converted(state: State, hints: Hints, source: str, sit: bool | None = None):
    """
    The network of a plain checkpoint, with its weights, and the pipeline's number of steps.

    Raises:
        InputError: if weights are missing, unknown or of a wrong shape.
    """
    cls, config, num_steps = infer_config(state, hints, source, sit)
    renamed = to_project_names(state, cls, source)
    try:
        with torch.device("meta"):
            model = cls(**config)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    expected = model.state_dict()
    missing = sorted(set(expected) - set(renamed))
    inverse = {ours: theirs for theirs, ours in NAMES[cls].items()}
    if missing:
        raise InputError(f"{source}: missing weights: {listed([rename(name, inverse) for name in missing])}.")
    extra = sorted(set(renamed) - set(expected))
    if extra:
        raise InputError(f"{source}: unknown weights: {listed([rename(name, inverse) for name in extra])}.")
    wrong = [
        f"{rename(name, inverse)} {tuple(renamed[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if renamed[name].shape != value.shape
    ]
    if wrong:
        raise InputError(f"{source}: weights of the wrong shape: {listed(wrong)}.")
    model = cls(**config)  # on the CPU, with the buffers that no checkpoint holds
    model.load_state_dict(renamed)
    return model.eval(), num_steps


# ------------------------------------------------------------------------------------------------------------- reading

JIT_PREFIX = "net."  # of every name in official JiT files


def read_state(path: Path, weights: str | None = None) -> State:
    """
    The plain state dict of a file, which is never unpickled beyond tensors. Official JiT files hold three
    (`weights`: raw, ema1, the default, or ema2); wrappers of one (`model`, `ema`, `state_dict`) are opened.

    Raises:
        InputError: if the file is no such thing.
    """
    source = str(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{source}: torch.load(weights_only=True) refuses it, as it holds more than tensors or is no checkpoint."
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source}: can't be read as a checkpoint ({reason}).") from error
    if isinstance(content, dict) and "model_ema1" in content:
        content = content[{None: "model_ema1", "ema1": "model_ema1", "ema2": "model_ema2", "raw": "model"}[weights]]
    elif weights is not None:
        raise InputError(f"--weights {weights}: {source} holds no choice of weights; leave it out.")
    if not (isinstance(content, dict) and content and all(isinstance(v, torch.Tensor) for v in content.values())):
        raise InputError(f"{source}: this is not a state dict (names and tensors).")
    return {name.removeprefix(JIT_PREFIX): value for name, value in content.items()}
