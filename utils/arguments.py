# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The flags that the training scripts share, named as in diffusers' examples, and the checks of their values."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from diffusers.optimization import SchedulerType

from adversarial_flow.utils.checkpointing import holds_run, list_checkpoints
from adversarial_flow.utils.errors import InputError


def make_parser(description: str) -> argparse.ArgumentParser:
    """Flags are given in full: what looks for a flag on the command line (the token's) must find it."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data (without --train_data_dir and --dataset_name: scikit-learn's digits)")
    group.add_argument(
        "--train_data_dir", type=str, help="A folder of images (a sub-folder is a class) or with MNIST's files."
    )
    group.add_argument("--dataset_name", type=str, help="A data set on the Hub or on disk, read by `datasets`.")
    group.add_argument("--dataset_config_name", type=str, help="The configuration of --dataset_name.")
    group.add_argument("--dataset_split", type=str, default="train", help="The split to train on.")
    group.add_argument("--image_column", type=str, default="image", help="The column with the images.")
    group.add_argument("--label_column", type=str, help="The column with the classes; default: 'label' if it exists.")
    group.add_argument("--cache_dir", type=str, help="Where `datasets` keeps its files.")
    group.add_argument("--resolution", type=int, help="Images are resized and cropped to this size (default 64).")
    group.add_argument("--channels", type=int, default=3, choices=(1, 3), help="Train on grey (1) or RGB (3) images.")
    group.add_argument(
        "--random_flip",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Mirror images at random, with probability 1/2.",
    )
    group.add_argument(
        "--allow_upscaling",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Enlarge images that are smaller than --resolution (ImageNet has some) rather than refuse them.",
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load data.")
    group.add_argument("--vae", type=str, help="Train on the latents of this AutoencoderKL (folder or Hub id).")


def add_schedule_arguments(group, name: str, default: float, what: str) -> None:
    """A weight of the objective that may change on a schedule of generator updates."""
    group.add_argument(f"--{name}", type=float, default=default, help=f"{what}: value at the start.")
    group.add_argument(f"--{name}_end", type=float, help="Value at the end of its schedule.")
    group.add_argument(f"--{name}_schedule", choices=("cosine", "linear", "constant"), default="cosine")
    group.add_argument(f"--{name}_decay_steps", type=int, help="Generator updates; default: all.")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", type=str, help="A JSON file with values of flags; flags given here go first.")
    group.add_argument("--output_dir", type=str, help="Where everything is written.")
    group.add_argument(
        "--overwrite_output_dir", action="store_true", help="Remove the run that --output_dir holds and start anew."
    )
    group.add_argument("--seed", type=int, default=0, help="Of the weights, the data order and all noise.")
    group.add_argument("--train_batch_size", type=int, default=256, help="Images per process and micro-step.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps of one update.")
    group.add_argument(
        "--max_train_steps", type=int, default=100_000, help="Generator updates; in train_cafm.py updates of both."
    )
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument(
        "--lr_scheduler",
        type=str,
        default="constant",
        choices=[s.value for s in SchedulerType if s.value != "piecewise_constant"],
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="In updates of the network concerned.")
    group.add_argument("--adam_beta1", type=float, default=0.0)
    group.add_argument("--adam_beta2", type=float, default=0.9)
    group.add_argument("--adam_weight_decay", type=float, default=0.01)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument(
        "--max_grad_norm", type=float, help="Clip gradients to this norm (5.0 in the paper's deep runs)."
    )
    group.add_argument("--ema_decay", type=float, default=0.9999, help="Of the generator's average, per update.")
    group.add_argument("--mixed_precision", type=str, choices=("no", "fp16", "bf16"), help="Default: accelerate's.")
    group.add_argument(
        "--allow_tf32",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Use TF32 on GPUs, as the published runs did.",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="Trade compute for memory.")
    group.add_argument("--compile", action="store_true", help="torch.compile for G, and for CAFM's D step.")
    group.add_argument("--max_skipped_updates", type=int, default=10, help="Non-finite updates in a row that end it.")
    group.add_argument("--dry_run", action="store_true", help="Print the plan, sizes and memory, and stop.")

    group = parser.add_argument_group("checkpoints, logs and the Hub")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep only this many checkpoints.")
    group.add_argument("--resume_from_checkpoint", type=str, help="'latest' or a checkpoint folder.")
    group.add_argument(
        "--feature_extractor",
        choices=("small_classifier",),
        help="Score samples in the features of a small classifier, trained on the images first; always so on digits.",
    )
    group.add_argument("--validation_steps", type=int, default=1000, help="Steps between sample grids.")
    group.add_argument("--logging_steps", type=int, default=50, help="Steps between lines of the log.")
    group.add_argument("--report_to", type=str, default="tensorboard", choices=("tensorboard", "wandb", "none"))
    group.add_argument("--tracker_project_name", type=str, default="adversarial-flow")
    group.add_argument("--push_to_hub", action="store_true", help="Upload the result when training ends.")
    group.add_argument("--hub_model_id", type=str, help="Repository name; default: the name of --output_dir.")
    group.add_argument("--hub_token", type=str, help="Default: the token of `hf auth login`.")
    group.add_argument("--hub_private_repo", action="store_true", help="Create a private repository.")


def parse_with_recipe(parser: argparse.ArgumentParser, default_recipe: Path | None, argv: list[str] | None = None):
    """
    Parses flags on top of the values of `--recipe`, or of `default_recipe` when no data is named either.

    Paths to configs in a recipe are relative to the recipe.

    Raises:
        InputError: if the recipe can't be read or has an unknown flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    first, _ = parser.parse_known_args(argv)
    recipe = Path(first.recipe) if first.recipe else None
    if recipe is None and on_digits(first):
        recipe = default_recipe
    recipe_flags = []
    if recipe is not None:
        try:
            values = dict(json.loads(recipe.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"--recipe {recipe}: can't be read as a JSON object ({error}).") from error
        known = {action.dest for action in parser._actions}
        for name, value in values.items():
            if name not in known:
                raise InputError(f"--recipe {recipe}: there is no flag --{name}.")
            if isinstance(value, str) and name.endswith("config_name_or_path") and (recipe.parent / value).exists():
                value = os.path.normpath(recipe.parent / value)
            if value is True:
                recipe_flags.append(f"--{name}")
            elif isinstance(value, list):
                recipe_flags += [f"--{name}", *map(str, value)]
            elif value is not False and value is not None:
                recipe_flags.append(f"--{name}={value}")
    args = parser.parse_args([*recipe_flags, *argv])  # of a flag that is given twice the last one counts
    args.recipe = str(recipe) if recipe is not None else None
    return args


def check_range(
    args: argparse.Namespace, name: str, lowest: float = 0, highest: float = math.inf, open_ends: bool = False
) -> None:
    """Raises an `InputError` if the flag is given and is not a finite number in the range."""
    value = getattr(args, name)
    if value is None:
        return
    inside = lowest < value < highest if open_ends else lowest <= value <= highest
    if not (inside and math.isfinite(value)):
        if math.isfinite(highest):
            wanted = f"be between {lowest} and {highest}"
        else:
            wanted = "be positive" if open_ends else "not be negative" if lowest == 0 else f"be at least {lowest}"
        raise InputError(f"--{name} must {wanted}, not {value}.")


def check_schedule(args: argparse.Namespace, name: str, highest: float = math.inf) -> None:
    """Checks the flags of [`add_schedule_arguments`]."""
    for flag in (name, f"{name}_end"):
        check_range(args, flag, highest=highest)
    check_range(args, f"{name}_decay_steps", lowest=1)


def check_share(args: argparse.Namespace, name: str) -> None:
    """Raises an `InputError` if the flag is not in [0, 1)."""
    if not 0 <= getattr(args, name) < 1:
        raise InputError(f"--{name} must be in [0, 1), not {getattr(args, name)}.")


def on_digits(args: argparse.Namespace) -> bool:
    """Whether the flags name no data, which means scikit-learn's digits."""
    return args.train_data_dir is None and args.dataset_name is None


def check_arguments(args: argparse.Namespace, name: str) -> None:
    """
    Raises an `InputError` for values of the shared flags that can't work, and derives what depends on others;
    `name` is the beginning of the default output folder.
    """
    at_least_one = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps")
    at_least_one += ("validation_steps", "logging_steps", "max_skipped_updates", "resolution")
    for flag in at_least_one:
        check_range(args, flag, lowest=1)
    check_range(args, "seed", highest=2**32 - 1)
    for flag in ("learning_rate", "lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers"):
        check_range(args, flag)
    check_range(args, "adam_epsilon", open_ends=True)
    check_range(args, "max_grad_norm", open_ends=True)
    for flag in ("adam_beta1", "adam_beta2", "ema_decay"):
        check_share(args, flag)
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        raise InputError("--checkpoints_total_limit must be at least 1; leave it out to keep all checkpoints.")
    if args.output_dir is None:
        args.output_dir = f"{name}-digits" if on_digits(args) else f"{name}-model"


def prepare_output_dir(args: argparse.Namespace) -> None:
    """
    Checks that `--output_dir` can be written and holds no other run.

    Raises:
        InputError: without `--overwrite_output_dir` or `--resume_from_checkpoint` if the folder has content, and if it
            can't be written.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: this is a file, name a folder.")
    if args.dry_run:
        return
    resuming = args.resume_from_checkpoint is not None
    can_resume = resuming and (holds_run(folder) or list_checkpoints(folder))
    if folder.is_dir() and any(folder.iterdir()) and not can_resume:
        if resuming:
            raise InputError(
                f"--output_dir {folder} holds other files and no run to go on with: choose another folder."
            )
        if not args.overwrite_output_dir:
            raise InputError(
                f"--output_dir {folder} holds another run or other files. Continue it with --resume_from_checkpoint "
                "latest, remove it with --overwrite_output_dir, or choose another folder."
            )
        if not holds_run(folder):
            raise InputError(
                f"--output_dir {folder} holds files that no training script has written, and --overwrite_output_dir "
                "removes runs only: choose another folder."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--output_dir {folder}: can't be written ({error.strerror}). Choose another.") from error
