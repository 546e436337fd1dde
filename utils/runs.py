# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What every training script does before and after its loop: data, optimisers, resuming, the end."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from adversarial_flow.utils.arguments import prepare_output_dir
from adversarial_flow.utils.checkpointing import belongs_to, clear_run, find_checkpoint, save_checkpoint
from adversarial_flow.utils.data import TrainingData, load_training_data
from adversarial_flow.utils.errors import InputError
from adversarial_flow.utils.latents import load_vae
from adversarial_flow.utils.results import save_final
from adversarial_flow.utils.training import InterruptGuard, exit_interrupted, make_accelerator


logger = get_logger(__name__)


# ------------------------------------------------------------------------------------------------------------ before


def start_run(args) -> Accelerator:
    """Checks the output folder, makes the accelerator and seeds the networks, the same on all ranks."""
    if os.environ.get("RANK", "0") == "0":  # before the ranks meet: none finds the traces of another
        prepare_output_dir(args)
    accelerator = make_accelerator(args)
    set_seed(args.seed)  # noise does not come from here
    return accelerator


def load_data(args, accelerator: Accelerator) -> tuple[TrainingData, AutoencoderKL | None, int]:
    """The data, the VAE if there is one, and the size of the global batch, which must fit into the data."""
    with accelerator.main_process_first():
        data = load_training_data(args)
    vae = load_vae(args.vae)
    accumulation, processes = args.gradient_accumulation_steps, accelerator.num_processes
    global_batch = args.train_batch_size * accumulation * processes
    if global_batch > len(data.dataset):
        raise InputError(
            f"a batch of {global_batch} (--train_batch_size {args.train_batch_size} x {accumulation} micro-steps x "
            f"{processes} processes) is larger than the data set ({len(data.dataset)} images): lower "
            "--train_batch_size."
        )
    return data, vae, global_batch


def find_resume(args, accelerator: Accelerator, architectures: dict) -> tuple[Path, dict] | None:
    """The checkpoint that the flags ask for and its state; and an output folder without what a new run replaces."""
    resume = None
    if args.resume_from_checkpoint is not None:
        resume = find_checkpoint(
            args.resume_from_checkpoint, args.output_dir, architectures, overwrite=args.overwrite_output_dir
        )
        if resume is None:
            logger.info(f"There is no checkpoint in {args.output_dir} yet: starting a new run.")
    if accelerator.is_main_process:
        clear_run(args.output_dir, going_on=resume is not None and belongs_to(resume[0], args.output_dir))
    accelerator.wait_for_everyone()
    return resume


def adam_flags(args) -> dict:
    betas = (args.adam_beta1, args.adam_beta2)
    return {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}


def make_optimizer(args, model: torch.nn.Module, learning_rate: float, num_updates: int):
    """AdamW and its schedule, whose unit is one update of this network; it is not prepared by accelerate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, **adam_flags(args))
    try:
        scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_updates
        )
    except ValueError as error:  # the polynomial ends at 1e-7, whatever the rate
        raise InputError(f"--lr_scheduler {args.lr_scheduler} and --learning_rate {learning_rate}: {error}") from error
    return optimizer, scheduler


def make_ema(args, model: torch.nn.Module) -> EMAModel:
    """The average of a prepared network, whose weights are the same on all ranks."""
    return EMAModel(
        model.parameters(),
        decay=args.ema_decay,
        min_decay=float(args.ema_decay),  # constant, as in the papers, rather than ramped
        foreach=True,
        model_cls=type(model),
        model_config=model.config,
    )


def load_run(args, accelerator: Accelerator, resume: tuple[Path, dict] | None, run_state: dict) -> int:
    """
    Loads the checkpoint found by [`find_resume`] and returns the number of steps that it holds.

    Raises:
        InputError: if processes on different machines found different ones.
    """
    first_step = 0 if resume is None else resume[1]["step"]
    steps = accelerator.gather(torch.tensor([first_step], device=accelerator.device))
    if (steps != first_step).any():
        raise InputError(
            f"--resume_from_checkpoint: the processes found checkpoints of different steps ({steps.tolist()}): "
            "--output_dir must be on a file system that all machines see."
        )
    if resume is None:
        set_seed(args.seed, device_specific=True)  # dropout differs between the processes
        return 0
    checkpoint, state = resume
    accelerator.load_state(str(checkpoint))
    for key, value in run_state.items():
        if key != "architecture" and state.get(key) != value:
            logger.warning(f"{checkpoint.name} was made with {key} {state.get(key)}, this run has {value}.")
    logger.info(f"Resuming from {checkpoint} at step {state['step']}.")
    if first_step >= args.max_train_steps:
        logger.warning(f"--max_train_steps {args.max_train_steps} is reached: nothing is left to train.")
    return first_step


def set_rates(args, optimizer, scheduler, learning_rate: float) -> None:
    """Gives an optimiser and its schedule that were loaded from a checkpoint the values of this run's flags."""
    scheduler.base_lrs = [learning_rate for _ in scheduler.base_lrs]
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas):
        group.update(adam_flags(args), initial_lr=learning_rate, lr=learning_rate * factor(scheduler.last_epoch))
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def progress_bar(accelerator: Accelerator, first_step: int, max_train_steps: int, unit: str) -> tqdm:
    disable = not accelerator.is_local_main_process
    return tqdm(initial=first_step, total=max_train_steps, desc=unit, disable=disable, dynamic_ncols=True)


# ------------------------------------------------------------------------------------------------------------- after


def end_run(
    args,
    accelerator: Accelerator,
    interrupt: InterruptGuard,
    ema: EMAModel,
    pipeline,
    discriminator: torch.nn.Module | None,
    run_state: dict,
    step: int,
    saved_step: int,
) -> None:
    """A last checkpoint, then the pipeline with the averaged weights; an interrupted run ends here."""
    if saved_step != step:
        save_checkpoint(accelerator, args.output_dir, step, run_state, args.checkpoints_total_limit)
    ema.copy_to(pipeline.transformer.parameters())
    pipeline.transformer.eval()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_final(args.output_dir, pipeline, discriminator)
    accelerator.wait_for_everyone()  # a rank that ends early would take the one that writes with it
    interrupt.restore()
    if step < args.max_train_steps:
        accelerator.end_training()
        exit_interrupted(
            interrupt,
            f"Interrupted at step {step}: a checkpoint and the weights are in {args.output_dir}. Run the same command "
            "with --resume_from_checkpoint latest to go on.",
        )
