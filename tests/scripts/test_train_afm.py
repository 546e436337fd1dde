"""The script as diffusers' examples are tested: run, checkpoint, resume, rotation, EMA; and invariances."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    TINY_FLAGS,
    assert_close_weights,
    assert_same_folder_weights,
    weights,
    without_rates,
)
from PIL import Image

from adversarial_flow import AdversarialFlowPipeline
from adversarial_flow.utils.checkpointing import read_checkpoint
from adversarial_flow.utils.metrics import read_metrics


@pytest.fixture
def image_folder(tmp_path):
    """Twelve 20x16 images of two classes."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    return str(tmp_path / "images")


def test_run_leaves_everything(run, tmp_path):
    run("--checkpointing_steps", 2, "--validation_steps", 2, "--report_to", "tensorboard")
    folder = tmp_path / "afm-digits"
    for name in ("model_index.json", "samples.png", "curves.png", "results.json", "metrics.jsonl", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert list((folder / "logs").rglob("events.out*"))
    pipeline = AdversarialFlowPipeline.from_pretrained(folder)
    assert pipeline(["7", 3]).images[0].size == (8, 8)
    row = read_metrics(folder / "metrics.jsonl")[0]
    for key in (
        "discriminator_loss generator_loss optimal_transport_loss logits_real logits_fake discriminator_grad_norm "
        "generator_grad_norm adversarial_grad_norm optimal_transport_grad_norm samples_per_second lambda_ot"
    ).split():
        assert math.isfinite(row[key]), key
    assert "accelerate launch" in (folder / "README.md").read_text()
    assert not list(folder.glob("tmp-*"))


def test_the_real_evaluator_scores_the_samples(train_afm, run, monkeypatch, tmp_path):
    from adversarial_flow.utils.evaluation import SampleEvaluator

    monkeypatch.setattr(train_afm, "SampleEvaluator", SampleEvaluator)
    run("--max_train_steps", 2, "--validation_steps", 1)
    results = json.loads((tmp_path / "afm-digits" / "results.json").read_text())
    assert 0 <= results["metrics"]["class_accuracy"] <= 1 and results["num_images"] == 5000
    assert results["metrics"]["ratio"] > 1 and "not an Inception FID" in results["note"].replace("\n", " ")


@pytest.mark.parametrize(
    "flags",
    [
        ("--num_steps", 4),
        ("--num_steps", "any"),
        ("--repeats", 2),
        ("--ttur", 2),
        ("--prediction_type", "velocity"),
        ("--augmentation_probability", 0.5, "--augmentation_probability_end", 0.0),
        ("--mixed_precision", "bf16", "--gradient_checkpointing", "--max_grad_norm", 5.0),
        ("--mixed_precision", "bf16", "--model_config_name_or_path", "QK_NORM"),
        ("--lr_scheduler", "cosine", "--lr_warmup_steps", 1, "--gp_batch_ratio", 0.1),
    ],
)
def test_variants_train_and_sample(run, tmp_path, flags):
    (tmp_path / "QK_NORM").write_text(json.dumps({**TINY, "qk_norm": True}))
    run(*flags)
    pipeline = AdversarialFlowPipeline.from_pretrained(tmp_path / "afm-digits")
    assert len(pipeline([0, 1]).images) == 2
    expected = {"--num_steps": None if flags[1] == "any" else flags[1]}.get(flags[0], 1)
    assert pipeline.config.num_steps == expected
    rows = read_metrics(tmp_path / "afm-digits" / "metrics.jsonl")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["skipped_updates"] == 0


@pytest.mark.parametrize("extra", [(), ("--num_steps", "any", "--augmentation_probability", 0.5)])
def test_accumulation_equals_the_larger_batch(run, extra):
    """b x A = (b A) x 1 for both networks: batches, noise, penalties and gradient normalisation all agree."""
    common = ("--adam_epsilon", 1e-3, "--lambda_gp", 1.0, *extra)
    run("--train_batch_size", 16, "--output_dir", "whole", *common)
    run("--train_batch_size", 4, "--gradient_accumulation_steps", 4, "--output_dir", "parts", *common)
    assert_close_weights("whole", "parts", atol=2e-6)
    whole, parts = (read_metrics(f"{name}/metrics.jsonl") for name in ("whole", "parts"))
    for a, b in zip(whole, parts):
        for key in ("discriminator_loss", "generator_loss", "r1_penalty", "adversarial_grad_norm", "logits_fake"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


def test_learning_rate_counts_updates_of_its_network(run, tmp_path):
    run("--ttur", 3, "--lr_scheduler", "linear", "--learning_rate", 0.1, "--lr_warmup_steps", 0)
    rows = read_metrics(tmp_path / "afm-digits" / "metrics.jsonl")
    assert [row["learning_rate"] for row in rows[:4]] == pytest.approx([0.075, 0.05, 0.025, 0.0])
    assert [row["discriminator_learning_rate"] for row in rows[:4]] == pytest.approx([0.075, 0.05, 0.025, 0.0])


def test_discriminator_grad_norm_is_that_of_its_trained_parameters(train_afm, run, monkeypatch, tmp_path):
    """Frozen positions must neither get gradients nor enter the norm, and no gradient survives its update."""
    norms, update = [], train_afm.discriminator_update

    def spy(accelerator, transformer, discriminator, optimizer, *args):
        assert all(p.grad is None for p in discriminator.parameters())
        optimizer.zero_grad = lambda: None
        metrics = update(accelerator, transformer, discriminator, optimizer, *args)
        assert discriminator.pos_embed.grad is None and not discriminator.pos_embed.requires_grad
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([p.grad.norm() for p in trained]).norm().item())
        del optimizer.zero_grad
        optimizer.zero_grad()
        return metrics

    monkeypatch.setattr(train_afm, "discriminator_update", spy)
    run()
    rows = read_metrics(tmp_path / "afm-digits" / "metrics.jsonl")
    assert [row["discriminator_grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)


def test_repeats_divide_the_generators_rate(run, tmp_path):
    run("--repeats", 2, "--learning_rate", 1e-3)
    row = read_metrics(tmp_path / "afm-digits" / "metrics.jsonl")[0]
    assert row["learning_rate"] == pytest.approx(5e-4) and row["discriminator_learning_rate"] == pytest.approx(1e-3)


def test_ema_is_the_average_of_the_generators_weights_alone(run, tmp_path):
    """Constant decay, from the weights after the first generator update on; D's updates do not count."""
    run("--checkpointing_steps", 1, "--checkpoints_total_limit", 4, "--ema_decay", 0.8, "--ttur", 2)
    folder = tmp_path / "afm-digits"
    average = weights(folder / "checkpoint-1")
    for step in (2, 3, 4):
        current = weights(folder / f"checkpoint-{step}")
        average = {key: 0.8 * average[key] + 0.2 * current[key] for key in average}
    saved = weights(folder / "checkpoint-4", "transformer_ema")
    assert all(torch.allclose(saved[key], average[key], atol=1e-6) for key in saved)
    final = weights(folder)
    assert all(torch.equal(final[key], saved[key]) for key in final)
    assert any(not torch.equal(final[key], weights(folder / "checkpoint-4")[key]) for key in final)


@pytest.mark.parametrize("extra", [(), ("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--ttur", 2)])
def test_resuming_is_bitwise(run, log_text, extra):
    common = ("--max_train_steps", 6, "--checkpointing_steps", 2, "--checkpoints_total_limit", 3, *extra)
    run("--output_dir", "straight", *common)
    run("--output_dir", "resumed", *common)
    for name in ("checkpoint-6", "checkpoint-4"):
        subprocess.run(["rm", "-r", f"resumed/{name}"], check=True)
    first = without_rates("resumed/metrics.jsonl")
    run("--output_dir", "resumed", "--resume_from_checkpoint", "latest", *common)
    assert "Resuming from resumed/checkpoint-2 at step 2" in log_text()
    assert_same_folder_weights("straight/checkpoint-6", "resumed/checkpoint-6")
    assert first == without_rates("resumed/metrics.jsonl")
    for name in ("optimizer.bin", "optimizer_1.bin", "custom_checkpoint_2.pkl"):
        a, b = (torch.load(f"{f}/checkpoint-6/{name}", weights_only=False) for f in ("straight", "resumed"))
        assert_same(a, b)


def assert_same(a, b) -> None:
    """Bitwise equality of nested state dicts."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def test_flags_go_before_the_checkpoint_on_resuming(run, tmp_path):
    """What a user lowers after a divergence is lowered: rates, betas, decay."""
    run("--max_train_steps", 2, "--output_dir", "run", "--lr_scheduler", "linear")
    changed = {"learning_rate": 2e-5, "discriminator_learning_rate": 3e-5, "adam_beta2": 0.5, "ema_decay": 0.25}
    flags = [part for name, value in changed.items() for part in (f"--{name}", value)]
    run("--output_dir", "run", "--lr_scheduler", "linear", "--resume_from_checkpoint", "latest", *flags)
    rows = read_metrics("run/metrics.jsonl")
    assert [row["learning_rate"] for row in rows[2:]] == pytest.approx([2e-5 / 4, 0.0])
    assert [row["discriminator_learning_rate"] for row in rows[2:]] == pytest.approx([3e-5 / 4, 0.0])
    for name in ("optimizer.bin", "optimizer_1.bin"):
        group = torch.load(f"run/checkpoint-4/{name}", weights_only=False)["param_groups"][0]
        assert group["betas"] == (0.0, 0.5)
    assert json.loads(Path("run/checkpoint-4/transformer_ema/config.json").read_text())["decay"] == 0.25


def test_a_damaged_newest_checkpoint_never_costs_the_last_good_one(run, tmp_path, monkeypatch):
    """The damaged one has the higher number; rotation with a limit of one, and then the disk fails."""
    run("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    folder = tmp_path / "afm-digits"
    (folder / "checkpoint-4" / "optimizer.bin").write_bytes(b"")

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.save_state", fail)
    flags = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="checkpoint 4 could not be written .* resume from checkpoint-3"):
        run("--max_train_steps", 6, *flags)
    assert read_checkpoint(folder / "checkpoint-3")["step"] == 3


def test_penalties_of_uneven_micro_batches_add_up(run):
    """Of 6 samples 3 are penalised, 1 in the first micro-batch of 3 and 2 in the second."""
    common = ("--gp_batch_ratio", 0.5, "--adam_epsilon", 1e-3, "--learning_rate", 1e-2, "--lambda_gp", 1.0)
    run("--train_batch_size", 6, "--output_dir", "whole", *common)
    run("--train_batch_size", 3, "--gradient_accumulation_steps", 2, "--output_dir", "parts", *common)
    whole, parts = (read_metrics(f"{name}/metrics.jsonl") for name in ("whole", "parts"))
    for key in ("r1_penalty", "r2_penalty"):
        assert whole[1][key] > 1e-4 and parts[1][key] == pytest.approx(whole[1][key], rel=0.02), key


def test_the_newest_checkpoint_may_be_a_link(run, tmp_path):
    run("--checkpointing_steps", 2)
    folder = tmp_path / "afm-digits"
    (folder / "checkpoint-4").rename(tmp_path / "far")
    (folder / "checkpoint-4").symlink_to(tmp_path / "far")
    run("--resume_from_checkpoint", "latest", "--max_train_steps", 5, "--checkpoints_total_limit", 1)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-5"]
    assert read_checkpoint(tmp_path / "far")["step"] == 4 and not (folder / "checkpoint-4").is_symlink()


def test_the_log_survives_a_damaged_line_and_a_full_disk(run, tmp_path, monkeypatch, log_text):
    run("--checkpointing_steps", 2)
    path = tmp_path / "afm-digits" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]) + "\n")
    flags = ("--resume_from_checkpoint", "latest", "--max_train_steps", 5)
    with monkeypatch.context() as context:
        context.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(ValueError, match="could not be written"):
            run(*flags)
    assert "metrics.jsonl failed (No space left" in log_text()
    run(*flags)
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4, 5]


@pytest.mark.parametrize("flags", [("--train_batch_size", 3), ("--gp_batch_ratio", 1e-9)])
def test_penalties_look_at_one_sample_at_least(run, tmp_path, flags):
    run(*flags)
    rows = read_metrics(tmp_path / "afm-digits" / "metrics.jsonl")
    assert all(row["r1_penalty"] > 0 and row["r2_penalty"] > 0 for row in rows[1:])  # blocks start as identities


def test_rotation_keeps_the_newest(run, tmp_path):
    run("--max_train_steps", 6, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    names = {p.name for p in (tmp_path / "afm-digits").glob("checkpoint-*")}
    assert names == {"checkpoint-5", "checkpoint-6"}


def test_truncated_checkpoint_falls_back_and_says_so(run, tmp_path, log_text):
    run("--checkpointing_steps", 2)
    damaged = tmp_path / "afm-digits" / "checkpoint-4" / "discriminator" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    run("--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    assert "checkpoint-4" in log_text() and "truncated" in log_text()
    assert "Resuming from afm-digits/checkpoint-2" in log_text()
    assert (tmp_path / "afm-digits" / "checkpoint-5").is_dir()


def test_resuming_latest_without_checkpoint_starts_anew(run, tmp_path, log_text):
    run("--resume_from_checkpoint", "latest")
    assert "starting a new run" in log_text() and (tmp_path / "afm-digits" / "model_index.json").exists()


@pytest.mark.parametrize("flags", [(), ("--random_flip",), ("--channels", 1)])
def test_image_folder(run, image_folder, tmp_path, flags):
    run("--train_data_dir", image_folder, "--resolution", 16, "--output_dir", "out", *flags)
    pipeline = AdversarialFlowPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.labels == {"cat": 0, "dog": 1}
    assert pipeline("dog").images[0].size == (16, 16)
    assert pipeline.transformer.config.in_channels == (1 if flags == ("--channels", 1) else 3)


def test_names_of_files_and_folders_mean_no_splits(run, tmp_path):
    """`imagefolder` would take "test" in a name for another split, and drop or refuse what is there."""
    for label in ("cat", "test", "train"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / "images" / label / f"test_{i}.png")
    run("--train_data_dir", tmp_path / "images", "--resolution", 8, "--output_dir", "out")
    assert AdversarialFlowPipeline.from_pretrained(tmp_path / "out").labels == {"cat": 0, "test": 1, "train": 2}
    folder = tmp_path / "images" / "cat"
    for i in range(4):
        (folder / f"test_{i}.png").rename(folder / f"{i % 2 * 'train'}{i}.png")
    run("--train_data_dir", folder, "--resolution", 8, "--output_dir", "flat", "--train_batch_size", 4)


def test_unlabelled_images(run, image_folder, tmp_path):
    run("--train_data_dir", f"{image_folder}/cat", "--resolution", 16, "--output_dir", "out", "--train_batch_size", 4)
    pipeline = AdversarialFlowPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.transformer.config.num_classes is None and len(pipeline(batch_size=2).images) == 2


def test_dataset_from_disk_with_workers(run, tmp_path):
    import datasets

    images = [Image.fromarray(np.full((8, 8), 20 * i, np.uint8)) for i in range(10)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    rows = {"picture": images, "kind": ["b", "a"] * 5}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    run(
        *("--dataset_name", tmp_path / "data", "--image_column", "picture", "--label_column", "kind"),
        *("--resolution", 8, "--channels", 1, "--output_dir", "out", "--dataloader_num_workers", 1),
    )
    assert AdversarialFlowPipeline.from_pretrained(tmp_path / "out").labels == {"a": 0, "b": 1}


def test_latent_space(run, image_folder, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    vae.save_pretrained(tmp_path / "vae")
    run("--train_data_dir", image_folder, "--resolution", 16, "--vae", tmp_path / "vae", "--output_dir", "out")
    pipeline = AdversarialFlowPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.transformer.config.sample_size, pipeline.transformer.config.in_channels) == (8, 4)
    assert pipeline("cat").images[0].size == (16, 16)


def test_broken_image_is_skipped_and_named(run, image_folder, log_text):
    path = Path(image_folder) / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:100])
    run("--train_data_dir", image_folder, "--resolution", 16, "--output_dir", "out")
    lines = [line for line in log_text().splitlines() if "Skipped a broken image" in line]
    assert len(lines) == 1 and str(path) in lines[0]
    assert read_metrics("out/metrics.jsonl")[-1]["broken_images"] == 1


def test_grey_images_are_converted_and_it_is_said_once(run, image_folder, log_text):
    for path in Path(image_folder).rglob("*.png"):
        Image.open(path).convert("L").save(path)
    run("--train_data_dir", image_folder, "--resolution", 16, "--output_dir", "out")
    assert log_text().count("they are converted") == 1


def test_compiled_generator_gives_the_same_updates(run):
    run("--output_dir", "eager", "--max_train_steps", 2, "--adam_epsilon", 1e-3)
    torch._dynamo.utils.counters.clear()
    run("--output_dir", "compiled", "--max_train_steps", 2, "--adam_epsilon", 1e-3, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert_close_weights("eager", "compiled", atol=1e-5)


def test_dry_run_prints_and_writes_nothing(run, tmp_path, capsys):
    run(
        "--dry_run", "--model_config_name_or_path", ROOT / "configs" / "models" / "xl_2.json", "--train_batch_size", 64
    )
    printed = capsys.readouterr().out
    # The published XL/2 (32x32x4, 1,000 classes) on 8x8x1 and 10 classes; weights, gradients, 2 moments, G's average
    generator, discriminator = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", printed))
    states = 4 * (5 * generator + 4 * discriminator) / 2**30
    fewer = 1152 * (240 + 12 + 12 + 990) + 12  # positions, channels in and out, classes
    assert generator == 673_485_712 - fewer and f"EMA, VAE {states:.2f}," in printed
    assert "Updates        4 of G, 1 of D for each; global batch 64 = 64 x 1 micro-steps x 1 processes" in printed
    assert not (tmp_path / "afm-digits").exists()


def test_non_finite_updates_are_skipped_counted_and_end_the_run(train_afm, run, tmp_path, monkeypatch):
    """The first NaN is skipped without a trace in the weights; three in a row end the run."""
    original, calls = train_afm.discriminator_loss, []

    def sometimes_nan(discriminator, *args, **kwargs):
        loss, metrics = original(discriminator, *args, **kwargs)
        calls.append(None)
        return (loss * math.nan if len(calls) in nan_calls else loss), metrics

    monkeypatch.setattr(train_afm, "discriminator_loss", sometimes_nan)
    nan_calls = {3}
    run("--checkpointing_steps", 1, "--checkpoints_total_limit", 4, "--max_skipped_updates", 3)
    folder = tmp_path / "afm-digits"
    a, b = weights(folder / "checkpoint-2", "discriminator"), weights(folder / "checkpoint-3", "discriminator")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert read_metrics(folder / "metrics.jsonl")[-1]["skipped_updates"] == 1

    calls.clear()
    nan_calls = set(range(3, 100))
    before = {p: p.stat().st_mtime for p in folder.rglob("checkpoint-*")}
    with pytest.raises(train_afm.InputError, match="3 discriminator updates in a row"):
        run("--max_train_steps", 50, "--resume_from_checkpoint", "latest", "--max_skipped_updates", 3)
    assert {p: p.stat().st_mtime for p in folder.rglob("checkpoint-*")} == before


def test_non_finite_generator_updates_end_the_run_too(train_afm, run, monkeypatch):
    """A generator whose own backward is never finite, behind a finite adversarial gradient."""
    monkeypatch.setattr(train_afm, "optimal_transport_loss", lambda *args: args[0].sum() * math.inf)
    with pytest.raises(train_afm.InputError, match="3 generator updates in a row"):
        run("--max_train_steps", 50, "--max_skipped_updates", 3)


def test_failing_tracker_and_validation_do_not_end_the_run(train_afm, run, tmp_path, monkeypatch, log_text):
    import adversarial_flow.utils.results as results

    def fail(*args, **kwargs):
        raise RuntimeError("disk of the tracker is full")

    monkeypatch.setattr("accelerate.Accelerator.log", fail)
    monkeypatch.setattr(results, "sample_grid", fail)
    run("--validation_steps", 2, "--report_to", "tensorboard")
    assert log_text().count("The tracker failed") == 1 and "The validation at step 2 failed" in log_text()
    assert (tmp_path / "afm-digits" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert len(read_metrics(tmp_path / "afm-digits" / "metrics.jsonl")) == 4


def test_failed_push_costs_nothing_and_names_the_command(run, tmp_path, log_text):
    run("--push_to_hub", "--hub_model_id", "someone/model")  # HF_HUB_OFFLINE=1: the upload can only fail
    assert "The upload to someone/model failed" in log_text() and "hf upload someone/model afm-digits" in log_text()
    assert (tmp_path / "afm-digits" / "model_index.json").exists()


def test_push_uploads_the_final_folder(run, monkeypatch, tmp_path):
    import adversarial_flow.utils.hub as hub

    uploads = []
    monkeypatch.setattr(hub, "create_repo", lambda name, **kwargs: type("Repo", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(hub, "upload_folder", lambda **kwargs: uploads.append(kwargs))
    monkeypatch.setattr(hub, "model_info", lambda name, **kwargs: type("Info", (), {"private": True}))
    with pytest.raises(SystemExit):  # abbreviations would not be found, and the model card would show the token
        run("--hub_tok", "secret")
    flags = ["--push_to_hub", "--hub_private_repo", "--hub_token", "secret"]
    monkeypatch.setattr(sys, "argv", ["train_afm.py", *flags, "--hub_token=secret", "--seed", "0"])
    run(*flags)
    assert uploads[0]["repo_id"] == "me/afm-digits" and "README.md" in uploads[0]["allow_patterns"]
    written = [p for p in (tmp_path / "afm-digits").rglob("*") if p.suffix in (".md", ".json", ".jsonl")]
    assert written and all("secret" not in p.read_text() for p in written)
    assert "train_afm.py --push_to_hub --hub_private_repo --seed 0" in (tmp_path / "afm-digits/README.md").read_text()


# --------------------------------------------------------------------------------------------------- other processes


def start(tmp_path, tiny_config, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_afm.py"), "--model_config_name_or_path", tiny_config, *TINY_FLAGS]
    return subprocess.Popen(
        [*command, *map(str, flags)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(path: Path, process, timeout: float = 120) -> None:
    end = time.time() + timeout
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.stdout.read().decode()
        time.sleep(0.02)


def test_killed_at_a_random_moment_and_resumed_is_bitwise(run_command, tmp_path, tiny_config):
    """All three runs are processes of their own, in the same environment, as they would be for a user."""
    flags = ("--max_train_steps", 60, "--checkpointing_steps", 1, "--checkpoints_total_limit", 3)
    assert run_command(*flags, "--output_dir", "straight").returncode == 0
    process = start(tmp_path, tiny_config, *flags, "--output_dir", "killed")
    wait_for(tmp_path / "killed" / "checkpoint-2", process)
    time.sleep(random.uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model_index.json").exists(), "the run ended before it was killed"
    result = run_command(*flags, "--output_dir", "killed", "--resume_from_checkpoint", "latest")
    assert "Resuming from killed/checkpoint-" in result.stderr
    assert_same_folder_weights(tmp_path / "straight" / "checkpoint-60", tmp_path / "killed" / "checkpoint-60")
    assert not list((tmp_path / "killed").glob("tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
def test_interruption_saves_and_exits(tmp_path, tiny_config, number, workers):
    """Schedulers and terminals signal the whole process group, and with it the workers."""
    flags = ("--max_train_steps", 100_000, "--checkpointing_steps", 2, "--dataloader_num_workers", workers)
    process = start(tmp_path, tiny_config, *flags)
    wait_for(tmp_path / "afm-digits" / "checkpoint-2", process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + number and "Interrupted at step" in output and "Traceback" not in output
    folder = tmp_path / "afm-digits"
    step = max(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))
    assert f"Interrupted at step {step}" in output
    assert AdversarialFlowPipeline.from_pretrained(folder)(0).images


def test_the_readme_line_of_one_process(run_command, tmp_path):
    result = run_command("--max_train_steps", 2, launch=())
    assert result.returncode == 0, result.stderr
    assert "What to run next" in result.stdout and (tmp_path / "afm-digits" / "samples.png").exists()


def test_full_disk_while_saving(tmp_path, tiny_config):
    """A limit on the file size stands in for a full disk: the run ends in one line and checkpoint-2 stays whole."""
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import adversarial_flow.utils.checkpointing as c; save = c.save_checkpoint\n"
        "def limited(accelerator, folder, step, *args):\n"
        "    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "    return save(accelerator, folder, step, *args)\n"
        f"c.save_checkpoint = limited; sys.argv[0] = {str(ROOT / 'train_afm.py')!r}\n"
        f"runpy.run_path({str(ROOT / 'train_afm.py')!r}, run_name='__main__')"
    )
    flags = ["--model_config_name_or_path", tiny_config, *TINY_FLAGS, "--checkpointing_steps", "2"]
    result = subprocess.run(
        [sys.executable, "-c", code, *flags, "--max_train_steps", "8"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "checkpoint 4 could not be written" in result.stderr and "resume from checkpoint-2" in result.stderr
    folder = tmp_path / "afm-digits"
    assert [p.name for p in folder.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert read_checkpoint(folder / "checkpoint-2")["step"] == 2
