# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""What a user can mend: the scripts print these errors as one line and exit with code 1, without a traceback."""

import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Input that can't be used. The message names the flag or the file, and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def listed(names: list[str]) -> str:
    """Up to ten names, then a count."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and turns an [`InputError`] into one line on stderr and exit code 1."""
    try:
        main()
    except InputError as error:
        rank = os.environ.get("RANK", "0")  # some errors happen on one rank alone, so that each rank reports its own
        print(f"\nerror: {error}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
        sys.exit(1)
