# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves for people: grids while it goes on; weights, pictures, `results.json`, model card at the end."""

import hashlib
import json
import logging
import shlex
import sys
from pathlib import Path

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMapEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image

from adversarial_flow.pipelines import AdversarialFlowPipeline
from adversarial_flow.utils.data import TrainingData
from adversarial_flow.utils.errors import InputError
from adversarial_flow.utils.evaluation import SampleEvaluator, sample_images
from adversarial_flow.utils.hub import upload_command, write_model_card
from adversarial_flow.utils.metrics import MetricsLog, read_metrics
from adversarial_flow.utils.plots import image_grid, plot_curves


logger = logging.getLogger(__name__)


def make_pipeline(
    transformer: torch.nn.Module, vae: AutoencoderKL | None, data: TrainingData, num_steps: int | None
) -> AdversarialFlowPipeline:
    """The pipeline that a run samples and saves; `num_steps` is `None` for any number and for velocities of a flow."""
    pipeline = AdversarialFlowPipeline(
        transformer=transformer,
        scheduler=FlowMapEulerDiscreteScheduler(),
        vae=vae,
        id2label={str(index): name for index, name in data.id2label.items()},
        num_steps=num_steps,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def grid_labels(num_classes: int | None) -> list[int] | None:
    """Up to 10 classes spread over all of them, ten times each; `None` for an unconditional model."""
    if num_classes is None:
        return None
    rows = min(num_classes, 10)
    return [i * num_classes // rows for i in range(rows) for _ in range(10)]


def sample_grid(pipeline: DiffusionPipeline, seed: int) -> Image.Image:
    """A grid with a class in each row and a seed in each column; 8 x 8 samples of an unconditional model."""
    labels = grid_labels(pipeline.transformer.config.num_classes)
    if labels is None:
        return image_grid(sample_images(pipeline, None, 64, seed), columns=8)
    return image_grid(sample_images(pipeline, labels, len(labels), seed), columns=10)


def validate(
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    ema: EMAModel,
    evaluator: SampleEvaluator | None,
    log: MetricsLog,
    step: int,
    seed: int,
) -> None:
    """A grid of samples of the averaged weights for the trackers, and their metrics where there is an evaluator."""
    if accelerator.is_main_process:
        parameters = list(pipeline.transformer.parameters())
        ema.store(parameters)
        ema.copy_to(parameters)
        pipeline.transformer.eval()
        try:
            log.images(step, "samples", [sample_grid(pipeline, seed)])
            if evaluator is not None:
                log.write(step, evaluator.quick(pipeline))
        except Exception as error:  # an evaluation never costs a run
            logger.error(f"The validation at step {step} failed: {error!r}")
        finally:
            ema.restore(parameters)
            pipeline.transformer.train()


def save_final(output_dir: str, pipeline: DiffusionPipeline, discriminator: torch.nn.Module | None) -> None:
    """The pipeline with the averaged weights, and the discriminator, if there is one, for who wants to train on."""
    try:
        pipeline.save_pretrained(output_dir)
        if discriminator is not None:
            discriminator.save_pretrained(str(Path(output_dir) / "discriminator"))
    except Exception as error:  # a full disk surfaces as OSError, RuntimeError or SafetensorError
        raise InputError(
            f"--output_dir {output_dir}: the final weights could not be written ({error}). Make room on the disk and "
            "run again with --resume_from_checkpoint latest."
        ) from error


def without_token(arguments: list[str]) -> list[str]:
    """The command line without `--hub_token` and its value: the model card is public."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--hub_token"):
            kept.append(argument)
        skip = argument == "--hub_token"
    return kept


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None  # large models are sharded


def print_next(args, data: TrainingData, more: str) -> None:
    """Says what a finished run has left and what to run next."""
    label = "class_labels=0" if data.id2label else ""
    print(
        f"\nDone: {args.output_dir}/ holds the pipeline, samples.png, curves.png and results.json.\n"
        "What to run next:\n"
        f'  python -c "from adversarial_flow import AdversarialFlowPipeline as P; '
        f"P.from_pretrained('{args.output_dir}')({label}).images[0].save('sample.png')\"\n"
        f"  {more}\n"
        f"  {upload_command('YOUR_NAME/' + Path(args.output_dir).name, args.output_dir)}"
    )


def write_results(
    script: str,
    args,
    pipeline: DiffusionPipeline,
    evaluator: SampleEvaluator | None,
    log: MetricsLog,
    step: int,
    skipped: int,
) -> None:
    """
    Writes samples, curves, `results.json` and the model card. A failure here is reported and costs nothing: the
    weights are saved before.
    """
    try:
        folder = Path(args.output_dir)
        sample_grid(pipeline, args.seed).save(folder / "samples.png")
        results = {
            "steps": step,
            "sampler": type(pipeline.scheduler).__name__,
            "num_inference_steps": pipeline.default_num_inference_steps,
            "guidance_scale": None,
            "weights": f"EMA {args.ema_decay}",
            "weights_sha256": _sha256(folder / "transformer" / SAFETENSORS_WEIGHTS_NAME),
            "training_seed": args.seed,
            "skipped_updates": skipped,
            "versions": {m.__name__: m.__version__ for m in (torch, accelerate, diffusers)},
        }
        if evaluator is not None:
            results.update(evaluator.final(pipeline))
            log.write(step, evaluator.quick(pipeline))  # the end of the curve, on the noise of the curve
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        references = evaluator.references if evaluator is not None else None
        plot_curves(read_metrics(log.path), folder / "curves.png", references)
        called = sys.argv if Path(sys.argv[0]).name == script else [script]  # or by another script
        write_model_card(
            args.output_dir,
            title=args.hub_model_id or folder.resolve().name,
            script=script,
            command=f"accelerate launch {script} {shlex.join(without_token(called[1:]))}".strip(),
            pipeline=pipeline,
            flags=vars(args),
            results=results,
        )
    except Exception as error:
        logger.error(f"The weights are saved, but samples, metrics or the model card failed: {error!r}")
