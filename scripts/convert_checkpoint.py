#!/usr/bin/env python
# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Turns a plain checkpoint of AFM, CAFM, SiT or JiT into a pipeline folder, or a folder back into a plain checkpoint.

    python scripts/convert_checkpoint.py xl2_1nfe_noguide_FID3.98.pth afm-xl2
    python scripts/convert_checkpoint.py checkpoint-last.pth jit-h16 --weights ema1
    python scripts/convert_checkpoint.py states/0000100000/models my-model          # gen, ema and dis of a training
    python scripts/convert_checkpoint.py afm-xl2 afm-xl2.pth --to afm

A discriminator or a classifier becomes a model's folder.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler, ModelMixin
from huggingface_hub.utils import HFValidationError, validate_repo_id

from adversarial_flow import (
    AdversarialFlowPipeline,
    AdversarialFlowTransformer2DModel,
    JiTTransformer2DModel,
)
from adversarial_flow.utils.checkpointing import appearing_at_once
from adversarial_flow.utils.conversion import (
    JIT_PREFIX,
    Hints,
    check_plain,
    known_hints,
    make_converted,
    read_state,
    to_plain_names,
)
from adversarial_flow.utils.errors import InputError, run_script
from adversarial_flow.utils.latents import load_vae
from adversarial_flow.utils.networks import load_any_network


