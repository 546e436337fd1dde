# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are whole or not there: written to a temporary folder, then renamed.

`checkpoint-N/` holds what `accelerator.save_state` writes (optimisers, learning-rate schedules, registered objects,
the RNG of every rank), each network in diffusers' format in a folder of its own, and `trainer_state.json` with the
number of updates, the networks' configs and the size of every file, by which a truncated checkpoint is recognised.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from adversarial_flow.utils.errors import InputError


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
TEMPORARY_PREFIX = "tmp-checkpoint-"
RUN_FILES = ("model_index.json", "results.json", "metrics.jsonl", "samples.png", "curves.png", "README.md", "logs")
RUN_FILES += ("transformer", "discriminator", "scheduler", "vae")
# Config entries that do not describe the architecture.
IGNORED_CONFIG_KEYS = ("_name_or_path", "_class_name", "_diffusers_version", "_use_default_values")


def architecture(model: torch.nn.Module) -> dict:
    """The config entries of a diffusers model that decide which weights fit."""
    return {key: value for key, value in model.config.items() if key not in IGNORED_CONFIG_KEYS}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if p.is_dir()), key=lambda p: int(p.name.split("-")[1]))


def register_model_folders(accelerator: Accelerator, models: dict[str, torch.nn.Module], ema: EMAModel) -> None:
    """Makes `save_state` and `load_state` keep the networks in diffusers' format, in folders with the given names."""

    def save_models(_, weights: list, output_dir: str) -> None:
        if accelerator.is_main_process:
            for name, model in models.items():
                accelerator.unwrap_model(model).save_pretrained(os.path.join(output_dir, name))
            ema.save_pretrained(os.path.join(output_dir, "transformer_ema"))
        weights.clear()  # nothing is left for accelerate to save

    def load_models(unused_models: list, input_dir: str) -> None:
        for name, model in models.items():
            model = accelerator.unwrap_model(model)
            model.load_state_dict(type(model).from_pretrained(os.path.join(input_dir, name)).state_dict())
        loaded = EMAModel.from_pretrained(os.path.join(input_dir, "transformer_ema"), ema.model_cls)
        ema.load_state_dict(loaded.state_dict())
        ema.to(accelerator.device)
        unused_models.clear()

    accelerator.register_save_state_pre_hook(save_models)
    accelerator.register_load_state_pre_hook(load_models)


def save_checkpoint(
    accelerator: Accelerator, output_dir: str, step: int, state: dict, total_limit: int | None = None
) -> Path:
    """
    Writes `checkpoint-{step}` and then removes the oldest ones over `total_limit`. Called on all ranks.

    Args:
        state (`dict`): JSON values that [`find_checkpoint`] gives back; `"architecture"` is compared on resuming.

    Raises:
        InputError: on all ranks, if any rank could not write. What was there before is untouched.
    """
    temporary = Path(output_dir) / f"{TEMPORARY_PREFIX}{step}"
    final = Path(output_dir) / f"checkpoint-{step}"
    error = None
    if accelerator.is_main_process:
        # Makes room first, as diffusers' examples do, but never at the price of the last checkpoint.
        _rotate(output_dir, max(total_limit - 1, 1) if total_limit is not None else None)
        shutil.rmtree(temporary, ignore_errors=True)
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
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            _rotate(output_dir, total_limit)
        except OSError as exception:
            error = exception
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), reduction="sum")
    if failed != 0:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(output_dir)
        raise InputError(
            f"--output_dir {output_dir}: checkpoint {step} could not be written ({error or 'on another rank'}). Make "
            f"room on the disk and resume from {kept[-1].name if kept else 'the start: there is no checkpoint yet'}."
        )
    return final


def _rotate(output_dir: str | Path, keep: int | None) -> None:
    if keep is not None:
        for folder in list_checkpoints(output_dir)[: -keep or None]:
            logger.info(f"Removing {folder} (--checkpoints_total_limit).")
            shutil.rmtree(folder, ignore_errors=True)


def clear_run(output_dir: str | Path, keep_checkpoints: bool) -> None:
    """
    Removes what an earlier run left in `output_dir`: half-written checkpoints always, and unless `keep_checkpoints`
    its checkpoints, weights, pictures and logs. Files that no run writes stay.
    """
    folder = Path(output_dir)
    leftovers = list(folder.glob(f"{TEMPORARY_PREFIX}*"))
    if not keep_checkpoints:
        leftovers += list_checkpoints(folder) + [folder / name for name in RUN_FILES]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> dict:
    """
    The `trainer_state.json` of a checkpoint whose files are all there in full.

    Raises:
        InputError: naming the first file that is missing or truncated.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {STATE_FILE} can't be read ({error}).") from error
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"{folder}: {name} is missing or truncated.")
    return state


def find_checkpoint(resume_from: str, output_dir: str, expected_architecture: dict) -> tuple[Path, dict] | None:
    """
    The checkpoint to resume from and its state; `None` when `"latest"` is asked for and there is none yet.

    `"latest"` falls back to the newest checkpoint that is whole, and says so; a path must be whole.

    Raises:
        InputError: if a named checkpoint is missing or damaged, or belongs to another architecture.
    """
    if resume_from == "latest":
        found = None
        for folder in reversed(list_checkpoints(output_dir)):
            try:
                found = folder, read_checkpoint(folder)
                break
            except InputError as error:
                logger.warning(f"Skipping a damaged checkpoint: {error}")
        if found is None:
            return None
    else:
        folder = Path(resume_from)
        if not folder.is_dir() and (Path(output_dir) / folder).is_dir():
            folder = Path(output_dir) / folder
        if not folder.is_dir():
            raise InputError(f"--resume_from_checkpoint {resume_from}: there is no such folder.")
        found = folder, read_checkpoint(folder)
    folder, state = found
    for network, expected in expected_architecture.items():
        saved = state["architecture"].get(network, {})
        different = [key for key in {**saved, **expected} if saved.get(key) != expected.get(key)]
        if different:
            changes = ", ".join(f"{key} {saved.get(key)} -> {expected.get(key)}" for key in different[:5])
            raise InputError(
                f"--resume_from_checkpoint {folder}: its {network} has another architecture ({changes}). Pass the "
                "flags of that run, or another --output_dir."
            )
    return folder, state
