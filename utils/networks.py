# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The configs of both networks from files, flags and data, and the networks themselves."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from adversarial_flow.models import (
    AdversarialFlowClassifier,
    AdversarialFlowDiscriminator,
    AdversarialFlowTransformer2DModel,
    JiTDiscriminator,
    JiTTransformer2DModel,
)
from adversarial_flow.utils.data import TrainingData
from adversarial_flow.utils.errors import InputError, first_line, listed


DEFAULT_SIZES = {"patch_size": 2, "num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}  # DiT-S/2


def _read_json(name_or_path: str, subfolder: str | None = None) -> dict:
    """A JSON file, or the `config.json` of a model's folder or Hub id or of its `subfolder`."""
    path = Path(name_or_path)
    names = ["config.json"] + ([f"{subfolder}/config.json"] if subfolder else [])
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), path / names[-1])
    elif not path.exists():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(name_or_path, names[-1]))
        except EntryNotFoundError:
            path = Path(hf_hub_download(name_or_path, names[0]))
    return dict(json.loads(path.read_text()))


def read_config(name_or_path: str | None, flag: str) -> dict:
    """
    The entries of a network's config: a JSON file, or a folder or Hub id with a `config.json`;
    `DEFAULT_SIZES` for `None`.

    Raises:
        InputError: if there is none.
    """
    if name_or_path is None:
        return dict(DEFAULT_SIZES)
    try:
        values = _read_json(name_or_path)
    except Exception as error:  # the Hub's client has many kinds of errors, all mean that there is no config
        raise InputError(f"{flag} {name_or_path}: no config could be read there ({first_line(error)}).") from error
    return {key: value for key, value in values.items() if not key.startswith("_")}


def read_class_name(name_or_path: str | None, subfolder: str | None = None) -> str | None:
    """The class that a config is for, if it says so."""
    try:
        return _read_json(name_or_path, subfolder).get("_class_name") if name_or_path is not None else None
    except Exception:  # whoever reads the config or the weights says what is wrong
        return None


def data_config(args, data: TrainingData, vae: AutoencoderKL | None) -> dict:
    """The entries of a network's config that the data and the VAE decide."""
    shared = {"sample_size": data.resolution, "in_channels": data.channels, "num_classes": len(data.id2label) or None}
    if vae is not None:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if vae.config.in_channels != data.channels:
            raise InputError(
                f"--vae {args.vae} takes {vae.config.in_channels} channels, the images have {data.channels}."
            )
        if data.resolution % factor != 0:
            raise InputError(f"--resolution {data.resolution} is not divisible by the VAE's factor {factor}.")
        shared.update(sample_size=data.resolution // factor, in_channels=vae.config.latent_channels)
    return shared


def transformer_config(args, data: TrainingData, vae: AutoencoderKL | None) -> dict:
    """The sizes of `--model_config_name_or_path` with what the data decides; room for more classes is kept."""
    path = args.model_config_name_or_path
    config, shared = read_config(path, "--model_config_name_or_path"), data_config(args, data, vae)
    limit = config.get("num_classes")
    if limit is not None:
        if shared["num_classes"] is None:
            raise InputError(
                f"the data has no labels and --model_config_name_or_path {path} says {limit} classes: name the labels "
                "with --label_column, put the images of each class into a folder, or remove num_classes."
            )
        if shared["num_classes"] > limit:
            raise InputError(
                f"the data has {shared['num_classes']} classes and --model_config_name_or_path {path} says {limit}: "
                "raise or remove its num_classes, or choose other data."
            )
        shared["num_classes"] = limit
    return config | shared


def network_configs(args, data: TrainingData, vae: AutoencoderKL | None) -> tuple[dict, dict]:
    """The configs of AFM's generator and discriminator: sizes from files, the rest from flags and data."""
    transformer = transformer_config(args, data, vae)
    shared = {key: transformer[key] for key in ("sample_size", "in_channels", "num_classes")}
    discriminator = dict(transformer)
    if args.discriminator_config_name_or_path is not None:
        discriminator = read_config(args.discriminator_config_name_or_path, "--discriminator_config_name_or_path")
    time_conditioning = {1: "none", None: "source_target"}.get(args.num_steps, "source")
    transformer.update(time_conditioning=time_conditioning, prediction_type=args.prediction_type, repeats=args.repeats)
    discriminator.update(shared, time_conditioning="none" if args.num_steps == 1 else "source")
    for key in ("prediction_type", "repeats"):
        discriminator.pop(key, None)
    return transformer, discriminator


def make_network(cls: type, config: dict, flag: str = "--model_config_name_or_path") -> torch.nn.Module:
    try:
        return cls(**config)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"the networks' config does not work ({flag}): {error}") from error


