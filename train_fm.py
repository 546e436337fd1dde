#!/usr/bin/env python
# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Trains a flow-matching model: what continuous adversarial flow models start from, and the control to compare with.

Without flags it trains one on the digits that scikit-learn ships (see configs/recipes/).
"""

import argparse
import contextlib
from pathlib import Path

import torch

from adversarial_flow.utils.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    make_parser,
    on_digits,
    parse_with_recipe,
)
from adversarial_flow.utils.checkpointing import architecture, register_model_folders, save_checkpoint
from adversarial_flow.utils.errors import run_script
from adversarial_flow.utils.evaluation import SampleEvaluator
from adversarial_flow.utils.hub import push_to_hub
from adversarial_flow.utils.losses import flow_matching_loss
from adversarial_flow.utils.metrics import MetricsLog
from adversarial_flow.utils.networks import load_velocity_transformer, make_velocity_transformer
from adversarial_flow.utils.plan import training_plan
from adversarial_flow.utils.results import make_pipeline, print_next, validate, write_results
from adversarial_flow.utils.runs import (
    end_run,
    find_resume,
    load_data,
    load_run,
    make_ema,
    make_optimizer,
    progress_bar,
    set_rates,
    start_run,
)
from adversarial_flow.utils.training import InterruptGuard, NonFiniteGuard, accumulated_update
from adversarial_flow.utils.velocity import (
    VelocityBatches,
    add_velocity_arguments,
    check_velocity_arguments,
    predict_velocity,
)


DIGITS_RECIPE = Path(__file__).parent / "configs" / "recipes" / "fm_digits.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("network")
    group.add_argument("--model_config_name_or_path", type=str, help="Config of the transformer (configs/models/).")
    group.add_argument("--pretrained_model_name_or_path", type=str, help="Go on from this pipeline or model.")
    add_velocity_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=0.0)

    args = parse_with_recipe(parser, DIGITS_RECIPE, argv)
    check_arguments(args, name="fm")
    check_velocity_arguments(args)
    return args


def update(accelerator, transformer, optimizer, batches, args, guard, step):
    """One update on `gradient_accumulation_steps` fresh micro-batches. Returns its metrics, none if skipped."""

    def loss():
        batch = next(batches)
        value = flow_matching_loss(predict_velocity(transformer, batch), batch.velocity)
        return value, {"flow_matching_loss": value}

    return accumulated_update(accelerator, "generator", transformer, optimizer, loss, args, guard, step)


def train(args: argparse.Namespace) -> None:
    accelerator = start_run(args)
    data, vae, global_batch = load_data(args, accelerator)

    # Network
    if args.pretrained_model_name_or_path is not None:
        transformer = load_velocity_transformer(args, data, vae)
    else:
        with torch.device("meta") if args.dry_run else contextlib.nullcontext():
            transformer = make_velocity_transformer(args, data, vae)
    if accelerator.is_main_process:
        passes, updates = [[(transformer, args.train_batch_size)]], f"{args.max_train_steps:,}"
        networks = {"Transformer": transformer}
        print(training_plan(args, accelerator, len(data.dataset), networks, vae, passes, updates))
    if args.dry_run:
        return
    run_state = {
        "architecture": {"transformer": architecture(transformer)},
        "seed": args.seed,
        "global_batch": global_batch,
        "max_train_steps": args.max_train_steps,
    }
    resume = find_resume(args, accelerator, run_state["architecture"])
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile()
    transformer.train()  # a loaded network is in evaluation mode
    if vae is not None:
        vae.to(accelerator.device)

    # Optimiser, average, and what a checkpoint holds
    optimizer, scheduler = make_optimizer(args, transformer, args.learning_rate, args.max_train_steps)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    plain_transformer = accelerator.unwrap_model(transformer)
    ema = make_ema(args, plain_transformer)
    nonfinite = NonFiniteGuard(args.max_skipped_updates)
    accelerator.register_for_checkpointing(scheduler, nonfinite)
    register_model_folders(accelerator, {"transformer": plain_transformer}, ema)
    first_step = load_run(args, accelerator, resume, run_state)
    set_rates(args, optimizer, scheduler, args.learning_rate)

    batches = VelocityBatches(data.dataset, plain_transformer.config, args, accelerator, vae, first_step)
    evaluator = SampleEvaluator.for_data(args, data) if accelerator.is_main_process else None
    log = MetricsLog(accelerator, args.output_dir, first_step)
    log.start_trackers(args.tracker_project_name, vars(args))
    pipeline = make_pipeline(plain_transformer, vae, data, num_steps=None)

    interrupt = InterruptGuard(accelerator)
    progress = progress_bar(accelerator, first_step, args.max_train_steps, "Flow matching")
    step, saved_step = first_step, first_step if resume is not None else -1
    while step < args.max_train_steps and not interrupt.requested():
        metrics = update(accelerator, transformer, optimizer, batches, args, nonfinite, step)
        scheduler.step()
        if metrics:  # the update was made
            ema.step(plain_transformer.parameters())
        log.add(metrics, images=global_batch)
        step += 1
        progress.update()

        if step % args.logging_steps == 0 or step == args.max_train_steps:
            counts = {"skipped_updates": nonfinite.total, "broken_images": batches.broken.total(accelerator)}
            row = log.flush(step, learning_rate=scheduler.get_last_lr()[0], **counts)
            shown = {"loss": "flow_matching_loss", "samples/s": "samples_per_second"}
            progress.set_postfix({name: row.get(key) for name, key in shown.items()})
        if step % args.validation_steps == 0 and step < args.max_train_steps:
            validate(accelerator, pipeline, ema, evaluator, log, step, args.seed)
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, step, run_state, args.checkpoints_total_limit)
            saved_step = step
    progress.close()
    batches.close()

    # The end, also of an interrupted run
    end_run(args, accelerator, interrupt, ema, pipeline, None, run_state, step, saved_step)
    if accelerator.is_main_process:
        write_results("train_fm.py", args, pipeline, evaluator, log, step, nonfinite.total)
        if args.push_to_hub:
            push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)
        names = ("train_data_dir", "dataset_name", "resolution", "channels", "vae")
        data_flags = [f" --{name} {getattr(args, name)}" for name in names if getattr(args, name) is not None]
        more = f"accelerate launch train_cafm.py --pretrained_model_name_or_path {args.output_dir}"
        print_next(args, data, more + ("" if on_digits(args) else "".join(data_flags)))
    accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    train(parse_args(argv))


if __name__ == "__main__":
    run_script(main)
