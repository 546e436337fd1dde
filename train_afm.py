#!/usr/bin/env python
# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Trains an adversarial flow model (arXiv 2511.22475): a generator of one, few or any number of steps.

Without flags it trains a one-step generator on the digits that scikit-learn ships (see configs/recipes/).
"""

import argparse
from pathlib import Path

import torch
from accelerate.logging import get_logger

from adversarial_flow.utils.afm import FlowBatches, adversarial_gradient, discriminator_loss, generate
from adversarial_flow.utils.arguments import (
    add_data_arguments,
    add_schedule_arguments,
    add_training_arguments,
    check_arguments,
    check_range,
    check_schedule,
    make_parser,
    parse_with_recipe,
)
from adversarial_flow.utils.checkpointing import architecture, register_model_folders, save_checkpoint
from adversarial_flow.utils.errors import InputError, run_script
from adversarial_flow.utils.evaluation import SampleEvaluator
from adversarial_flow.utils.gradient_normalization import GradientNormalization, gradient_square
from adversarial_flow.utils.hub import push_to_hub
from adversarial_flow.utils.losses import optimal_transport_loss
from adversarial_flow.utils.metrics import MetricsLog
from adversarial_flow.utils.networks import make_networks, network_configs
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
from adversarial_flow.utils.schedules import scheduled_flag
from adversarial_flow.utils.training import (
    InterruptGuard,
    NonFiniteGuard,
    accumulated_update,
    apply_update,
    frozen,
    mean_over_global_batch,
    synchronised,
)


logger = get_logger(__name__)

DIGITS_RECIPE = Path(__file__).parent / "configs" / "recipes" / "afm_digits.json"


# ------------------------------------------------------------------------------------------------------------ flags


def num_steps_type(value: str) -> int | None:
    """`"any"` (as `None`) or a positive integer."""
    if value == "any":
        return None
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of steps: pass 1, 2, 3, ... or any")
    return int(value)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("networks")
    group.add_argument("--model_config_name_or_path", type=str, help="Config of the transformer (configs/models/).")
    group.add_argument("--discriminator_config_name_or_path", type=str, help="Default: the transformer's sizes.")
    group.add_argument("--num_steps", type=num_steps_type, default=1, help="Steps of the generator: 1, 2, ... or any.")
    group.add_argument("--prediction_type", choices=("sample", "velocity"), help="Default: sample for one step.")
    group.add_argument("--repeats", type=int, default=1, help="Apply the blocks R times (deep models, one step).")

    group = parser.add_argument_group("objective (names of the paper)")
    group.add_argument("--ttur", type=int, default=1, help="Discriminator updates for each generator update.")
    weights = (("lambda_ot", 0.2, "Optimal transport"), ("lambda_gp", 0.25, "R1 and R2 penalties"))
    for name, default, what in (*weights, ("augmentation_probability", 0.0, "Discriminator augmentation")):
        add_schedule_arguments(group, name, default, what)
    group.add_argument("--lambda_cp", type=float, default=0.01, help="Logit centering.")
    group.add_argument("--gp_epsilon", type=float, default=0.01, help="Size of the penalties' perturbation.")
    group.add_argument("--gp_batch_ratio", type=float, default=0.25, help="Share of the batch that is penalised.")
    group.add_argument(
        "--discriminator_learning_rate", type=float, help="Default: --learning_rate, which --repeats does not divide."
    )
    add_data_arguments(parser)
    add_training_arguments(parser)

    args = parse_with_recipe(parser, DIGITS_RECIPE, argv)
    check_arguments(args, name="afm")
    for name in ("ttur", "repeats"):
        check_range(args, name, lowest=1)
    for name in ("lambda_ot", "lambda_gp"):
        check_schedule(args, name)
    check_schedule(args, "augmentation_probability", highest=1)
    for name in ("lambda_cp", "discriminator_learning_rate"):
        check_range(args, name)
    check_range(args, "gp_epsilon", open_ends=True)
    if not 0 < args.gp_batch_ratio <= 1:
        raise InputError(f"--gp_batch_ratio must be in (0, 1], not {args.gp_batch_ratio}.")
    if args.repeats > 1 and args.num_steps != 1:
        raise InputError("--repeats makes deep one-step models: it needs --num_steps 1.")
    if args.prediction_type is None:
        args.prediction_type = "sample" if args.num_steps == 1 else "velocity"
    if args.discriminator_learning_rate is None:
        args.discriminator_learning_rate = args.learning_rate
    return args


def objective_weights(args: argparse.Namespace, step: int) -> dict[str, float]:
    """The scheduled weights at a generator update."""
    names = ("lambda_ot", "lambda_gp", "augmentation_probability")
    return {name: scheduled_flag(args, name, step, args.max_train_steps) for name in names}


# ---------------------------------------------------------------------------------------------------------- updates


def discriminator_update(accelerator, transformer, discriminator, optimizer, batches, args, weights, guard, step):
    """One update of D on `gradient_accumulation_steps` fresh micro-batches. Returns its metrics, none if skipped."""

    def loss():
        batch = next(batches)
        with torch.no_grad():
            fake = generate(transformer, batch, args.prediction_type)
        return discriminator_loss(
            discriminator,
            batch,
            fake,
            weights["lambda_gp"],
            args.lambda_cp,
            args.gp_epsilon,
            weights["augmentation_probability"],
        )

    return accumulated_update(accelerator, "discriminator", discriminator, optimizer, loss, args, guard, step)


def generator_update(
    accelerator, transformer, discriminator, optimizer, batches, normalization, args, weights, guard, step
):
    """
    One update of G on `gradient_accumulation_steps` fresh micro-batches. Returns its metrics, none if skipped.

    The adversarial gradient at G's output comes first, for all micro-batches, because its normalisation needs them
    all; then it enters G's backward together with the optimal-transport loss.
    """
    accumulation = args.gradient_accumulation_steps
    micro_batches = [next(batches) for _ in range(accumulation)]
    gradients, rows = [], []
    for batch in micro_batches:
        with torch.set_grad_enabled(accumulation == 1):  # with several micro-batches G runs again below
            fake = generate(transformer, batch, args.prediction_type)
        with frozen(discriminator), accelerator.no_sync(discriminator):
            gradient, loss = adversarial_gradient(discriminator, batch, fake, weights["augmentation_probability"])
        gradients.append(gradient)
        rows.append({"generator_loss": loss, "adversarial_grad_square": gradient_square(gradient)})
    metrics = mean_over_global_batch(accelerator, rows)
    square = metrics.pop("adversarial_grad_square")
    if not torch.isfinite(square):  # it must not enter the average of the normalisation
        guard.skips("generator", step, square)
        return {}
    scale = normalization.update(square)

    rows = []
    for micro_step, (batch, gradient) in enumerate(zip(micro_batches, gradients)):
        with synchronised(accelerator, transformer, last=micro_step == accumulation - 1):
            if accumulation > 1:
                fake = generate(transformer, batch, args.prediction_type)
            transport_loss = optimal_transport_loss(fake, batch.source, batch.weight)
            (transport_gradient,) = torch.autograd.grad(transport_loss, fake, retain_graph=True)
            # The gradient of <fake, constant> is the constant: the normalised adversarial gradient.
            adversarial = (fake * (gradient * scale)).sum()
            accelerator.backward((adversarial + weights["lambda_ot"] * transport_loss) / accumulation)
        square_ot = weights["lambda_ot"] ** 2 * gradient_square(transport_gradient)
        rows.append({"optimal_transport_loss": transport_loss, "optimal_transport_grad_square": square_ot})
    metrics |= mean_over_global_batch(accelerator, rows)
    # Both norms at G's output in the same unit; the normalised adversarial one fluctuates around 1.
    metrics["adversarial_grad_norm_raw"] = square.sqrt()
    metrics["adversarial_grad_norm"] = square.sqrt() * scale
    metrics["optimal_transport_grad_norm"] = metrics.pop("optimal_transport_grad_square").sqrt()
    return apply_update(accelerator, "generator", transformer, optimizer, metrics, args, guard, step)


# ------------------------------------------------------------------------------------------------- plan and results


def plan(args, accelerator, transformer, discriminator, vae, data_size: int) -> str:
    batch = args.train_batch_size
    steps = "any number of" if args.num_steps is None else args.num_steps
    epochs = args.max_train_steps * batch * args.gradient_accumulation_steps * accelerator.num_processes / data_size
    lines = {
        "Generation": f"{steps} step(s), predicts the {args.prediction_type}",
        "Epochs": f"{epochs:.1f}, counted by images that G sees",
        "Learning rates": f"G {args.learning_rate / args.repeats:.3g}, D {args.discriminator_learning_rate:.3g}",
    }
    return training_plan(
        args,
        accelerator,
        data_size,
        {"Generator": transformer, "Discriminator": discriminator},
        vae,
        passes=[
            [(discriminator, (2 + 2 * args.gp_batch_ratio) * batch)],
            [(transformer, batch), (discriminator, batch)],
        ],
        updates=f"{args.max_train_steps:,} of G, {args.ttur} of D for each",
        **lines,
    )


# ------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = start_run(args)
    data, vae, global_batch = load_data(args, accelerator)

    # Networks
    configs = network_configs(args, data, vae)
    with torch.device("meta"):
        sizes = make_networks(configs)
    if accelerator.is_main_process:
        print(plan(args, accelerator, *sizes, vae, len(data.dataset)))
    if accelerator.mixed_precision == "bf16" and not all(config.get("qk_norm") for config in configs):
        logger.warning("bf16 without qk_norm in both networks' configs is known to be unstable.")
    if args.dry_run:
        return
    run_state = {
        "architecture": {"transformer": architecture(sizes[0]), "discriminator": architecture(sizes[1])}
        | {"pipeline": {"num_steps": args.num_steps}},
        "updates_per_step": args.ttur + 1,
        "seed": args.seed,
        "global_batch": global_batch,
        "max_train_steps": args.max_train_steps,
    }
    resume = find_resume(args, accelerator, run_state["architecture"])
    transformer, discriminator = make_networks(configs)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        discriminator.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile()
    if vae is not None:
        vae.to(accelerator.device)

    # Optimisers, average, and what a checkpoint holds
    rate_g, rate_d = args.learning_rate / args.repeats, args.discriminator_learning_rate
    optimizer_g, scheduler_g = make_optimizer(args, transformer, rate_g, args.max_train_steps)
    optimizer_d, scheduler_d = make_optimizer(args, discriminator, rate_d, args.max_train_steps * args.ttur)
    transformer, discriminator, optimizer_g, optimizer_d = accelerator.prepare(
        transformer, discriminator, optimizer_g, optimizer_d
    )
    plain_transformer, plain_discriminator = map(accelerator.unwrap_model, (transformer, discriminator))
    ema = make_ema(args, plain_transformer)
    normalization = GradientNormalization()
    nonfinite = NonFiniteGuard(args.max_skipped_updates)
    accelerator.register_for_checkpointing(scheduler_g, scheduler_d, normalization, nonfinite)
    register_model_folders(accelerator, {"transformer": plain_transformer, "discriminator": plain_discriminator}, ema)
    first_step = load_run(args, accelerator, resume, run_state)
    set_rates(args, optimizer_g, scheduler_g, rate_g)
    set_rates(args, optimizer_d, scheduler_d, rate_d)

    batches = FlowBatches(
        data.dataset, plain_transformer.config, args, accelerator, vae, first_update=first_step * (args.ttur + 1)
    )
    evaluator = SampleEvaluator.for_data(args, data) if accelerator.is_main_process else None
    log = MetricsLog(accelerator, args.output_dir, first_step)
    log.start_trackers(args.tracker_project_name, vars(args))
    pipeline = make_pipeline(plain_transformer, vae, data, args.num_steps)

    # Training: `ttur` updates of D, then one of G, each on fresh batches
    interrupt = InterruptGuard(accelerator)
    progress = progress_bar(accelerator, first_step, args.max_train_steps, "Steps")
    step, saved_step = first_step, first_step if resume is not None else -1
    while step < args.max_train_steps and not interrupt.requested():
        weights = objective_weights(args, step)
        for _ in range(args.ttur):
            metrics = discriminator_update(
                accelerator, transformer, discriminator, optimizer_d, batches, args, weights, nonfinite, step
            )
            scheduler_d.step()
            log.add(metrics, images=global_batch)
        metrics = generator_update(
            accelerator,
            transformer,
            discriminator,
            optimizer_g,
            batches,
            normalization,
            args,
            weights,
            nonfinite,
            step,
        )
        scheduler_g.step()
        if metrics:  # the update was made
            ema.step(plain_transformer.parameters())
        log.add(metrics, images=global_batch)
        step += 1
        progress.update()

        if step % args.logging_steps == 0 or step == args.max_train_steps:
            rates = {"learning_rate": scheduler_g.get_last_lr()[0]}
            rates["discriminator_learning_rate"] = scheduler_d.get_last_lr()[0]
            counts = {"skipped_updates": nonfinite.total, "broken_images": batches.broken.total(accelerator)}
            row = log.flush(step, **weights, **rates, **counts)
            shown = {"D": "discriminator_loss", "G": "generator_loss", "OT": "optimal_transport_loss"}
            shown["samples/s"] = "samples_per_second"
            progress.set_postfix({name: row.get(key) for name, key in shown.items()})
        if step % args.validation_steps == 0 and step < args.max_train_steps:
            validate(accelerator, pipeline, ema, evaluator, log, step, args.seed)
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, step, run_state, args.checkpoints_total_limit)
            saved_step = step
    progress.close()
    batches.close()

    # The end, also of an interrupted run
    end_run(args, accelerator, interrupt, ema, pipeline, plain_discriminator, run_state, step, saved_step)
    if accelerator.is_main_process:
        write_results("train_afm.py", args, pipeline, evaluator, log, step, nonfinite.total)
        if args.push_to_hub:
            push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)
        more = "accelerate launch train_afm.py --train_data_dir YOUR_IMAGES --resolution 64    # your own images"
        print_next(args, data, more)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
