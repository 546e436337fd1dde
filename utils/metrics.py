# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The log of a run: averages over updates to `metrics.jsonl` and to the trackers."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from adversarial_flow.utils.checkpointing import METRICS_FILE


logger = get_logger(__name__)


class MetricsLog:
    """
    Averages metrics between two log lines, appends them to `metrics.jsonl` and hands them to the trackers. A full disk
    or a tracker that fails is reported once and never ends the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str, first_step: int):
        self.accelerator = accelerator
        self.path = Path(output_dir) / METRICS_FILE
        self._sums, self._counts, self._failed = {}, {}, set()
        self._images, self._since = 0, time.perf_counter()
        if accelerator.is_main_process:
            self._guarded(f"Writing {self.path}", lambda: self._keep_until(first_step), OSError)

    def _keep_until(self, step: int) -> None:
        """Drops the rows of steps that will be made again; the file is replaced as a whole."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step] if step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, self.path)

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
            self._guarded(f"Writing {self.path}", lambda: self._append({"step": step, **row}), OSError)
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
        self._guarded("The tracker", send, Exception)  # a tracker's client may raise anything

    def _guarded(self, what: str, call: Callable[[], None], kind: type[Exception]) -> None:
        try:
            call()
        except kind as error:  # the weights matter more
            if what not in self._failed:
                logger.warning(f"{what} failed ({error}); training goes on.")
            self._failed.add(what)


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, without lines that a killed process left unfinished."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
