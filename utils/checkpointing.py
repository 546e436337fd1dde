# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are whole or not there: written to a temporary folder, then renamed.

`checkpoint-N/` holds what `accelerator.save_state` writes (optimisers, learning-rate schedules, registered objects,
the RNG of every rank), each network in diffusers' format in a folder of its own, and `trainer_state.json` with the
number of updates, the networks' configs and the size of every file, by which a truncated checkpoint is recognised.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from adversarial_flow.utils.errors import InputError, first_line


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
TEMPORARY_PREFIX = "tmp-checkpoint-"
METRICS_FILE = "metrics.jsonl"
WEIGHTS = ("transformer", "discriminator", "vae")
RUN_FILES = ("model_index.json", "results.json", METRICS_FILE, "samples.png", "curves.png", "README.md", "logs")
RUN_FILES += (*WEIGHTS, "scheduler", "pipeline_adversarial_flow.py", "comparison.json", "comparison.png", "control")
# Config entries that do not describe the architecture.
IGNORED_CONFIG_KEYS = ("_name_or_path", "_class_name", "_diffusers_version", "_use_default_values")


def architecture(model: torch.nn.Module) -> dict:
    """The config entries of a diffusers model that decide which weights fit."""
    return {key: value for key, value in model.config.items() if key not in IGNORED_CONFIG_KEYS}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if p.is_dir()), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """N of `checkpoint-N`."""
    return int(folder.name.split("-")[1])


def register_model_folders(accelerator: Accelerator, models: dict[str, torch.nn.Module], ema: EMAModel) -> None:
    """Makes `save_state` and `load_state` keep the networks in diffusers' format, in folders with the given names."""

    def save_models(_, weights: list, output_dir: str) -> None:
        if accelerator.is_main_process:
            for name, model in models.items():
                model.save_pretrained(os.path.join(output_dir, name))
            ema.save_pretrained(os.path.join(output_dir, "transformer_ema"))
        weights.clear()  # nothing is left for accelerate to save

    def load_models(unused_models: list, input_dir: str) -> None:
        for name, model in models.items():
            model.load_state_dict(type(model).from_pretrained(os.path.join(input_dir, name)).state_dict())
        averaged = ema.model_cls.from_pretrained(os.path.join(input_dir, "transformer_ema"))
        state = {name: averaged.config[name] for name in ema.state_dict() if name in averaged.config}
        # The decay of this run's flags goes before the one in the checkpoint.
        state |= {"decay": ema.decay, "min_decay": ema.min_decay, "shadow_params": list(averaged.parameters())}
        ema.load_state_dict(state)
        ema.to(accelerator.device)
        unused_models.clear()

    accelerator.register_save_state_pre_hook(save_models)
    accelerator.register_load_state_pre_hook(load_models)


def save_checkpoint(
    accelerator: Accelerator, output_dir: str, step: int, state: dict, total_limit: int | None = None
) -> Path:
    """
    Writes `checkpoint-{step}` and then removes the oldest ones over `total_limit`. Called on all ranks.

    A checkpoint with a higher number belongs to a branch that this run has left (it resumed from an earlier one, or
    the later one was damaged): it goes first and is never counted as one of those that are kept.

    Args:
        state (`dict`): JSON values that [`find_checkpoint`] gives back; `"architecture"` is compared on resuming.

    Raises:
        InputError: on all ranks, if any rank could not write. The newest checkpoint of before is untouched.
    """
    temporary = Path(output_dir) / f"{TEMPORARY_PREFIX}{step}"
    final = Path(output_dir) / f"checkpoint-{step}"
    error = None
    if accelerator.is_main_process:
        # Makes room first, as diffusers' examples do, but never at the price of the last checkpoint.
        _remove_oldest(output_dir, step - 1, max(total_limit - 1, 1) if total_limit is not None else None)
        _remove(temporary)
    accelerator.wait_for_everyone()
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        accelerator.save_state(str(temporary))
    except Exception as exception:  # a full disk surfaces as OSError, RuntimeError or SafetensorError
        error = exception
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), reduction="sum")
    if failed == 0 and accelerator.is_main_process:
        try:
            files = {str(p.relative_to(temporary)): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
            (temporary / STATE_FILE).write_text(json.dumps({"step": step, **state, "files": files}, indent=2))
            _remove(final)
            os.replace(temporary, final)
            for folder in list_checkpoints(output_dir):
                if checkpoint_step(folder) > step:
                    logger.warning(f"Removing {folder}: this run went on from an earlier checkpoint.")
                    _remove(folder)
            _remove_oldest(output_dir, step, total_limit)
        except OSError as exception:
            error = exception
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), reduction="sum")
    if failed != 0:
        if accelerator.is_main_process:
            _remove(temporary)
        kept, _ = newest_whole_checkpoint(output_dir) or (None, None)
        raise InputError(
            f"--output_dir {output_dir}: checkpoint {step} could not be written ({error or 'on another rank'}). Make "
            f"room on the disk and resume from {kept.name if kept else 'the start: there is no checkpoint yet'}."
        )
    return final


