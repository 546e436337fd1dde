# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Micro-batches of images with all random numbers that an update needs, as a function of (seed, update, position)."""

import atexit
import functools
import logging
import os
import signal
from dataclasses import dataclass
from multiprocessing.synchronize import Event

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.models import AutoencoderKL
from torch.utils.data import DataLoader, Dataset, Sampler

from adversarial_flow.utils.errors import InputError
from adversarial_flow.utils.latents import encode_latents
from adversarial_flow.utils.randomness import draw_normals_and_uniforms, sample_seeds


logger = logging.getLogger(__name__)

MAX_BROKEN_SHARE = 0.01  # more broken images than this share of the data set (and more than 10) end the run


class UpdateBatchSampler(Sampler[list[int]]):
    """
    Endless batches of indices, a pure function of (seed, update, micro-step, rank).

    All updates, of either network, take their samples one after another from one endless shuffled stream: update u
    takes the positions u * global_batch to (u + 1) * global_batch - 1, where global_batch = accumulation * processes *
    batch_size; epoch e of the stream is a permutation that depends on (seed, e). Each update therefore sees fresh
    samples, and how a global batch is divided among micro-steps and processes does not change its content.
    """

    def __init__(
        self, length: int, batch_size: int, accumulation: int, seed: int, rank: int, world_size: int, first_update: int
    ):
        self.length, self.batch_size, self.accumulation, self.seed = length, batch_size, accumulation, seed
        self.rank, self.world_size, self.update = rank, world_size, first_update
        self._epoch, self._order = -1, None

    @property
    def global_batch(self) -> int:
        return self.accumulation * self.world_size * self.batch_size

    def positions(self, micro_step: int) -> list[int]:
        """The positions in the global batch that this rank's micro-batch covers."""
        start = (micro_step * self.world_size + self.rank) * self.batch_size
        return list(range(start, start + self.batch_size))

    def index(self, position: int) -> int:
        """The index of the data set at a position of the endless stream."""
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return int(self._order[offset])

    def __iter__(self):
        while True:
            for micro_step in range(self.accumulation):
                start = self.update * self.global_batch
                yield [self.index(start + position) for position in self.positions(micro_step)]
            self.update += 1


def make_dataloader(dataset: Dataset, sampler: UpdateBatchSampler, num_workers: int, ending: Event) -> DataLoader:
    """
    The sampler shards the data: this loader must not be given to `accelerator.prepare`. Its workers obey a SIGTERM
    only when `ending` is set.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=functools.partial(_outlive_signals, ending),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def _outlive_signals(ending: Event, worker: int) -> None:
    """
    A SIGTERM or Ctrl-C often reaches the whole process group; the workers stay until the main process has saved and
    ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)


class BrokenSampleCounter:
    """Logs and counts the images skipped on this rank, and ends the run at more than 1% of the data set (and 10)."""

    def __init__(self, length: int):
        self.limit, self.count = min(max(10, int(MAX_BROKEN_SHARE * length)), length - 1), 0
        self._seen = set()

    def add(self, broken: list[str]) -> None:
        for line in (line for text in broken if text for line in text.split("\n")):
            if line in self._seen:
                continue
            self._seen.add(line)
            self.count += 1
            # An error and not a warning: the log of the other ranks starts there.
            logger.error(f"Skipped a broken image ({self.count} so far): {line}")
        if self.count > self.limit:
            raise InputError(f"{self.count} broken images, more than {self.limit}: clean the data set (see the log).")

    def total(self, accelerator: Accelerator) -> int:
        """The count of all ranks. Called on all of them."""
        return int(accelerator.reduce(torch.tensor(float(self.count), device=accelerator.device), reduction="sum"))


@dataclass
class ImageBatch:
    """A micro-batch of samples of the data, in pixels or latents, with random numbers of each sample."""

    images: torch.Tensor  # (B, C, H, W)
    class_labels: torch.Tensor | None  # (B,)
    normals: torch.Tensor  # (num_normals, B, C, H, W), standard normal
    uniforms: torch.Tensor  # (B, num_uniforms), in [0, 1)
    positions: list[int]  # in the global batch


class ImageBatches:
    """
    Endless [`ImageBatch`]es for this rank, `gradient_accumulation_steps` of them for each update of either network.

    Args:
        dataset (`Dataset`): The data; not shared out among the ranks yet.
        config: The network's, for the shape of what it sees and whether it takes class labels.
        args: The flags (see [`~utils.arguments`]).
        vae (`AutoencoderKL`, *optional*): Encodes the images.
        first_update (`int`): Updates, of all networks, that were made before.
        num_normals (`int`): Normal tensors for each sample, besides the one that the VAE's posterior takes.
        num_uniforms (`int`): Uniform numbers for each sample; the third one decides whether it is mirrored.
    """

    def __init__(
        self,
        dataset: Dataset,
        config,
        args,
        accelerator: Accelerator,
        vae: AutoencoderKL | None,
        first_update: int,
        num_normals: int,
        num_uniforms: int,
    ):
        self.sampler = UpdateBatchSampler(
            len(dataset),
            args.train_batch_size,
            args.gradient_accumulation_steps,
            args.seed,
            accelerator.process_index,
            accelerator.num_processes,
            first_update,
        )
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.conditional, self.random_flip = config.num_classes is not None, args.random_flip
        self.seed, self.vae, self.device = args.seed, vae, accelerator.device
        self.num_normals, self.num_uniforms = num_normals, num_uniforms
        self.micro_steps = self.sampler.update * self.sampler.accumulation
        self.broken = BrokenSampleCounter(self.sampler.length)
        self._ending = torch.multiprocessing.get_context().Event()
        atexit.register(self._ending.set)  # before multiprocessing's own, which ends the workers by SIGTERM
        self._batches = iter(make_dataloader(dataset, self.sampler, args.dataloader_num_workers, self._ending))

    def close(self) -> None:
        """Ends the workers; there are no more batches."""
        self._ending.set()
        self._batches = None

    def __next__(self) -> ImageBatch:
        update, micro_step = divmod(self.micro_steps, self.sampler.accumulation)
        self.micro_steps += 1
        batch = next(self._batches)
        self.broken.add(batch["broken"])
        positions = self.sampler.positions(micro_step)
        normals, uniforms = draw_normals_and_uniforms(
            sample_seeds(self.seed, update, positions),
            self.num_normals + int(self.vae is not None),
            self.sample_shape,
            self.num_uniforms,
            self.device,
        )
        images = batch["image"].to(self.device, non_blocking=True)  # (B, C, H, W)
        if self.random_flip:
            images = torch.where((uniforms[:, 2] < 0.5)[:, None, None, None], images.flip(-1), images)
        if self.vae is not None:
            images = encode_latents(self.vae, images, normals[-1])
        class_labels = batch["label"].to(self.device) if self.conditional else None
        return ImageBatch(images, class_labels, normals, uniforms, positions)