def make_networks(
    configs: tuple[dict, dict],
) -> tuple[AdversarialFlowTransformer2DModel, AdversarialFlowDiscriminator]:
    """AFM's generator and discriminator."""
    classes = AdversarialFlowTransformer2DModel, AdversarialFlowDiscriminator
    return tuple(make_network(cls, config) for cls, config in zip(classes, configs))


# -------------------------------------------------------------------------------------------------------- velocities


VELOCITY_NETWORKS = {  # the transformer and its discriminator, by the class name in a config
    "AdversarialFlowTransformer2DModel": (AdversarialFlowTransformer2DModel, AdversarialFlowDiscriminator),
    "JiTTransformer2DModel": (JiTTransformer2DModel, JiTDiscriminator),
}


def make_velocity_transformer(args, data: TrainingData, vae: AutoencoderKL | None) -> torch.nn.Module:
    """
    A new flow-matching model of the sizes of `--model_config_name_or_path`, whose `_class_name` may be
    `"JiTTransformer2DModel"`, with a null class if labels are dropped.
    """
    path = args.model_config_name_or_path
    config = transformer_config(args, data, vae)
    config["use_null_class"] = config["num_classes"] is not None and args.label_dropout > 0
    cls = _velocity_class(read_class_name(path), f"--model_config_name_or_path {path}")
    if cls is AdversarialFlowTransformer2DModel:
        config |= {"time_conditioning": "source", "prediction_type": "velocity"}
    elif config["num_classes"] is None:
        raise InputError(f"--model_config_name_or_path {path}: JiT needs classes, and the data has no labels.")
    return make_network(cls, config)


def _velocity_class(name: str | None, flag: str) -> type:
    if name is not None and name not in VELOCITY_NETWORKS:
        raise InputError(f"{flag}: a {name} is none of the networks known here: {', '.join(VELOCITY_NETWORKS)}.")
    return VELOCITY_NETWORKS[name or "AdversarialFlowTransformer2DModel"][0]


def load_velocity_transformer(args, data: TrainingData, vae: AutoencoderKL | None) -> torch.nn.Module:
    """
    The flow-matching model of `--pretrained_model_name_or_path`: a pipeline's or a model's folder, or a Hub id.

    Raises:
        InputError: if there is none, if its config and weights disagree, or if it does not fit the data or the flags.
    """
    path = args.pretrained_model_name_or_path
    flag = f"--pretrained_model_name_or_path {path}"
    model = load_flow_model(path, flag)
    config = model.config
    for key, value in data_config(args, data, vae).items():
        if config[key] != value and not (key == "num_classes" and 0 < (value or 0) < (config[key] or 0)):
            hint = "pass the --vae it was trained with" if vae is None else "leave --vae out"
            raise InputError(
                f"{flag}: its {key} is {config[key]}, the data has {value}: use other data or flags"
                + (f", or {hint}." if key != "num_classes" else ".")
            )
    if config.num_classes is not None and args.label_dropout > 0 and not config.use_null_class:
        raise InputError(
            f"{flag} has no null class, which --label_dropout {args.label_dropout} needs: pass --label_dropout 0."
        )
    return model


