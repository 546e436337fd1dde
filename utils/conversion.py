# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Plain checkpoints of the released AFM and CAFM models, SiT and JiT to this project's networks, and back.

A network's sizes are read off the shapes of its weights. What shapes can't tell (heads, steps, what is predicted)
comes from the released file's name or from flags.
"""

import argparse
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from adversarial_flow.models import (
    AdversarialFlowClassifier,
    AdversarialFlowDiscriminator,
    AdversarialFlowTransformer2DModel,
    JiTDiscriminator,
    JiTTransformer2DModel,
)
from adversarial_flow.utils.errors import InputError, first_line, listed


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
}
FINAL_LAYER = {"final_layer.adaLN_modulation.1": "modulation_out", "final_layer.linear": "proj_out"}
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
}
NAMES = {
    AdversarialFlowTransformer2DModel: DIT_NAMES | FINAL_LAYER,
    AdversarialFlowDiscriminator: DIT_NAMES | {"dis_embed": "cls_token", "final_layer.1": "proj_out"},
    AdversarialFlowClassifier: DIT_NAMES | {"cls_embed": "cls_token", "final_layer.1": "proj_out"},
    JiTTransformer2DModel: JIT_NAMES | FINAL_LAYER | {"final_layer.norm_final": "norm_out"},
    JiTDiscriminator: JIT_NAMES | {"proj_out.1": "proj_out"},
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


def plain_names(cls: type) -> dict[str, str]:
    """The table of names of a class from ours to theirs."""
    return {ours: theirs for theirs, ours in NAMES[cls].items()}


def to_plain_names(model: torch.nn.Module) -> State:
    """
    The weights of a network by the names of the plain architecture.

    Raises:
        InputError: if it has weights that the plain architecture does not have.
    """
    names = {name: rename(name, plain_names(type(model))) for name in model.state_dict()}
    own = [name for name, other in names.items() if other is None]
    if own:
        raise InputError(f"the plain architecture has no weights like these: {listed(own)}.")
    state = {names[name]: value for name, value in model.state_dict().items()}
    for name in ("dis_embed", "cls_embed"):
        if name in state:
            state[name] = state[name].flatten()
    return state


# ---------------------------------------------------------------------------------------------------------- what it is


@dataclass
class Hints:
    """What the shapes of weights can't tell; `None` is not known."""

    num_attention_heads: int | None = None
    sit: bool | None = None  # a SiT, of twice the output channels; or its discriminator
    num_steps: int | None = None
    repeats: int | None = None
    prediction_type: str | None = None
    in_context_start: int | None = None


def known_hints(file_name: str) -> Hints:
    """What the name of a released file says."""
    heads = {"b2": 12, "m2": 16, "l2": 16, "xl2": 16}
    stem = Path(file_name).stem
    size = stem.split("_")[0]
    for steps in (1, 2, 4):
        if size in heads and f"_{steps}nfe_" in f"{stem}_":
            repeats = 2 if "_56layer_" in stem else 4 if "_112layer_" in stem else 1
            return Hints(heads[size], False, steps, repeats, "sample" if steps == 1 else "velocity")
    if stem in ("sit_xl2_cafm", "SiT-XL-2-256", "SiT-XL-2-256x256"):
        return Hints(num_attention_heads=16, sit=True)
    return Hints()


WIDTHS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # heads of the published DiT and SiT sizes
JIT_STARTS = {(12, 768): 4, (24, 1024): 8, (32, 1280): 10}  # first block with in-context tokens, by depth and width


def num_blocks(state: State) -> int:
    numbers = (name.split(".")[1] for name in state if name.startswith("blocks."))
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


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


def infer_config(state: State, hints: Hints, source: str) -> tuple[type, dict, int | None]:
    """
    The class, the config and the pipeline's number of steps (`None` for any number and for velocities of a flow) of a
    plain checkpoint.

    Raises:
        InputError: if the shapes and the hints do not tell, naming the flag that would, or contradict each other.
    """
    cls = network_class(state, source)
    try:
        if issubclass(cls, (JiTTransformer2DModel, JiTDiscriminator)):
            return cls, _jit_config(state, hints, source), None
        return cls, *_dit_config(cls, state, hints, source)
    except (KeyError, IndexError) as error:
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
    if heads is None:
        raise InputError(f"{source}: the number of heads of width {width} is not known: pass --num_attention_heads.")
    if width % heads != 0:
        raise InputError(f"{source}: --num_attention_heads {heads} does not divide the width {width}.")
    return heads