RELEASED_VAE = "stabilityai/sd-vae-ft-mse"  # of all released models of latents
RELEASED_SCALING, RELEASED_CHANNELS = 0.18215, 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="A file, a folder with gen.pth / ema.pth / dis.pth; or --to.")
    parser.add_argument("output", type=Path, help="A new folder; with --to a new file.")
    parser.add_argument("--to", choices=("afm", "sit", "jit"), help="Write the plain format of this kind back.")
    parser.add_argument("--weights", choices=("ema1", "ema2", "raw"), help="Of official JiT files (default ema1).")
    parser.add_argument("--raw", action="store_true", help="Of a training's folder: gen.pth, not ema.pth.")
    parser.add_argument(
        "--vae",
        help=f"The VAE of a model of latents: a folder, which is copied, or a Hub id, which is loaded with the "
        f"pipeline (default {RELEASED_VAE}); none: leave it out.",
    )
    parser.add_argument(
        "--sit",
        action=argparse.BooleanOptionalAction,
        help="Whether it is a SiT or a SiT's discriminator, where no released file's name says so.",
    )
    parser.add_argument("--prediction_type", choices=("sample", "velocity"), help="What AFM's generator predicts.")
    parser.add_argument("--num_steps", type=int, help="Steps that the generator was trained for.")
    parser.add_argument("--repeats", type=int, help="How often the blocks of a deep one-step model are applied.")
    parser.add_argument("--num_attention_heads", type=int, help="Of sizes that were not published.")
    parser.add_argument("--in_context_start", type=int, help="Of a JiT of a size that was not published.")
    args = parser.parse_args(argv)
    for name in ("num_steps", "repeats", "num_attention_heads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    flags = ("vae", "weights", *Hints.__dataclass_fields__)
    given = [f"--{name}" for name in flags if getattr(args, name) is not None] + ["--raw"] * args.raw
    if args.to is not None and given:
        raise InputError(f"{', '.join(given)}: not for --to, which writes what the folder holds.")
    if args.output.exists():
        raise InputError(f"{args.output} exists: choose another output, or remove it.")
    if not args.checkpoint.exists():
        raise InputError(f"{args.checkpoint}: there is no such file or folder.")
    return args


def read_hints(args: argparse.Namespace) -> Hints:
    """What flags say, and else the name of a released file."""
    known = vars(known_hints(args.checkpoint.name))
    given = {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    return Hints(**known | given)


def find_files(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The generator's file (or the only one) and, in a training's folder, the discriminator's."""
    folder = args.checkpoint
    if folder.is_file():
        if args.raw:
            raise InputError("--raw is for a training's folder; official JiT files have --weights.")
        return folder, None
    if (folder / "models").is_dir():
        folder = folder / "models"
    generator, discriminator = folder / ("gen.pth" if args.raw else "ema.pth"), folder / "dis.pth"
    if not generator.exists():
        raise InputError(f"{folder}: there is no {generator.name}; name a file, or a folder that a training left.")
    return generator, discriminator if discriminator.exists() else None


def find_vae(name: str | None, transformer: ModelMixin) -> tuple[AutoencoderKL | None, str | None]:
    """The VAE of a model of latents and a reference to it, at most one of them; none for a model of pixels."""
    channels = transformer.config.in_channels
    latents = isinstance(transformer, AdversarialFlowTransformer2DModel) and channels not in (1, 3)
    if not latents and name not in (None, "none"):
        raise InputError(f"--vae {name}: this is a model of pixels with {channels} channels; leave --vae out.")
    if not latents or name == "none":
        return None, None
    if name is None and channels != RELEASED_CHANNELS:
        raise InputError(
            f"The released VAE has {RELEASED_CHANNELS} latent channels, the model {channels}: give --vae FOLDER with "
            "its own VAE, or --vae none."
        )
    if name is None or not Path(name).is_dir():
        try:
            validate_repo_id(name or RELEASED_VAE)
            if Path(name or RELEASED_VAE).exists():
                raise HFValidationError("it is a file")
        except HFValidationError as error:
            raise InputError(f"--vae {name}: neither a folder with an AutoencoderKL nor a Hub id.") from error
        return None, name or RELEASED_VAE
    vae = load_vae(name)
    if vae.config.latent_channels != channels:
        raise InputError(f"--vae {name} has {vae.config.latent_channels} latent channels, the model {channels}.")
    if vae.config.scaling_factor != RELEASED_SCALING:
        raise InputError(
            f"--vae {name} scales latents by {vae.config.scaling_factor}; the released models were trained with "
            f"{RELEASED_SCALING}."
        )
    return vae, None


def imagenet_names() -> list[str]:
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.DEFAULT.meta["categories"]


def convert(args: argparse.Namespace) -> None:
    """A checkpoint to a folder, which appears when it is complete."""
    generator_file, discriminator_file = find_files(args)
    hints = read_hints(args)
    model, num_steps = make_converted(read_state(generator_file, args.weights), hints, str(generator_file))
    saved = [(model, ".")]
    if isinstance(model, (AdversarialFlowTransformer2DModel, JiTTransformer2DModel)):
        vae, vae_name_or_path = find_vae(args.vae, model)
        classes = model.config.num_classes
        pipeline = AdversarialFlowPipeline(
            transformer=model,
            scheduler=FlowMapEulerDiscreteScheduler(),
            vae=vae,
            id2label=dict(enumerate(imagenet_names() if classes == 1000 else map(str, range(classes)))),
            num_steps=num_steps,
        )
        pipeline.register_to_config(vae_name_or_path=vae_name_or_path)  # not loaded now: that may need the network
        saved = [(pipeline, ".")]
    elif args.vae is not None:
        raise InputError(f"--vae {args.vae}: a {type(model).__name__} has no pipeline; leave it out.")
    if discriminator_file is not None:
        hints.sit = bool(model.config.get("sit_convention"))
        discriminator, _ = make_converted(read_state(discriminator_file), hints, str(discriminator_file))
        saved.append((discriminator, "discriminator"))
    with appearing_at_once(args.output) as partial:
        for item, subfolder in saved:
            item.save_pretrained(partial / subfolder)
    print(f"{args.output}: {type(model).__name__}, {model.num_parameters():,} parameters.")
    if saved[0][0] is not model:
        print(
            "Sample it with:\n"
            '  python -c "from adversarial_flow import AdversarialFlowPipeline as P; '
            f"P.from_pretrained('{args.output}')(class_labels=0).images[0].save('sample.png')\""
        )


def convert_back(args: argparse.Namespace) -> None:
    """A pipeline's or a model's folder to a plain file."""
    model = load_any_network(str(args.checkpoint), str(args.checkpoint))
    sit = bool(model.config.get("sit_convention"))
    kind = "jit" if type(model).__name__.startswith("JiT") else "sit" if sit else "afm"
    if kind != args.to:
        raise InputError(f"--to {args.to}: {args.checkpoint} holds a network of the kind {kind!r}.")
    check_plain(model, str(args.checkpoint))
    state = to_plain_names(model)
    count = len(state)
    if isinstance(model, JiTTransformer2DModel):  # what the official code reads: three copies
        state = {f"{JIT_PREFIX}{name}": value for name, value in state.items()}
        state = {name: state for name in ("model", "model_ema1", "model_ema2")}
    with appearing_at_once(args.output) as partial:
        torch.save(state, partial)
    print(f"{args.output}: {count} weights of a {type(model).__name__}.")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.to is None:
        convert(args)
    else:
        convert_back(args)


if __name__ == "__main__":
    run_script(main)
