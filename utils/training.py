# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share around their loops: set-up, interruption, guards and logs."""

import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Callable

import datasets
import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    is_wandb_available,
)

from adversarial_flow.utils.errors import InputError


logger = get_logger(__name__)

TESTED_DISTRIBUTED_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
UNTESTED_LAUNCHES = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}


def available_cores() -> int:
    """The cores that this process may use, which `taskset` and clusters limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def make_accelerator(args) -> Accelerator:
    """
    The accelerator of a training script, with logging set up on every rank.

    Raises:
        InputError: for fp16, and for distributed set-ups that are not tested.
    """
    if args.mixed_precision == "fp16":
        raise InputError("--mixed_precision fp16: adversarial gradients under- and overflow in fp16; use bf16 or no.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision is None and precision not in ("no", "bf16"):
        raise InputError(
            f"accelerate is configured for {precision}: pass --mixed_precision bf16 or no, or run `accelerate config` "
            "again."
        )
    if args.report_to == "wandb" and not is_wandb_available():
        raise InputError("--report_to wandb: wandb is not installed; run pip install wandb or use another tracker.")
    for name, kind in UNTESTED_LAUNCHES.items():  # accelerate itself fails with them where they are not installed
        if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true":
            raise InputError(_refusal(kind))
    # Several processes on a machine without GPU talk by gloo; accelerate has to be told that this is meant.
    processes_on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=processes_on_cpu,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
        # Buffers are constants here; every parameter is used in every forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.distributed_type not in TESTED_DISTRIBUTED_TYPES:
        raise InputError(_refusal(accelerator.distributed_type.value))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if (
        launched
        and accelerator.device.type == "cpu"
        and accelerator.num_processes == 1
        and torch.get_num_threads() == 1
    ):
        # `accelerate launch` gives a process one thread, which is meant for several processes on a machine. It also
        # hides whether the user asked for one: `taskset` limits the cores that are taken.
        torch.set_num_threads(available_cores())
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
        force=True,
    )
    for name in ("httpx", "datasets", "accelerate.checkpointing", "accelerate.accelerator"):
        logging.getLogger(name).setLevel(logging.WARNING)
    datasets.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def _refusal(kind: str) -> str:
    return (
        f"accelerate is configured for {kind}: training two networks with it is not tested and therefore refused. Use "
        "plain multi-GPU (DDP), for instance configs/accelerate/8_gpus.yaml."
    )


class InterruptGuard:
    """
    Turns SIGTERM and Ctrl-C into a wish to stop, which all ranks grant together at the end of a step. A second Ctrl-C
    stops at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signal = accelerator, None
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore(self) -> None:
        """Gives the signals back to who had them: there is nothing left to save."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """Whether any rank was asked to stop. Called on all ranks."""
        flag = torch.tensor(float(self.signal is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or signal.SIGTERM)


class NonFiniteGuard:
    """
    Counts updates that were skipped because a loss or a gradient was not finite, and ends the run after
    `max_in_a_row` of one network.
    """

    def __init__(self, max_in_a_row: int):
        self.max_in_a_row, self.in_a_row, self.total = max_in_a_row, {}, 0

    def skips(self, network: str, step: int, *values: torch.Tensor) -> bool:
        """Whether the update must be skipped. The values are the same on all ranks, and so is the answer."""
        if torch.isfinite(torch.stack([value.float() for value in values])).all():  # one synchronisation
            self.in_a_row[network] = 0
            return False
        self.in_a_row[network] = self.in_a_row.get(network, 0) + 1
        self.total += 1
        logger.warning(f"Step {step}: skipped a {network} update, its loss or gradient is not finite.")
        if self.in_a_row[network] >= self.max_in_a_row:
            raise InputError(
                f"{self.in_a_row[network]} {network} updates in a row had losses or gradients that are not "
                f"finite; the run ends at step {step} and the last checkpoint is untouched. Lower the learning rates, "
                "raise --lambda_gp (AFM), or train in fp32; then resume with --resume_from_checkpoint latest."
            )
        return True

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.total = state["total"]


@contextlib.contextmanager
def frozen(model: torch.nn.Module):
    """Turns gradients off for the trained parameters of `model`: nothing is kept in memory for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def apply_update(
    accelerator: Accelerator,
    name: str,
    network: torch.nn.Module,
    optimizer,
    metrics: dict[str, torch.Tensor],
    args,
    guard: NonFiniteGuard,
    step: int,
) -> dict[str, torch.Tensor]:
    """
    Clips the gradients of `network` and steps its optimiser, unless a gradient or one of `metrics` is not finite.
    Returns the metrics with the gradients' norm before clipping, and none if the update was skipped.
    """
    grad_norm = accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm or math.inf)
    skipped = guard.skips(name, step, grad_norm, *metrics.values())
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return {} if skipped else {**metrics, f"{name}_grad_norm": grad_norm}


def accumulated_update(
    accelerator: Accelerator,
    name: str,
    network: torch.nn.Module,
    optimizer,
    loss: Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    args,
    guard: NonFiniteGuard,
    step: int,
) -> dict[str, torch.Tensor]:
    """
    One update of `network`; `loss` gives the loss of a fresh micro-batch and its metrics. Returns the metrics averaged
    over the global batch, none if the update was skipped.
    """
    accumulation, rows = args.gradient_accumulation_steps, []
    for micro_step in range(accumulation):
        with synchronised(accelerator, network, last=micro_step == accumulation - 1):
            value, metrics = loss()
            accelerator.backward(value / accumulation)
        rows.append(metrics)
    metrics = mean_over_global_batch(accelerator, rows)
    return apply_update(accelerator, name, network, optimizer, metrics, args, guard, step)


def synchronised(accelerator: Accelerator, network: torch.nn.Module, last: bool):
    """A context in which gradients are reduced over the ranks in the last micro-step only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(network)


def mean_over_global_batch(
    accelerator: Accelerator, micro_steps: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Averages scalars over micro-steps and ranks in one reduction (a sum and a division: gloo has no average)."""
    rows = [torch.stack([value.detach().float() for value in metrics.values()]) for metrics in micro_steps]
    total = accelerator.reduce(torch.stack(rows).mean(0).to(accelerator.device), reduction="sum")
    return dict(zip(micro_steps[0], (total / accelerator.num_processes).unbind()))


def exit_interrupted(guard: InterruptGuard, message: str) -> None:
    """Ends an interrupted run with the exit code that shells expect of the signal."""
    logger.info(message)
    sys.exit(guard.exit_code)