def _remove_oldest(output_dir: str | Path, up_to_step: int, keep: int | None) -> None:
    """Leaves the newest `keep` of the checkpoints up to a step (`None`: all)."""
    checkpoints = [folder for folder in list_checkpoints(output_dir) if checkpoint_step(folder) <= up_to_step]
    for folder in checkpoints[:-keep] if keep is not None else []:
        logger.info(f"Removing {folder} (--checkpoints_total_limit).")
        _remove(folder)


def _remove(path: Path) -> None:
    """Removes a file, a folder or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_run(output_dir: str | Path, going_on: bool) -> None:
    """
    Removes what an earlier run left in `output_dir`: half-written checkpoints always, and unless this run is
    `going_on` from one there, its checkpoints, weights, pictures and logs. Files that no run writes stay.
    """
    folder = Path(output_dir)
    leftovers = list(folder.glob(f"{TEMPORARY_PREFIX}*"))
    if not going_on and holds_run(folder):
        leftovers += list_checkpoints(folder) + [folder / name for name in RUN_FILES]
    for path in leftovers:
        _remove(path)


def read_checkpoint(folder: Path) -> dict:
    """
    The `trainer_state.json` of a checkpoint whose files are all there in full.

    Raises:
        InputError: naming the first file that is missing or truncated.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        files = {**state["files"]}
        state["step"], state["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: {STATE_FILE} can't be read ({error!r}).") from error
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"{folder}: {name} is missing or truncated.")
    return state


def newest_whole_checkpoint(output_dir: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that is not damaged and its state; damaged ones on the way to it are named in the log."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            return folder, read_checkpoint(folder)
        except InputError as error:
            logger.warning(f"Skipping a damaged checkpoint: {error}")
    return None


def find_checkpoint(
    resume_from: str, output_dir: str | Path, expected_architecture: dict, overwrite: bool = False
) -> tuple[Path, dict] | None:
    """
    The checkpoint to resume from and its state; `None` when `"latest"` is asked for and there is none yet.

    `"latest"` falls back to the newest checkpoint that is whole, and says so; a path must be whole.

    Args:
        expected_architecture (`dict`): What must agree, part by part: [`architecture`] of each network, and more.
        overwrite (`bool`): Whether other results in `output_dir` may be lost.

    Raises:
        InputError: if a named checkpoint is missing or damaged, or belongs to another architecture; and, without
            `overwrite`, if going on from it would replace later checkpoints, weights or another run in `output_dir`.
    """
    remedy = "Add --overwrite_output_dir to discard that, or choose another --output_dir."
    if resume_from == "latest":
        found = newest_whole_checkpoint(output_dir)
        if found is None:
            held = [p.name for p in list_checkpoints(output_dir)] + _existing(output_dir, WEIGHTS)
            if held and not overwrite:
                raise InputError(
                    f"--resume_from_checkpoint latest: {output_dir} has {', '.join(held)}, but no checkpoint that is "
                    f"whole, and a new run would replace them. {remedy}"
                )
            return None
        folder, state = found
    else:
        folder = Path(resume_from)
        if not folder.is_dir() and (Path(output_dir) / folder).is_dir():
            folder = Path(output_dir) / folder
        if not folder.is_dir():
            raise InputError(f"--resume_from_checkpoint {resume_from}: there is no such folder.")
        state = read_checkpoint(folder)
        replaced = [p.name for p in list_checkpoints(output_dir) if checkpoint_step(p) > state["step"]]
        if not belongs_to(folder, output_dir):
            replaced = [p.name for p in list_checkpoints(output_dir)] + _existing(output_dir, RUN_FILES)
        if replaced and not overwrite:
            raise InputError(
                f"--resume_from_checkpoint {resume_from}: going on from there would replace {', '.join(replaced)} in "
                f"--output_dir {output_dir}. {remedy}"
            )
    for part, expected in expected_architecture.items():
        saved = state["architecture"].get(part, {})
        different = [key for key in {**saved, **expected} if saved.get(key) != expected.get(key)]
        if different:
            changes = ", ".join(f"{key} {saved.get(key)} -> {expected.get(key)}" for key in different[:5])
            raise InputError(
                f"--resume_from_checkpoint {folder}: its {part} has another architecture ({changes}). Pass the "
                "flags of that run, or another --output_dir."
            )
    return folder, state


def belongs_to(checkpoint: Path, output_dir: str | Path) -> bool:
    """Whether the checkpoint, or a link to it, lies in the folder."""
    return Path(os.path.abspath(checkpoint)).parent.resolve() == Path(output_dir).resolve()


def _existing(output_dir: str | Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (Path(output_dir) / name).exists()]


def holds_run(output_dir: str | Path) -> bool:
    """Whether a training script has written to this folder (the log of its metrics is its first file)."""
    return (Path(output_dir) / METRICS_FILE).exists()


@contextlib.contextmanager
def appearing_at_once(output: Path):
    """
    A path to write a new file or folder to, which gets the name `output` when all of it is written.

    Raises:
        InputError: if something can't be written; nothing is left then.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            partial = Path(folder) / output.name
            yield partial
            partial.rename(output)
    except InputError:
        raise
    except Exception as error:  # a full disk surfaces as OSError, RuntimeError or SafetensorError
        raise InputError(f"{output}: can't be written ({first_line(error)}).") from error
