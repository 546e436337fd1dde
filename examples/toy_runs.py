# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Everything that the claims of the papers need, trained over several seeds."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from toy_data import even_noise, wasserstein
from toy_training import (
    GUIDANCE,
    Setting,
    Trained,
    pretrain,
    setting_of,
    train_adversarial,
    train_continuous,
    train_flow_matching,
    train_guide,
)
from tqdm import tqdm

from adversarial_flow.utils.training import available_cores


SEEDS = (0, 1, 2, 3, 4)
NOISE = even_noise(4000)
W_GUIDED = GUIDANCE["fm"]["classifier_free"]
CONTROL_RATES = (1e-3, 3e-4, 1e-4)

# Names of runs that the claims compare
GAN, AFM, FLOW = "GAN (lambda_ot 0)", "AFM, lambda_ot 0.05", "flow matching, 64 steps"
SMALL, HEAVY, HEAVIER, DECAYED = (f"AFM, lambda_ot {value}" for value in ("0.001", "1", "5", "1 to 0.05"))
ONE_STEP = (GAN, SMALL, AFM, HEAVY, HEAVIER, DECAYED)
SCRATCH, SCRATCH_INPUT = "CAFM from scratch", "from scratch, D takes the velocity"
START, CONTROL, CAFM, CAFM_INPUT = "small flow model", "more flow matching", "CAFM", "D takes the velocity"
CONDITIONAL, GUIDED_FLOW = "AFM, four classes", "flow, classifier-free guidance"
ON_FLOW, AT_DATA = "AFM, classifier on the flow", "AFM, classifier at t = 0"
AT_DATA_TWICE, BY_FLOW = "AFM, classifier at t = 0, twice the weight", "AFM, flow-matching model"

# The paths of NOISE under what a run has trained, by name: arrays of shape (steps + 1, noise), of conditional models
# (classes, steps + 1, noise).
Paths = dict[str, np.ndarray]


def path(trained: Trained, num_steps: int | None = None) -> np.ndarray:
    paths = np.stack([points.squeeze(-1).numpy() for points in trained.paths_by_class(NOISE, num_steps)])
    return paths if trained.setting.num_classes else paths[0]


# --------------------------------------------------------------------------------------------------------------- runs

# Each run gets `make`, which is `setting_of` with the run's seed.

ADVERSARIAL = {
    GAN: ("gan", {}),
    SMALL: ("afm", {"lambda_ot": 0.001}),
    AFM: ("afm", {}),
    HEAVY: ("afm", {"lambda_ot": 1.0}),
    HEAVIER: ("afm", {"lambda_ot": 5.0}),
    DECAYED: ("afm", {"lambda_ot": 1.0, "lambda_ot_end": 0.05}),
    "AFM, 2 steps": ("afm", {"num_steps": 2}),
    "AFM, 4 steps": ("afm", {"num_steps": 4}),
}


def adversarial(name: str, make: Callable[..., Setting]) -> Paths:
    method, changes = ADVERSARIAL[name]
    return {name: path(train_adversarial(make(method, **changes)))}


def any_step(make: Callable[..., Setting]) -> Paths:
    trained = train_adversarial(make("afm", num_steps=None))
    return {f"AFM for any step, {n} taken": path(trained, n) for n in (1, 2, 4)}


def flow_matching(make: Callable[..., Setting]) -> Paths:
    trained = train_flow_matching(make("fm"))
    return {f"flow matching, {n} steps": path(trained, n) for n in (1, 2, 4, 64)}


def from_scratch(velocity_as_input: bool, make: Callable[..., Setting]) -> Paths:
    large = {"width": 128, "num_layers": 4, "steps": 2000, "ttur": 4, "warmup": 0}
    setting = make("cafm", lambda_ot=0.01, lambda_ot_end=0.0, velocity_as_input=velocity_as_input, **large)
    name = SCRATCH_INPUT if velocity_as_input else SCRATCH
    return {name: path(train_continuous(setting))}


def post_training(make: Callable[..., Setting]) -> Paths:
    """A flow model that is too small; CAFM, and flow matching on as many batches as both networks of CAFM saw."""
    setting = make("cafm")
    start = pretrain(setting)
    steps = setting.warmup + setting.steps * (setting.ttur + 1)
    controls = [
        path(train_flow_matching(replace(start.setting, steps=steps, learning_rate=rate), start.generator))
        for rate in CONTROL_RATES
    ]
    return {
        START: path(start),
        CONTROL: min(controls, key=lambda points: wasserstein(torch.as_tensor(points[-1]))),
        CAFM: path(train_continuous(setting, start.generator)),
        CAFM_INPUT: path(train_continuous(replace(setting, velocity_as_input=True), start.generator)),
    }


SCALES = GUIDANCE["afm"]
GUIDED = {
    ON_FLOW: ("classifier", SCALES["classifier"]),
    AT_DATA: ("classifier_at_data", SCALES["classifier_at_data"]),
    AT_DATA_TWICE: ("classifier_at_data", 2 * SCALES["classifier_at_data"]),
    BY_FLOW: ("classifier_free", SCALES["classifier_free"]),
}


def guided(make: Callable[..., Setting]) -> Paths:
    paths = {CONDITIONAL: path(train_adversarial(make("afm", data="classes")))}
    settings = {
        name: make("afm", data="classes", guidance=guidance, guidance_scale=scale)
        for name, (guidance, scale) in GUIDED.items()
    }
    classifier = train_guide(settings[ON_FLOW])
    flow = train_guide(settings[BY_FLOW])
    for name, setting in settings.items():
        guide = flow if setting.guidance == "classifier_free" else classifier
        paths[name] = path(train_adversarial(setting, guide))
    setting = make("fm", data="classes")
    paths["flow"] = path(Trained(flow, setting))
    paths[GUIDED_FLOW] = path(Trained(flow, replace(setting, guidance_scale=W_GUIDED)))
    return paths


RUNS: list[Callable[..., Paths]] = [  # the longest first
    guided,
    partial(from_scratch, False),
    partial(from_scratch, True),
    post_training,
    any_step,
    *(partial(adversarial, name) for name in reversed(ADVERSARIAL)),
    flow_matching,
]


def make_setting(seed: int, max_steps: int | None, method: str, **changes) -> Setting:
    setting = setting_of(method, seed=seed, **changes)
    if max_steps is None:
        return setting
    names = ("steps", "warmup", "pretraining")
    return replace(setting, **{name: min(getattr(setting, name), max_steps) for name in names})


def train_all(max_steps: int | None) -> Paths:
    """The paths of all runs over the seeds, stacked: (seeds, ...). One process for each core, of one thread each."""
    collected: dict[str, dict[int, np.ndarray]] = {}
    workers = {"mp_context": get_context("spawn"), "initializer": partial(torch.set_num_threads, 1)}
    with ProcessPoolExecutor(available_cores(), **workers) as pool:
        futures = {pool.submit(run, partial(make_setting, seed, max_steps)): seed for run in RUNS for seed in SEEDS}
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)  # and not the rest of the runs first
            for name, points in future.result().items():
                collected.setdefault(name, {})[futures[future]] = points
    return {name: np.stack([of_seed[seed] for seed in SEEDS]) for name, of_seed in collected.items()}