def ratio_of(inner: int, width: int, cut: float = 1.0) -> float:
    """The `mlp_ratio` with which a network gets this inner width, which is int(int(width * ratio) * cut)."""
    if int(width * 4 * cut) == inner:
        return 4.0
    ratio = inner / cut / width
    return ratio if int(int(width * ratio) * cut) == inner else (math.ceil(inner / cut) + 0.25) / width


def _dit_config(cls: type, state: State, hints: Hints, source: str) -> tuple[dict, int | None]:
    width = state["x_embedder.proj.weight"].shape[0]
    config = _sizes(state, "x_embedder.proj.weight", width)
    heads = _heads(hints, width, source)
    config.update(num_attention_heads=heads, attention_head_dim=width // heads)
    config["mlp_ratio"] = ratio_of(state["blocks.0.mlp.fc1.weight"].shape[0], width)
    if cls is AdversarialFlowClassifier:
        return config | {"num_labels": state["final_layer.1.weight"].shape[0]}, None
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    timed, target = "t_embedder.mlp.0.weight" in state, "t_tgt_embedder.mlp.0.weight" in state
    if _is_sit(cls, state, config, hints, source):
        config.update(num_classes=rows - 1, use_null_class=True)
        config.update(time_conditioning="source", time_scale=1.0, sit_convention=True)
        own = {"norm_type": "rms_norm"} if cls is AdversarialFlowDiscriminator else {"prediction_type": "velocity"}
        return config | own, None
    config["num_classes"] = rows
    if cls is AdversarialFlowDiscriminator:
        return config | {"time_conditioning": "source" if timed else "none"}, None
    if hints.prediction_type is None:
        raise InputError(
            f"{source}: its weights do not tell what it predicts: pass --prediction_type sample or velocity (released "
            "models of one step predict the sample, others the velocity)."
        )
    config["prediction_type"] = hints.prediction_type
    repeats = hints.repeats or 1
    if repeats > 1 and (target or not timed or hints.num_steps not in (None, 1)):
        raise InputError(f"{source}: --repeats {repeats} is for models of one step with one time embedding.")
    if target or not timed:
        if hints.num_steps is not None and (target or hints.num_steps > 1):
            found = "two time embeddings is for any number of steps" if target else "no time embedding makes one step"
            raise InputError(f"{source}: --num_steps {hints.num_steps}, but a generator with {found}.")
        return config | {"time_conditioning": "source_target" if target else "none"}, None if target else 1
    if repeats > 1:
        return config | {"time_conditioning": "none", "repeats": repeats}, 1
    if hints.num_steps is None or hints.num_steps < 2:
        raise InputError(
            f"{source}: a generator with one time embedding makes either a fixed number of steps or one step with "
            "repeated blocks, and its weights do not tell: pass --num_steps (2, 4, ...) or --repeats (2, 4)."
        )
    return config | {"time_conditioning": "source"}, hints.num_steps


def _is_sit(cls: type, state: State, config: dict, hints: Hints, source: str) -> bool:
    """Whether a network is a SiT or a SiT's discriminator; the shapes alone leave it open in two cases."""
    timed = "t_embedder.mlp.0.weight" in state
    possible = timed and "t_tgt_embedder.mlp.0.weight" not in state
    if cls is AdversarialFlowTransformer2DModel:
        outputs = state["final_layer.linear.weight"].shape[0] // config["patch_size"] ** 2
        twice = outputs == 2 * config["in_channels"]
        if twice and not hints.sit:
            raise InputError(
                f"{source}: twice as many output channels as input channels are those of a SiT (pass --sit), or of a "
                "DiT with learned variances, which is no flow and can't be used."
            )
        possible = possible and twice
    elif possible and hints.sit is None:
        raise InputError(
            f"{source}: a discriminator with a time embedding is a SiT's or one of AFM's: pass --sit or --no-sit."
        )
    if hints.sit and not possible:
        raise InputError(f"{source}: --sit, but this network does not have the shapes of a SiT.")
    return bool(hints.sit)


def _jit_config(state: State, hints: Hints, source: str) -> dict:
    width = state["x_embedder.proj2.weight"].shape[0]
    config = _sizes(state, "x_embedder.proj1.weight", width)
    head_dim = state["blocks.0.attn.q_norm.weight"].shape[0]
    if hints.num_attention_heads not in (None, width // head_dim):
        raise InputError(
            f"{source}: --num_attention_heads {hints.num_attention_heads}, but the norms of queries and keys say "
            f"{width // head_dim}."
        )
    start = hints.in_context_start
    if start is None:
        start = JIT_STARTS.get((config["num_layers"], width))
    if start is None:
        raise InputError(
            f"{source}: a JiT of {config['num_layers']} blocks of width {width} is none of the published sizes: pass "
            "--in_context_start, the number of the block at which the in-context tokens join."
        )
    return config | {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": ratio_of(state["blocks.0.mlp.w3.weight"].shape[1], width, cut=2 / 3),
        "bottleneck_dim": state["x_embedder.proj1.weight"].shape[0],
        "in_context_length": state["in_context_posemb"].shape[1],
        "in_context_start": start,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "use_null_class": True,
        "dropout": 0.2 if width == 1280 else 0.0,  # of the published training of H
    }


def make_converted(state: State, hints: Hints, source: str) -> tuple[torch.nn.Module, int | None]:
    """
    The network of a plain checkpoint, in float32 and with its weights, and the pipeline's number of steps.

    Raises:
        InputError: if weights are missing, unknown or of a wrong shape.
    """
    cls, config, num_steps = infer_config(state, hints, source)
    renamed = to_project_names(state, cls, source)
    try:
        with torch.device("meta"):
            model = cls(**config)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    expected = model.state_dict()
    missing = sorted(set(expected) - set(renamed))
    inverse = plain_names(cls)
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
    (`weights`: raw, ema1, the default, or ema2).

    Raises:
        InputError: if the file is no such thing.
    """
    source = str(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Training codes keep their flags beside the weights: a Namespace of plain values is safe to load.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{source}: torch.load(weights_only=True) refuses it, as it holds more than tensors or is no checkpoint. "
            "Save its state dict alone: torch.save(state_dict, path)."
        ) from error
    except Exception as error:  # as many kinds as there are ways to damage a file
        raise InputError(f"{source}: can't be read as a checkpoint ({first_line(error)}).") from error
    if isinstance(content, dict) and "model_ema1" in content:
        content = content.get({None: "model_ema1", "raw": "model"}.get(weights, f"model_{weights}"))
    elif weights is not None:
        raise InputError(f"--weights {weights}: {source} holds no choice of weights; leave it out.")
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not (named and content and all(isinstance(value, torch.Tensor) for value in content.values())):
        raise InputError(f"{source}: this is not a state dict (names and tensors).")
    return {name.removeprefix(JIT_PREFIX): value for name, value in content.items()}


# ---------------------------------------------------------------------------------------------------------- back again


def check_plain(model: torch.nn.Module, source: str) -> None:
    """Raises an `InputError` if a plain checkpoint of this network would not be read back as the same network."""
    given = {field: model.config.get(field) for field in ("num_attention_heads", "prediction_type", "repeats")}
    fixed = model.config.get("time_conditioning") == "source"
    hints = Hints(
        **given,
        sit=bool(model.config.get("sit_convention")),
        num_steps=2 if fixed else None,
        in_context_start=model.config.get("in_context_start"),
    )
    state = {name: value.to("meta") for name, value in to_plain_names(model).items()}
    _, config, _ = infer_config(state, hints, source)
    with torch.device("meta"):
        again = type(model)(**config)
    ignored = ("dropout",)  # of training
    names = [name for name in again.config if not name.startswith("_") and name not in ignored]
    lost = [f"{name} {model.config[name]!r}" for name in names if model.config[name] != again.config[name]]
    if lost:
        raise InputError(f"{source}: the plain format can't hold what this network is: {listed(lost)}.")
