# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The model card and the upload to the Hub."""

import json
import logging
import shlex
from pathlib import Path

from huggingface_hub import create_branch, create_repo, model_info, upload_folder

from adversarial_flow.utils.errors import InputError, first_line


logger = logging.getLogger(__name__)

UPLOADED = [  # and nothing else that may lie in the folder; a * also matches sub-folders
    "README.md",
    "model_index.json",
    "pipeline_*.py",
    "results.json",
    "metrics.jsonl",
    "samples.png",
    "curves.png",
    "comparison.png",
    "transformer/*",
    "discriminator/*",
    "scheduler/*",
    "vae/*",
]

AFM = "[arXiv 2511.22475](https://arxiv.org/abs/2511.22475)"
CAFM = "[arXiv 2604.11521](https://arxiv.org/abs/2604.11521)"
KINDS = {  # by script: what the model card says, and its tags
    "train_afm.py": (f"An adversarial flow model ({AFM})", ("adversarial-flow-models", "one-step")),
    "train_fm.py": ("A flow-matching model", ("flow-matching",)),
    "train_cafm.py": (f"A continuous adversarial flow model ({CAFM})", ("adversarial-flow-models", "flow-matching")),
}


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
{tags}
---

# {title}

{sentence}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{title}", trust_remote_code=True)
images = pipe({arguments}).images
```

`trust_remote_code=True` runs the two files of code that lie beside the weights (Apache License 2.0). Where the
`adversarial_flow` package is installed, `AdversarialFlowPipeline.from_pretrained("{title}")` uses its code instead.

{pictures}
"""


def make_card(folder: Path, title: str, pipeline, sentence: str, tags: tuple[str, ...]) -> str:
    """A model card: what the model is, how to use it, and its pictures."""
    pictures = [name for name in ("samples", "curves") if (folder / f"{name}.png").exists()]
    return CARD.format(
        title=title,
        sentence=sentence,
        tags="\n".join(f"- {tag}" for tag in tags),
        arguments="batch_size=4" if pipeline.transformer.config.num_classes is None else "class_labels=[0, 1]",
        pictures="\n\n".join(f"![{name}]({name}.png)" for name in pictures),
    )


def write_model_card(
    output_dir: str, title: str, script: str, command: str, pipeline, flags: dict, results: dict
) -> None:
    """Writes `README.md` of a training run: the card with the metrics, where they come from, and the recipe."""
    sentence, tags = KINDS[script]
    sentence += f", trained with `{script}` of the `adversarial_flow` package for {results['steps']} steps."
    metrics = "\n".join(
        f"| {name} | {value:.4g} |" for name, value in results.get("metrics", {}).items() if value is not None
    )
    recipe = {name: value for name, value in flags.items() if value is not None and not name.startswith("hub_")}
    recipe = json.dumps(recipe, indent=2, default=str)
    card = make_card(Path(output_dir), title, pipeline, sentence, (*tags, "diffusers-training"))
    if metrics:
        card += f"\n| metric | value |\n| --- | --- |\n{metrics}\n\n{results.get('note', '')}\n"
    card += f"\n## Recipe\n\n```bash\n{command}\n```\n\n```json\n{recipe}\n```\n"
    (Path(output_dir) / "README.md").write_text(card)


def upload_command(
    repo_id: str, output_dir: str, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """The command that uploads a final folder by hand; what the Hub has already is not sent again."""
    options = " --private" * private + " --create-pr" * create_pr
    options += f" --revision {shlex.quote(revision)}" if revision else ""
    include = " ".join(f"--include {shlex.quote(pattern)}" for pattern in UPLOADED)
    return f"hf upload {shlex.quote(repo_id)} {shlex.quote(str(output_dir))} . {include}{options}"


def upload(
    output_dir: str,
    repo_id: str,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "End of training",
) -> str:
    """
    Uploads a final folder without its checkpoints and logs, to a branch (`revision`) or as a pull request when asked.

    Returns:
        `str`: the address of the commit.

    Raises:
        InputError: on any failure, with the command that uploads the folder later.
    """
    try:
        repo_id = create_repo(repo_id, exist_ok=True, token=token, private=private or None).repo_id
        if private and not model_info(repo_id, token=token).private:
            raise InputError(
                f"--hub_private_repo: {repo_id} exists and is public, so that nothing was uploaded from {output_dir}. "
                "Make it private on the Hub or choose another name."
            )
        if revision is not None:
            create_branch(repo_id, branch=revision, exist_ok=True, token=token)
        return upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            token=token,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=UPLOADED,
            commit_message=message,
        )
    except InputError:
        raise
    except Exception as error:  # network, permission or server trouble: everything is on the disk
        reasons = [first_line(error)] + ([first_line(error.__cause__)] if error.__cause__ else [])
        reason = ": ".join(reasons)
        command = upload_command(repo_id, output_dir, private, revision, create_pr)
        raise InputError(
            f"The upload to {repo_id} failed ({reason}). Everything is in {output_dir}; upload it later with: "
            f"{command}"
        ) from error


def push_to_hub(output_dir: str, repo_id: str | None, token: str | None, private: bool) -> None:
    """Uploads what a training run left. A failure is logged; it never costs what was trained."""
    try:
        address = upload(output_dir, repo_id or Path(output_dir).resolve().name, token, private)
    except InputError as error:
        logger.error(str(error))
    else:
        logger.info(f"Uploaded to {address}.")
