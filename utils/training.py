# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share around their loops: set-up, interruption, guards and logs."""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import diffusers
import numpy as np
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


def make_accelerator(args) -> Accelerator:
    """
    The accelerator of a training script, with logging set up on every rank.

    Raises:
        InputError: for fp16, and for distributed set-ups that are not tested.
    """
    if args.mixed_precision == "fp16":
        raise InputError("--mixed_precision fp16: adversarial gradients under- and overflow in fp16; use bf16 or no.")
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
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(
            f"accelerate is configured for {accelerator.mixed_precision}: pass --mixed_precision bf16 or no, or run "
            "`accelerate config` again."
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
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
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
                "raise --lambda_gp, or train in fp32; then resume with --resume_from_checkpoint latest."
            )
        return True

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.total = state["total"]


class MetricsLog:
    """
    Averages metrics between two log lines, appends them to `metrics.jsonl` and hands them to the trackers. A full disk
    or a tracker that fails is reported once and never ends the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str, first_step: int):
        self.accelerator = accelerator
        self.path = Path(output_dir) / "metrics.jsonl"
        self._sums, self._counts, self._failed = {}, {}, set()
        self._images, self._since = 0, time.perf_counter()
        if accelerator.is_main_process:
            rows = [row for row in read_metrics(self.path) if row["step"] <= first_step] if first_step else []
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start_trackers(self, project: str, config: dict) -> None:
        """Starts the trackers with the run's flags."""
        simple = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
        simple.pop("hub_token", None)
        if self.accelerator.is_main_process:
            self._to_trackers(lambda: self.accelerator.init_trackers(project, config=simple))

    def add(self, metrics: dict[str, torch.Tensor], images: int) -> None:
        """Takes the metrics of one update, already averaged over ranks, and the images it saw on all ranks."""
        for key, value in metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + value.detach()
            self._counts[key] = self._counts.get(key, 0) + 1
        self._images += images

    def flush(self, step: int, **values: float) -> dict[str, float]:
        """Writes the averages since the last call, with `values` as they are, and returns them."""
        row = {key: float(self._sums[key] / self._counts[key]) for key in self._sums}
        now = time.perf_counter()
        row["samples_per_second"] = self._images / max(now - self._since, 1e-9)
        self._sums, self._counts, self._images, self._since = {}, {}, 0, now
        row.update(values)
        self.write(step, row)
        return row

    def write(self, step: int, row: dict[str, float]) -> None:
        """Writes one row as it is, outside the averages (an evaluation)."""
        if self.accelerator.is_main_process:
            self._guarded(f"Writing {self.path}", lambda: self._append({"step": step, **row}))
        self._to_trackers(lambda: self.accelerator.log(row, step=step))

    def _append(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def images(self, step: int, name: str, images: list) -> None:
        """Hands PIL images to the trackers."""

        def send() -> None:
            arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images({name: arrays}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: images}, step=step)

        self._to_trackers(send)

    def _to_trackers(self, send: Callable[[], None]) -> None:
        self._guarded("The tracker", send)

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a disk or a tracker's client raises, the weights matter more
            if what not in self._failed:
                logger.warning(f"{what} failed ({error}); training goes on.")
            self._failed.add(what)


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, without a last line that a killed process left unfinished."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def set_rates(optimizer, scheduler, learning_rate: float, **adam) -> None:
    """Gives an optimiser and its schedule that were loaded from a checkpoint the values of this run's flags."""
    scheduler.base_lrs = [learning_rate for _ in scheduler.base_lrs]
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas):
        group.update(adam, initial_lr=learning_rate, lr=learning_rate * factor(scheduler.last_epoch))
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


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


def mean_over_global_batch(
    accelerator: Accelerator, micro_steps: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Averages scalars over micro-steps and ranks in one reduction (a sum and a division: gloo has no average)."""
    rows = [torch.stack([value.detach().float() for value in metrics.values()]) for metrics in micro_steps]
    total = accelerator.reduce(torch.stack(rows).mean(0).to(accelerator.device), reduction="sum")
    return dict(zip(micro_steps[0], (total / accelerator.num_processes).unbind()))


def memory_plan(
    args, accelerator: Accelerator, transformer, discriminator, vae: torch.nn.Module | None, data_size: int
) -> str:
    """
    The plan of a run in words: data, networks, updates, and memory. The networks may be on the `meta` device.

    Weights, gradients (twice with DDP, which keeps them in buckets), Adam's two moments and the average are exact for
    float32. Activations are estimated as 34 bytes
    for each token, channel and layer in half precision and twice that in float32 (arXiv 2205.05198 without the
    attention matrix), or one checkpoint of the block's input.
    """
    gibibyte = 2**30
    sizes = [sum(p.numel() for p in model.parameters()) for model in (transformer, discriminator)]
    processes = accelerator.num_processes
    states = 4 * ((4 + int(processes > 1)) * sum(sizes) + sizes[0])
    states += 4 * sum(p.numel() for p in vae.parameters()) if vae is not None else 0
    bytes_per_value = 2 if accelerator.mixed_precision == "bf16" else 4

    def activations(model, samples: float) -> float:
        config = model.config
        tokens = (config.sample_size // config.patch_size) ** 2
        per_value = bytes_per_value if args.gradient_checkpointing else 17 * bytes_per_value
        layers = config.num_layers * config.get("repeats", 1)
        return per_value * samples * tokens * config.num_attention_heads * config.attention_head_dim * layers

    batch = args.train_batch_size
    peak = max(
        activations(discriminator, (2 + 2 * args.gp_batch_ratio) * batch),
        activations(transformer, batch) + activations(discriminator, batch),
    )
    global_batch = batch * args.gradient_accumulation_steps * processes
    steps = "any number of" if args.num_steps is None else args.num_steps
    config = transformer.config
    lines = (
        f"Data           {data_size:,} images, {config.num_classes or 'no'} classes",
        f"Generator      {sizes[0]:,} parameters, {steps} step(s), predicts the {args.prediction_type}",
        f"Discriminator  {sizes[1]:,} parameters",
        f"Input          {config.in_channels} x {config.sample_size} x {config.sample_size}, patch "
        f"{config.patch_size} (D {discriminator.config.patch_size})",
        f"Updates        {args.max_train_steps:,} of G, {args.ttur} of D for each; global batch {global_batch} = "
        f"{batch} x {args.gradient_accumulation_steps} micro-steps x {processes} processes",
        f"Epochs         {args.max_train_steps * global_batch / data_size:.1f}, counted by images that G sees",
        f"Learning rates G {args.learning_rate / args.repeats:.3g}, D {args.discriminator_learning_rate:.3g}",
        f"Memory         about {(states + peak) / gibibyte:.2f} GiB a process: weights, gradients, Adam, EMA, VAE "
        f"{states / gibibyte:.2f}, activations about {peak / gibibyte:.2f}",
        f"Output         {args.output_dir}",
    )
    return "\n".join(lines)


def exit_interrupted(guard: InterruptGuard, message: str) -> None:
    """Ends an interrupted run with the exit code that shells expect of the signal."""
    logger.info(message)
    sys.exit(guard.exit_code)