def load_flow_model(path: str, flag: str) -> torch.nn.Module:
    """A network that predicts the velocity of a flow."""
    cls = _velocity_class(read_class_name(path, "transformer"), flag)
    model = load_network(cls, path, "transformer", flag)
    kind = model.config.get("prediction_type", "velocity"), model.config.get("time_conditioning", "source")
    if kind != ("velocity", "source"):
        raise InputError(
            f"{flag}: this is not a flow-matching model (it predicts the {kind[0]}, with time_conditioning "
            f"{kind[1]!r}); train one with train_fm.py."
        )
    return model


def make_discriminator(path: str | None, transformer: torch.nn.Module) -> torch.nn.Module:
    """
    CAFM's discriminator for a transformer, with the transformer's weights, or from `--discriminator_name_or_path`: a
    flow-matching model of any size, a discriminator, or a JSON file with sizes for a new one.

    Raises:
        InputError: if there is none, or if it sees other data.
    """
    discriminator_class = VELOCITY_NETWORKS[type(transformer).__name__][1]
    if path is None:
        return discriminator_class.from_transformer(transformer)
    flag = f"--discriminator_name_or_path {path}"
    if path.endswith(".json"):
        config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
        source = make_network(type(transformer), config | read_config(path, "--discriminator_name_or_path"), flag)
    elif (read_class_name(path) or "").endswith("Discriminator"):
        source = load_network(discriminator_class, path, "discriminator", flag)
    else:
        source = load_flow_model(path, flag)
    if source.config.get("time_conditioning", "source") != "source":
        raise InputError(f"{flag}: a discriminator without the time can't judge velocities; name another one.")
    for key in ("sample_size", "in_channels", "num_classes", "use_null_class"):
        if source.config[key] != transformer.config[key]:
            raise InputError(
                f"{flag}: its {key} is {source.config[key]}, the starting model has {transformer.config[key]}."
            )
    if isinstance(source, discriminator_class):
        return source
    return VELOCITY_NETWORKS[type(source).__name__][1].from_transformer(source)


def load_network(cls: type, name_or_path: str, subfolder: str, flag: str) -> torch.nn.Module:
    """
    A network in float32 from a pipeline's folder or Hub id, which has it in `subfolder`, or from its own.

    Raises:
        InputError: if there is none, or if its config and weights disagree (each key named, ten at most).
    """
    options = {"output_loading_info": True, "low_cpu_mem_usage": False}
    folder = Path(name_or_path)
    try:
        if folder.is_file():
            raise OSError("this is a file, not a folder or a Hub id")
        if folder.is_dir() and not (folder / subfolder).is_dir():
            model, info = cls.from_pretrained(name_or_path, **options)
        else:
            try:
                model, info = cls.from_pretrained(name_or_path, subfolder=subfolder, **options)
            except OSError:
                if folder.is_dir():
                    raise
                model, info = cls.from_pretrained(name_or_path, **options)  # a model of its own on the Hub
    except Exception as error:  # the Hub's client and safetensors have many kinds of errors
        raise InputError(f"{flag}: no {cls.__name__} could be loaded ({first_line(error)}).") from error
    wrong = [f"{kind.split('_')[0]} {key}" for kind in ("missing_keys", "unexpected_keys") for key in info[kind]]
    if wrong:
        raise InputError(f"{flag}: its config and weights disagree ({listed(wrong)}).")
    return model


def load_any_network(name_or_path: str, flag: str) -> torch.nn.Module:
    """
    The transformer of a pipeline, or a network of its own of any kind.

    Raises:
        InputError: if there is none.
    """
    classes = {cls.__name__: cls for pair in VELOCITY_NETWORKS.values() for cls in pair}
    classes[AdversarialFlowClassifier.__name__] = AdversarialFlowClassifier
    name = read_class_name(name_or_path, "transformer")
    if name not in classes:
        raise InputError(f"{flag}: there is no network of a known class ({', '.join(classes)}).")
    return load_network(classes[name], name_or_path, "transformer", flag)
