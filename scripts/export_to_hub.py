#!/usr/bin/env python
# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Makes a self-contained copy of a pipeline's folder, and uploads it when asked.

    python scripts/export_to_hub.py afm-digits afm-digits-export --push_to_hub YOUR_NAME/afm-digits

The copy has the weights, the two files of code, a model card and samples, and no checkpoints. It loads without this
package by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

import argparse
import re
import shutil
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from adversarial_flow import AdversarialFlowPipeline
from adversarial_flow.utils.checkpointing import appearing_at_once
from adversarial_flow.utils.errors import InputError, first_line, run_script
from adversarial_flow.utils.hub import make_card, upload
from adversarial_flow.utils.results import sample_grid


COPIED = ("README.md", "results.json", "metrics.jsonl", "samples.png", "curves.png", "discriminator")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline_dir", type=Path, help="What a training script or convert_checkpoint.py left.")
    parser.add_argument("output_dir", type=Path, help="A new folder.")
    parser.add_argument("--push_to_hub", metavar="NAME", help="Upload the folder to this repository.")
    parser.add_argument("--hub_token", help="Default: the token of `hf auth login`.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Create a private repository.")
    parser.add_argument("--hub_revision", help="Upload to this branch, which is created if it is not there.")
    parser.add_argument("--hub_create_pr", action="store_true", help="Open a pull request.")
    args = parser.parse_args(argv)
    if not (args.pipeline_dir / AdversarialFlowPipeline.config_name).is_file():
        raise InputError(f"{args.pipeline_dir}: this is no pipeline's folder (there is no model_index.json).")
    if args.push_to_hub is not None:
        try:
            validate_repo_id(args.push_to_hub)
            if "/" not in args.push_to_hub:
                raise HFValidationError("it has no namespace")
        except HFValidationError as error:
            raise InputError(f"--push_to_hub {args.push_to_hub}: this is no NAMESPACE/NAME.") from error
    if args.hub_revision is not None and args.hub_create_pr:
        raise InputError(
            "--hub_revision and --hub_create_pr exclude each other: a pull request has a branch of its own."
        )
    if args.output_dir.exists():
        raise InputError(f"{args.output_dir} exists: choose another folder, or remove it.")
    return args


def load_pipeline(folder: Path) -> AdversarialFlowPipeline:
    try:
        pipeline = AdversarialFlowPipeline.from_pretrained(folder)
    except Exception as error:  # a VAE that is only referred to may need the network
        raise InputError(f"{folder}: the pipeline can't be loaded ({first_line(error)}).") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(pipeline: AdversarialFlowPipeline, source: Path, target: Path, title: str) -> None:
    """Writes the self-contained folder."""
    pipeline.save_pretrained(target)
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if not (target / "samples.png").exists():
        sample_grid(pipeline, seed=0).save(target / "samples.png")
    card = target / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8", errors="replace")
        old = re.search(r"^# (.+)$", text, re.MULTILINE)
        if old is not None:  # the name under which it was trained
            text = text.replace(f'from_pretrained("{old[1]}"', f'from_pretrained("{title}"')
            text = text.replace(f"# {old[1]}\n", f"# {title}\n", 1)
    else:
        text = make_card(target, title, pipeline, "An adversarial flow model.", ("adversarial-flow-models",))
    card.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pipeline = load_pipeline(args.pipeline_dir)
    with appearing_at_once(args.output_dir) as partial:
        export(pipeline, args.pipeline_dir, partial, args.push_to_hub or args.output_dir.name)
    folder = str(args.output_dir)
    print(f"{folder} loads by DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True).")
    if args.push_to_hub:
        token, private, message = args.hub_token, args.hub_private_repo, "Upload of an exported pipeline"
        address = upload(
            str(args.output_dir), args.push_to_hub, token, private, args.hub_revision, args.hub_create_pr, message
        )
        print(f"Uploaded to {address}.")


if __name__ == "__main__":
    run_script(main)
