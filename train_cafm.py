#!/usr/bin/env python
# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Post-trains a flow-matching model with a discriminator of its velocities (CAFM, arXiv 2604.11521).

Without flags it does so on the digits that scikit-learn ships (see configs/recipes/), from a model that it trains by
train_fm.py if there is none yet, and compares the result with as much continued flow matching.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from accelerate.logging import get_logger

import train_fm
from adversarial_flow import AdversarialFlowPipeline, DirectionalDerivative
from adversarial_flow.utils.arguments import (
    add_data_arguments,
    add_schedule_arguments,
    add_training_arguments,
    check_arguments,
    check_range,
    check_schedule,
    make_parser,
    on_digits,
    parse_with_recipe,
    prepare_output_dir,
)
from adversarial_flow.utils.cafm import Phases, discriminator_loss, generator_loss
from adversarial_flow.utils.checkpointing import architecture, register_model_folders, save_checkpoint
from adversarial_flow.utils.errors import InputError, run_script
from adversarial_flow.utils.evaluation import SampleEvaluator
from adversarial_flow.utils.hub import push_to_hub
from adversarial_flow.utils.metrics import MetricsLog
from adversarial_flow.utils.networks import load_velocity_transformer, make_discriminator
from adversarial_flow.utils.plan import training_plan
from adversarial_flow.utils.plots import plot_grids
from adversarial_flow.utils.results import make_pipeline, print_next, sample_grid, validate, write_results
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
from adversarial_flow.utils.schedules import scheduled_flag
from adversarial_flow.utils.training import (
    InterruptGuard,
    NonFiniteGuard,
    accumulated_update,
    frozen,
)
from adversarial_flow.utils.velocity import (
    VelocityBatches,
    add_velocity_arguments,
    check_velocity_arguments,
    predict_velocity,
)


logger = get_logger(__name__)

DIGITS_RECIPE = Path(__file__).parent / "configs" / "recipes" / "cafm_digits.json"
DIGITS_START = "fm-digits"  # what train_fm.py leaves without flags
DIGITS_DISCRIMINATOR_START = "fm-digits-wide"  # a wider model: a D with its weights sees the start's errors sooner


# ------------------------------------------------------------------------------------------------------------ flags


def warmup_type(value: str) -> int | None:
    """`"auto"` (as `None`) or a number of updates."""
    if value == "auto":
        return None
    if not value.isdigit():
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of updates: pass 0, 1, 2, ... or auto")
    return int(value)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--pretrained_model_name_or_path", type=str, help="The flow-matching model to post-train: a pipeline or model."
    )
    group.add_argument(
        "--discriminator_name_or_path",
        type=str,
        help="A flow-matching model, of any size, or a discriminator, to start D from; default: the starting model.",
    )
    group.add_argument(
        "--derivative",
        choices=("reverse", "forward", "finite"),
        default="reverse",
        help="How the directional derivative of D is computed: two exact modes and finite differences.",
    )

    group = parser.add_argument_group("objective")
    group.add_argument("--ttur", type=int, default=16, help="Discriminator updates for each generator update.")
    group.add_argument(
        "--discriminator_warmup_steps",
        type=warmup_type,
        default=10_000,
        help="Discriminator updates before the first generator update; auto: until it sees a signal.",
    )
    group.add_argument(
        "--discriminator_warmup_signal",
        type=float,
        default=0.1,
        help="Of auto: waits for s = 4 / loss - 2 >= this.",
    )
    group.add_argument("--lambda_cp", type=float, default=0.001, help="Centering of the discriminator's output.")
    add_schedule_arguments(group, "lambda_ot", 0.0, "Optimal transport, for training from scratch")
    group.add_argument("--discriminator_learning_rate", type=float, help="Default: --learning_rate.")
    group.add_argument(
        "--control_learning_rates",
        type=float,
        nargs="*",
        default=[],
        help="Afterwards continue flow matching from the same start for as many images, with each of these rates.",
    )
    add_velocity_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(learning_rate=1e-5, adam_beta1=0.0, adam_beta2=0.95, adam_weight_decay=0.0, ema_decay=0.99)

    args = parse_with_recipe(parser, DIGITS_RECIPE, argv)
    check_arguments(args, name="cafm")
    check_velocity_arguments(args)
    check_range(args, "ttur", lowest=1)
    for name in ("lambda_cp", "discriminator_learning_rate"):
        check_range(args, name)
    check_schedule(args, "lambda_ot")
    check_range(args, "discriminator_warmup_signal", open_ends=True)
    if (args.discriminator_warmup_steps or 0) >= args.max_train_steps:
        raise InputError(
            f"--discriminator_warmup_steps {args.discriminator_warmup_steps} is not shorter than --max_train_steps "
            f"{args.max_train_steps}, which counts the updates of both networks: the generator would not be trained."
        )
    if args.discriminator_learning_rate is None:
        args.discriminator_learning_rate = args.learning_rate
    if args.compile and (args.gradient_checkpointing or args.derivative != "reverse"):
        raise InputError("--compile works with --derivative reverse and without --gradient_checkpointing: drop one.")
    if args.derivative == "forward" and args.gradient_checkpointing:
        raise InputError("--derivative forward does not go with --gradient_checkpointing: use --derivative reverse.")
    if args.derivative == "finite" and args.mixed_precision == "bf16":
        raise InputError("--derivative finite divides by a small number, which bf16 rounds away: use reverse or fp32.")
    if args.control_learning_rates and args.feature_extractor is None and not on_digits(args):
        raise InputError("--control_learning_rates: the best one is chosen by a score, so pass --feature_extractor.")
    for rate in args.control_learning_rates:
        if not rate > 0:
            raise InputError(f"--control_learning_rates must be positive, not {rate}.")
    if args.pretrained_model_name_or_path is None and not on_digits(args):
        raise InputError("--pretrained_model_name_or_path: name the flow-matching model to post-train (train_fm.py).")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if args.control_learning_rates:
            raise InputError(
                "--control_learning_rates (also of the digits' recipe) needs a single process: pass the flag without "
                "values, and run train_fm.py for the control."
            )
        if args.pretrained_model_name_or_path is None:
            raise InputError("--pretrained_model_name_or_path: with several processes run train_fm.py first.")
    return args


