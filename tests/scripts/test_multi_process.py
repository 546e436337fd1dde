"""Two CPU processes (gloo), started by the line that the README gives."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, assert_same_folder_weights, weights
from PIL import Image

from adversarial_flow.utils.metrics import read_metrics


def test_the_readme_has_this_line():
    assert "--config_file configs/accelerate/2_cpu_processes.yaml train_afm.py" in (ROOT / "README.md").read_text()


def test_an_update_that_fails_on_one_rank_is_skipped_on_all(run_command, probe, monkeypatch):
    monkeypatch.setenv("NAN_ON_RANK", "1")
    result = run_command("--max_train_steps", 4, "--output_dir", "two", launch=TWO_PROCESSES, timeout=400)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(probe / "two" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows if "skipped_updates" in row] == [0, 1, 1, 1]
    states, _ = zip(*(torch.load(probe / f"weights-{rank}.pt") for rank in (0, 1)))
    for network in states[0]:
        for key, value in states[0][network].items():
            assert torch.isfinite(value).all() and torch.equal(value, states[1][network][key])


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """Every rank writes its last weights and the noise of its first batch when the run ends."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK'):\n"
        "    import torch, adversarial_flow.utils.afm as afm, adversarial_flow.utils.checkpointing as c\n"
        "    rank, generate, register = os.environ['RANK'], afm.generate, c.register_model_folders\n"
        "    def first_noise(transformer, batch, kind):\n"
        "        if not os.path.exists(f'noise-{rank}.pt'): torch.save(batch.source, f'noise-{rank}.pt')\n"
        "        return generate(transformer, batch, kind)\n"
        "    def keep(accelerator, models, ema):\n"
        "        import atexit\n"
        "        def dump():\n"
        "            states = {n: accelerator.unwrap_model(m).state_dict() for n, m in models.items()}\n"
        "            torch.save((states, ema.shadow_params), f'weights-{rank}.pt')\n"
        "        atexit.register(dump)\n"
        "        return register(accelerator, models, ema)\n"
        "    gradient_of, calls = afm.adversarial_gradient, []\n"
        "    def nan_once(*args):\n"
        "        calls.append(None)\n"
        "        gradient, loss = gradient_of(*args)\n"
        "        nan = os.environ.get('NAN_ON_RANK') == rank and len(calls) == 2\n"
        "        return (gradient * float('nan') if nan else gradient), loss\n"
        "    afm.adversarial_gradient = nan_once\n"
        "    afm.generate, c.register_model_folders = first_noise, keep\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_two_processes_equal_one_with_the_doubled_batch(run, run_command, probe):
    common = ("--adam_epsilon", 1e-3, "--max_train_steps", 3, "--num_steps", "any")
    result = run_command("--train_batch_size", 8, "--output_dir", "two", *common, launch=TWO_PROCESSES, timeout=400)
    assert result.returncode == 0, result.stderr
    assert re.search(r"global batch 16 = 8 x 1 micro-steps x 2 processes", result.stdout)

    states, averages = zip(*(torch.load(probe / f"weights-{rank}.pt") for rank in (0, 1)))
    for network in ("transformer", "discriminator"):
        for key, value in states[0][network].items():
            assert torch.equal(value, states[1][network][key]), f"ranks differ in {network} {key}"
    assert all(torch.equal(a, b) for a, b in zip(*averages)), "ranks differ in the average"
    noise = [torch.load(probe / f"noise-{rank}.pt") for rank in (0, 1)]
    assert (noise[0] - noise[1]).abs().min() > 0

    run("--train_batch_size", 16, "--output_dir", "one", *common)
    for a, b in zip(read_metrics("one/metrics.jsonl"), read_metrics("two/metrics.jsonl")):
        for key in ("discriminator_loss", "generator_loss", "optimal_transport_loss", "r1_penalty", "r2_penalty"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    for name in ("transformer", "discriminator"):
        a, b = (weights(f"{folder}/checkpoint-3", name) for folder in ("one", "two"))
        assert max((a[key] - b[key]).abs().max().item() for key in a) < 2e-6


def test_two_processes_resume_bitwise(run_command, tmp_path):
    common = ("--checkpointing_steps", 2, "--gradient_accumulation_steps", 2)
    for name, steps in (("straight", (4,)), ("resumed", (2, 4))):
        for max_steps in steps:
            flags = ("--max_train_steps", max_steps, "--lambda_ot_decay_steps", 4, "--output_dir", name)
            resume = ("--resume_from_checkpoint", "latest") if max_steps != steps[0] else ()
            result = run_command(*flags, *common, *resume, launch=TWO_PROCESSES, timeout=400)
            assert result.returncode == 0, result.stderr
    assert_same_folder_weights(tmp_path / "straight" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    files = {p.name for p in (tmp_path / "resumed" / "checkpoint-4").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= files


def test_broken_images_of_every_rank_are_named_and_counted(run_command, tmp_path):
    """One broken image in a batch of both ranks that covers the whole data set; workers read it."""
    for i in range(16):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8))
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    broken = tmp_path / "images" / "a" / "4.png"
    broken.write_bytes(broken.read_bytes()[:100])
    flags = ("--train_data_dir", tmp_path / "images", "--resolution", 16, "--output_dir", "out")
    result = run_command(*flags, "--dataloader_num_workers", 1, launch=TWO_PROCESSES, timeout=400)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "Skipped a broken image" in line]
    counted = read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["broken_images"]
    assert len(lines) == counted == 2 and all(str(broken) in line for line in lines)
