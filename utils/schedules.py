# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Schedules of the objective's weights (lambda_ot, lambda_gp, the augmentation probability)."""

import argparse
import math


def scheduled_value(start: float, end: float, step: int, num_steps: int, schedule: str = "cosine") -> float:
    """
    The value at `step` on the way from `start` (step 0) to `end` (`num_steps` and after).

    Args:
        start (`float`): Value at step 0.
        end (`float`): Value at `num_steps`; not used by `"constant"`.
        step (`int`): Number of generator updates done.
        num_steps (`int`): Length of the decay in generator updates.
        schedule (`str`, defaults to `"cosine"`): `"cosine"`, `"linear"` or `"constant"`.
    """
    if schedule == "constant":
        return start
    progress = min(step / num_steps, 1.0) if num_steps > 0 else 1.0
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


def scheduled_flag(args: argparse.Namespace, name: str, step: int, all_steps: int) -> float:
    """The value of a flag of [`~utils.arguments.add_schedule_arguments`]; without an end it stays what it is."""
    start, end = getattr(args, name), getattr(args, f"{name}_end")
    if end is None:
        return start
    return scheduled_value(
        start, end, step, getattr(args, f"{name}_decay_steps") or all_steps, getattr(args, f"{name}_schedule")
    )
