import importlib.util
import os
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reads the network

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402


ROOT = Path(__file__).parent.parent
TINY = {"patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
TINY_FLAGS = ["--train_batch_size", "8", "--max_train_steps", "4", "--report_to", "none", "--logging_steps", "1"]


@pytest.fixture(autouse=True)
def single_thread():
    """Tiny networks are faster on one thread, and two processes then share the machine fairly."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def train_afm():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_afm", ROOT / "train_afm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(str(TINY).replace("'", '"'))
    return str(path)


@pytest.fixture
def run(train_afm, tiny_config, tmp_path, monkeypatch):
    """Runs `train_afm.main` in this process on a tiny network, with later flags overriding the tiny ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_afm, "SampleEvaluator", _NoEvaluator)

    def run_main(*flags: str) -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        train_afm.main(["--model_config_name_or_path", tiny_config, *TINY_FLAGS, *map(str, flags)])

    return run_main


@pytest.fixture
def log_text(capsys):
    """What the script has written to stderr so far: its log and its progress bar."""
    seen = []

    def read() -> str:
        seen.append(capsys.readouterr().err)
        return "".join(seen)

    return read


class _NoEvaluator:
    """The script tests do not pay for training the classifier; one test runs the real evaluator."""

    @staticmethod
    def for_digits(dataset):
        return None


@pytest.fixture
def run_command(tmp_path, tiny_config):
    """Runs the script in a process of its own, optionally through `accelerate launch`; returns the process."""

    def run_process(*flags: str, launch: tuple[str, ...] | None = None, timeout: int = 300, **kwargs):
        command = [sys.executable]
        if launch is not None:
            command += ["-m", "accelerate.commands.accelerate_cli", "launch", *launch]
        command += [str(ROOT / "train_afm.py"), "--model_config_name_or_path", tiny_config, *TINY_FLAGS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [*command, *map(str, flags)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            **kwargs,
        )

    return run_process


def assert_same_folder_weights(first, second, names=("transformer", "transformer_ema", "discriminator")) -> None:
    """Bitwise equality of the networks in two checkpoint folders."""
    from safetensors.torch import load_file

    for name in names:
        a, b = (load_file(Path(f) / name / "diffusion_pytorch_model.safetensors") for f in (first, second))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key} differs by {(a[key] - b[key]).abs().max()}"
