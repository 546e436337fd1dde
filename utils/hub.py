# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The model card and the upload to the Hub."""

import json
import logging
from pathlib import Path

from huggingface_hub import create_repo, upload_folder


logger = logging.getLogger(__name__)

UPLOADED = [
    "README.md",
    "model_index.json",
    "results.json",
    "metrics.jsonl",
    "*.png",
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


def write_model_card(
    output_dir: str, title: str, script: str, command: str, pipeline, flags: dict, results: dict
) -> None:
    """Writes `README.md`: what the model is, how to use it, its samples, its curves, and the recipe that made it."""
    arguments = "batch_size=4" if pipeline.transformer.config.num_classes is None else "class_labels=[0, 1]"
    sentence, tags = KINDS[script]
    tags = "\n".join(f"- {tag}" for tag in (*tags, "diffusers-training"))
    usage = (
        f"from adversarial_flow import {type(pipeline).__name__}\n\n"
        f'pipe = {type(pipeline).__name__}.from_pretrained("{title}")\n'
        f"images = pipe({arguments}).images"
    )
    metrics = "\n".join(
        f"| {name} | {value:.4g} |" for name, value in results.get("metrics", {}).items() if value is not None
    )
    pictures = "\n\n".join(
        f"![{name}]({name}.png)" for name in ("samples", "curves") if (Path(output_dir) / f"{name}.png").exists()
    )
    recipe = {name: value for name, value in flags.items() if value is not None and not name.startswith("hub_")}
    card = f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
{tags}
---

# {title}

{sentence}, trained with `{script}` of the `adversarial_flow` package for {results["steps"]} steps.

```python
{usage}
```

{pictures}

| metric | value |
| --- | --- |
{metrics}

{results.get("note", "")}

## Recipe

```bash
{command}
```

```json
{json.dumps(recipe, indent=2, default=str)}
```
"""
    (Path(output_dir) / "README.md").write_text(card)


def upload_command(repo_id: str, output_dir: str) -> str:
    """The command that uploads a final folder by hand."""
    return f"hf upload {repo_id} {output_dir} . --exclude 'checkpoint-*' --exclude 'logs/*'"


def push_to_hub(output_dir: str, repo_id: str | None, token: str | None, private: bool) -> None:
    """
    Uploads the final folder without its checkpoints and logs. A failure is logged with the command that uploads
    later; it never costs what was trained.
    """
    repo_id = repo_id or Path(output_dir).resolve().name
    try:
        repo_id = create_repo(repo_id, exist_ok=True, token=token, private=private).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            token=token,
            allow_patterns=UPLOADED,
            commit_message="End of training",
        )
    except Exception as error:  # network, permission or server trouble: the weights are on the disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.error(
            f"The upload failed ({reason}). Everything is in {output_dir}; upload it later with: "
            f"{upload_command(repo_id, output_dir)}"
        )
    else:
        logger.info(f"Uploaded to {repo_id}.")