def number_of_generator_updates(args: argparse.Namespace) -> int:
    """Of the whole run; with `auto`, of one whose warm-up took no time."""
    return max((args.max_train_steps - (args.discriminator_warmup_steps or 0)) // (args.ttur + 1), 1)


# ---------------------------------------------------------------------------------------------------------- updates


def discriminator_update(accelerator, transformer, derivative, optimizer, batches, args, guard, step):
    """One update of D on `gradient_accumulation_steps` fresh micro-batches. Returns its metrics, none if skipped."""

    def loss():
        batch = next(batches)
        with torch.no_grad():
            velocity = predict_velocity(transformer, batch)
        return discriminator_loss(derivative, batch, velocity, args.lambda_cp)

    return accumulated_update(accelerator, "discriminator", derivative, optimizer, loss, args, guard, step)


def generator_update(accelerator, transformer, derivative, optimizer, batches, args, weight_ot, guard, step):
    """One update of G on `gradient_accumulation_steps` fresh micro-batches. Returns its metrics, none if skipped."""

    def loss():
        batch = next(batches)
        velocity = predict_velocity(transformer, batch)
        with frozen(derivative), accelerator.no_sync(derivative):
            return generator_loss(derivative, batch, velocity, weight_ot)

    return accumulated_update(accelerator, "generator", transformer, optimizer, loss, args, guard, step)


# --------------------------------------------------------------------------------------------- networks and results


def train_starts(args: argparse.Namespace) -> None:
    """The flow-matching models of digits that G and D start from, by train_fm.py, unless an earlier run left them."""
    sizes = Path(__file__).parent / "configs" / "models" / "digits_flow_wide.json"
    flags = {DIGITS_START: [], DIGITS_DISCRIMINATOR_START: ["--model_config_name_or_path", str(sizes)]}
    args.pretrained_model_name_or_path = DIGITS_START
    if args.discriminator_name_or_path is not None:
        del flags[DIGITS_DISCRIMINATOR_START]
    else:
        args.discriminator_name_or_path = DIGITS_DISCRIMINATOR_START
    missing = [folder for folder in flags if not (Path(folder) / "results.json").exists()]  # a run's last file
    if args.dry_run and missing:
        raise InputError(f"--dry_run: {' and '.join(missing)} would be trained first; do that with train_fm.py.")
    for folder in missing:
        print(f"Training a flow-matching model of digits to start from. It stays in {folder}/ for the next time.")
        going_on = ["--resume_from_checkpoint", "latest"] if Path(folder).exists() else []
        precision = ["--mixed_precision", args.mixed_precision] if args.mixed_precision else []
        train_fm.main(["--output_dir", folder, "--report_to", args.report_to, *precision, *flags[folder], *going_on])


def plan(args, accelerator, transformer, discriminator, vae, data_size: int) -> str:
    batch, warmup = args.train_batch_size, args.discriminator_warmup_steps
    return training_plan(
        args,
        accelerator,
        data_size,
        {"Generator": transformer, "Discriminator": discriminator},
        vae,
        passes=[
            [(discriminator, 2 * batch)],
            [(transformer, batch), (discriminator, batch)],
        ],  # D: second order
        updates=f"{args.max_train_steps:,} of both networks",
        Phases=f"D alone for {'a time that its signal decides' if warmup is None else warmup}, then {args.ttur} of D "
        "for 1 of G",
        Rates=f"G {args.learning_rate:.3g}, D {args.discriminator_learning_rate:.3g}",
    )


def compare(args, data, vae, pipeline, evaluator: SampleEvaluator, step: int) -> None:
    """
    The table that the method is judged by, with pictures: the starting model, the post-trained one, and the control,
    which got as many images of flow matching from the same start, with the best of `--control_learning_rates`.
    """
    folder = Path(args.output_dir)
    best = None
    models = {"start": make_pipeline(load_velocity_transformer(args, data, vae), vae, data, None), "CAFM": pipeline}
    scores = {}
    for rate in args.control_learning_rates:
        control = argparse.Namespace(**vars(args))
        control.output_dir, control.learning_rate = str(folder / "control" / f"{rate:g}"), rate
        control.adam_beta1, control.adam_beta2, control.ema_decay, control.lr_scheduler = 0.9, 0.999, 0.999, "cosine"
        control.max_train_steps, control.validation_steps, control.checkpointing_steps = step, step, step
        control.overwrite_output_dir, control.resume_from_checkpoint, control.push_to_hub = True, None, False
        control.report_to = "none"
        try:
            train_fm.train(control)
        except InputError as error:  # a rate that diverges is a result too
            logger.warning(f"The control with the learning rate {rate:g} failed: {error}")
            scores[rate] = None
            continue
        candidate = AdversarialFlowPipeline.from_pretrained(control.output_dir)
        candidate.set_progress_bar_config(disable=True)
        score = evaluator.quick(candidate)["frechet_distance"]  # chosen on other noise than the table's
        if all(other is None or score <= other for other in scores.values()):
            models["control"], best = candidate, rate
        scores[rate] = score
    rows = {name: evaluator.final(model) for name, model in models.items()}
    images = step * args.train_batch_size * args.gradient_accumulation_steps
    table = {name: row["metrics"] for name, row in rows.items()}
    result = {"images": images, "table": table, "control_distances_by_learning_rate": scores, **rows["CAFM"]}
    del result["metrics"]
    (folder / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    grids = {name: sample_grid(model, args.seed) for name, model in models.items()}
    plot_grids(grids, folder / "comparison.png")
    print(f"\n{'':36} {'class accuracy':>14} {'Frechet distance':>17} {'ratio to halves':>16}")
    names = {"start": "starting model", "CAFM": f"CAFM, {images:,} images"}
    names["control"] = f"flow matching, as many, rate {best:g}" if "control" in models else ""
    for name, row in table.items():
        values = (row[key] for key in ("class_accuracy", "frechet_distance", "ratio"))
        print("{:36} {:14.4f} {:17.2f} {:16.2f}".format(names[name], *values))
    print(f"(comparison.json and comparison.png in {folder}/; 50 Euler steps, no guidance. {evaluator.NOTE})")


# ------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        prepare_output_dir(args)  # before hours, not after
        train_starts(args)
    accelerator = start_run(args)
    data, vae, global_batch = load_data(args, accelerator)

    # Networks
    transformer = load_velocity_transformer(args, data, vae)
    discriminator = make_discriminator(args.discriminator_name_or_path, transformer)
    try:
        derivative = DirectionalDerivative(discriminator, args.derivative, compile=args.compile)
    except ValueError as error:
        raise InputError(f"--derivative {args.derivative}: {error}") from error
    if accelerator.is_main_process:
        print(plan(args, accelerator, transformer, discriminator, vae, len(data.dataset)))
    if args.dry_run:
        return
    run_state = {
        "architecture": {"transformer": architecture(transformer), "discriminator": architecture(discriminator)},
        "ttur": args.ttur,
        "seed": args.seed,
        "global_batch": global_batch,
        "max_train_steps": args.max_train_steps,
    }
    resume = find_resume(args, accelerator, run_state["architecture"])
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        discriminator.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile()
    transformer.train()  # loaded networks are in evaluation mode
    discriminator.train()
    if vae is not None:
        vae.to(accelerator.device)

    # Optimisers, average, and what a checkpoint holds
    phases = Phases(args.discriminator_warmup_steps, args.ttur, args.discriminator_warmup_signal)
    updates_g = number_of_generator_updates(args)
    optimizer_g, scheduler_g = make_optimizer(args, transformer, args.learning_rate, updates_g)
    rate_d = args.discriminator_learning_rate
    optimizer_d, scheduler_d = make_optimizer(args, derivative, rate_d, args.max_train_steps - updates_g)
    transformer, derivative, optimizer_g, optimizer_d = accelerator.prepare(
        transformer, derivative, optimizer_g, optimizer_d
    )
    plain_transformer = accelerator.unwrap_model(transformer)
    ema = make_ema(args, plain_transformer)
    nonfinite = NonFiniteGuard(args.max_skipped_updates)
    accelerator.register_for_checkpointing(scheduler_g, scheduler_d, phases, nonfinite)
    register_model_folders(accelerator, {"transformer": plain_transformer, "discriminator": discriminator}, ema)
    first_step = load_run(args, accelerator, resume, run_state)
    set_rates(args, optimizer_g, scheduler_g, args.learning_rate)
    set_rates(args, optimizer_d, scheduler_d, rate_d)

    batches = VelocityBatches(data.dataset, plain_transformer.config, args, accelerator, vae, first_step)
    evaluator = SampleEvaluator.for_data(args, data) if accelerator.is_main_process else None
    log = MetricsLog(accelerator, args.output_dir, first_step)
    log.start_trackers(args.tracker_project_name, vars(args))
    pipeline = make_pipeline(plain_transformer, vae, data, num_steps=None)

    # Training: D alone until the warm-up ends, then one update of G for `ttur` of D, each on a fresh batch
    interrupt = InterruptGuard(accelerator)
    progress = progress_bar(accelerator, first_step, args.max_train_steps, "Updates")
    step, saved_step = first_step, first_step if resume is not None else -1
    while step < args.max_train_steps and not interrupt.requested():
        if phases.generator_is_next():
            weight_ot = scheduled_flag(args, "lambda_ot", phases.generator_updates, updates_g)
            metrics = generator_update(
                accelerator, transformer, derivative, optimizer_g, batches, args, weight_ot, nonfinite, step
            )
            scheduler_g.step()
            phases.after_generator()
            if metrics:  # the update was made
                ema.step(plain_transformer.parameters())
        else:
            metrics = discriminator_update(
                accelerator, transformer, derivative, optimizer_d, batches, args, nonfinite, step
            )
            scheduler_d.step()
            phases.after_discriminator(metrics.get("discriminator_loss"))
        log.add(metrics, images=global_batch)
        step += 1
        progress.update()

        if step % args.logging_steps == 0 or step == args.max_train_steps:
            row = log.flush(
                step,
                learning_rate=scheduler_g.get_last_lr()[0],
                discriminator_learning_rate=scheduler_d.get_last_lr()[0],
                visible_signal=phases.visible_signal,
                generator_updates=phases.generator_updates,
                skipped_updates=nonfinite.total,
                broken_images=batches.broken.total(accelerator),
            )
            shown = {"D": "discriminator_loss", "s": "visible_signal", "G": "generator_loss"}
            shown |= {"G updates": "generator_updates", "samples/s": "samples_per_second"}
            progress.set_postfix({name: row[key] for name, key in shown.items() if key in row})
        if step % args.validation_steps == 0 and step < args.max_train_steps and phases.generator_updates > 0:
            validate(accelerator, pipeline, ema, evaluator, log, step, args.seed)
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, step, run_state, args.checkpoints_total_limit)
            saved_step = step
    progress.close()
    batches.close()

    # The end, also of an interrupted run
    end_run(args, accelerator, interrupt, ema, pipeline, discriminator, run_state, step, saved_step)
    if phases.generator_updates == 0:
        logger.warning("The generator was never updated: the discriminator's warm-up lasted for the whole run.")
    if accelerator.is_main_process:
        write_results("train_cafm.py", args, pipeline, evaluator, log, step, nonfinite.total)
        if args.push_to_hub:
            push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)
        if evaluator is not None:
            compare(args, data, vae, pipeline, evaluator, step)
        print_next(args, data, "accelerate launch train_cafm.py --help    # post-train your own model")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
