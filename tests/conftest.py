import importlib
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


sys.path.insert(0, str(ROOT))  # where the scripts lie, for tests and for train_cafm.py, which imports train_fm.py


@pytest.fixture(scope="session")
def train_afm():
    """The script as a module."""
    return importlib.import_module("train_afm")


@pytest.fixture(scope="session")
def train_fm():
    return importlib.import_module("train_fm")


@pytest.fixture(scope="session")
def train_cafm():
    return importlib.import_module("train_cafm")


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
    return lambda *flags: run_main(train_afm, "--model_config_name_or_path", tiny_config, *flags)


def run_main(script, *flags) -> None:
    """Runs a script's `main` in this process, as if it were a new one."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    script.main([*TINY_FLAGS, *map(str, flags)])


@pytest.fixture
def run_fm(train_fm, tiny_config, tmp_path, monkeypatch):
    """Runs `train_fm.main` on a tiny network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_fm, "SampleEvaluator", _NoEvaluator)
    return lambda *flags: run_main(train_fm, "--model_config_name_or_path", tiny_config, *flags)


@pytest.fixture
def run_cafm(train_cafm, run_fm, monkeypatch):
    """Runs `train_cafm.main` from a tiny flow-matching model in `start/`, with a short warm-up and N = 2."""
    monkeypatch.setattr(train_cafm, "SampleEvaluator", _NoEvaluator)
    run_fm("--output_dir", "start", "--learning_rate", 1e-2, "--max_train_steps", 20)
    common = ("--pretrained_model_name_or_path", "start", "--ttur", 2, "--discriminator_warmup_steps", 2)
    return lambda *flags: run_main(train_cafm, *common, "--max_train_steps", 8, *flags)


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
    def for_data(args, data):
        return None


@pytest.fixture
def run_command(tmp_path, tiny_config):
    """Runs the script in a process of its own, optionally through `accelerate launch`; returns the process."""

    def run_process(
        *flags: str, launch: tuple[str, ...] | None = None, timeout: int = 300, script="train_afm.py", **kwargs
    ):
        command = [sys.executable]
        if launch is not None:
            command += ["-m", "accelerate.commands.accelerate_cli", "launch", *launch]
        sizes = ["--model_config_name_or_path", tiny_config] if script != "train_cafm.py" else []
        command += [str(ROOT / script), *sizes, *TINY_FLAGS]
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


TWO_PROCESSES = ("--config_file", str(ROOT / "configs" / "accelerate" / "2_cpu_processes.yaml"))


def assert_fails(message: str, run, *flags) -> None:
    """The run ends with an `InputError` of one line that matches."""
    from adversarial_flow.utils.errors import InputError

    with pytest.raises(InputError, match=message) as info:
        run(*flags)
    assert "\n" not in str(info.value)


def weights(folder, name="transformer") -> dict:
    from safetensors.torch import load_file

    return load_file(Path(folder) / name / "diffusion_pytorch_model.safetensors")


def assert_close_weights(first, second, atol, names=("transformer", "discriminator")) -> None:
    for name in names:
        a, b = weights(first, name), weights(second, name)
        worst = max((a[key] - b[key]).abs().max().item() for key in a)
        assert worst <= atol, f"{name} differs by {worst}"


def without_rates(path) -> list[dict]:
    """The rows of a log without what depends on the clock."""
    from adversarial_flow.utils.metrics import read_metrics

    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in read_metrics(path)]


def assert_same_folder_weights(first, second, names=("transformer", "transformer_ema", "discriminator")) -> None:
    """Bitwise equality of the networks in two checkpoint folders."""
    for name in names:
        a, b = weights(first, name), weights(second, name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key} differs by {(a[key] - b[key]).abs().max()}"
