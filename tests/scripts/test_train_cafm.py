"""Flow matching and its continuous adversarial post-training: runs, exact resuming, invariances, bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TWO_PROCESSES,
    assert_close_weights,
    assert_fails,
    assert_same_folder_weights,
    weights,
    without_rates,
)
from PIL import Image

from adversarial_flow import AdversarialFlowDiscriminator, AdversarialFlowPipeline
from adversarial_flow.utils.evaluation import SampleEvaluator
from adversarial_flow.utils.metrics import read_metrics


# ----------------------------------------------------------------------------------------------------- flow matching


def test_flow_matching_leaves_everything_and_learns(run_fm, tmp_path):
    common = ("--checkpointing_steps", 60, "--validation_steps", 60, "--train_batch_size", 32)
    run_fm("--learning_rate", 1e-2, "--max_train_steps", 120, *common)
    folder = tmp_path / "fm-digits"
    for name in ("model_index.json", "samples.png", "curves.png", "results.json", "metrics.jsonl", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    losses = [row["flow_matching_loss"] for row in read_metrics(folder / "metrics.jsonl") if "learning_rate" in row]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    pipeline = AdversarialFlowPipeline.from_pretrained(folder)
    assert pipeline.default_num_inference_steps == 50 and pipeline.transformer.config.use_null_class
    assert len(pipeline([1, 2], 4, guidance_scale=2.0, sampler="heun").images) == 2
    card = (folder / "README.md").read_text()
    assert "flow-matching model" in card and "train_fm.py" in card


def test_flow_matching_resumes_bitwise_and_accumulates_exactly(run_fm):
    common = ("--checkpointing_steps", 2, "--checkpoints_total_limit", 3, "--adam_epsilon", 1e-3)
    run_fm("--output_dir", "straight", "--train_batch_size", 16, *common)
    run_fm("--output_dir", "resumed", "--train_batch_size", 16, *common)
    Path("resumed/checkpoint-4").rename("other-checkpoint-4")
    run_fm("--output_dir", "resumed", "--train_batch_size", 16, "--resume_from_checkpoint", "latest", *common)
    assert_same_folder_weights("straight/checkpoint-4", "resumed/checkpoint-4", ("transformer", "transformer_ema"))
    assert without_rates("straight/metrics.jsonl") == without_rates("resumed/metrics.jsonl")
    run_fm("--output_dir", "parts", "--train_batch_size", 4, "--gradient_accumulation_steps", 4, *common)
    assert_close_weights("straight", "parts", 2e-6, ("transformer",))


def test_labels_are_dropped(run_fm, train_fm, monkeypatch):
    seen = []
    original = train_fm.predict_velocity
    monkeypatch.setattr(
        train_fm, "predict_velocity", lambda model, batch: (seen.append(batch.class_labels), original(model, batch))[1]
    )
    run_fm("--label_dropout", 0.25, "--train_batch_size", 256, "--output_dir", "dropped")
    share = (torch.cat(seen) == 10).double().mean().item()
    assert share == pytest.approx(0.25, abs=0.05)
    seen.clear()
    run_fm("--label_dropout", 0, "--output_dir", "kept")
    assert torch.cat(seen).max() < 10
    config = json.loads(Path("kept/transformer/config.json").read_text())
    assert not config["use_null_class"]


# -------------------------------------------------------------------------------------------------------------- CAFM


def test_run_leaves_everything(run_cafm, tmp_path):
    run_cafm("--checkpointing_steps", 4, "--validation_steps", 5)
    folder = tmp_path / "cafm-digits"
    for name in ("model_index.json", "samples.png", "curves.png", "results.json", "metrics.jsonl", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert len(AdversarialFlowPipeline.from_pretrained(folder)([1, 2], 4).images) == 2
    discriminator = AdversarialFlowDiscriminator.from_pretrained(folder / "discriminator")
    assert discriminator.config.norm_type == "rms_norm"
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "learning_rate" in row]
    # W = 2, N = 2: D D G D D G D D
    assert ["generator_loss" in row for row in rows] == [False, False, True, False, False, True, False, False]
    assert rows[-1]["generator_updates"] == 2 and rows[-1]["skipped_updates"] == 0
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_the_discriminator_alone_is_trained_in_the_warmup(run_cafm):
    run_cafm("--checkpointing_steps", 1, "--checkpoints_total_limit", 9)
    folders = [f"cafm-digits/checkpoint-{step}" for step in range(1, 9)]
    start = weights("start")
    for folder, trained in zip(folders[:3], (False, False, True)):
        current = weights(folder)
        assert any(not torch.equal(current[key], start[key]) for key in start) == trained
    for first, second, of_g in zip(folders, folders[1:], (False, True, False, False, True, False, False)):
        for name, changes in (("transformer", of_g), ("discriminator", not of_g)):
            a, b = weights(first, name), weights(second, name)
            assert any(not torch.equal(a[key], b[key]) for key in a) == changes, (second, name)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_resuming_is_bitwise_also_inside_a_cycle(run_cafm, k):
    common = ("--checkpointing_steps", k, "--checkpoints_total_limit", 9, "--gradient_accumulation_steps", 2)
    run_cafm("--output_dir", "straight", *common)
    run_cafm("--output_dir", "resumed", *common)
    for folder in Path("resumed").glob("checkpoint-*"):
        if folder.name != f"checkpoint-{k}":
            folder.rename(f"other-{folder.name}")
    run_cafm("--output_dir", "resumed", "--resume_from_checkpoint", "latest", *common)
    assert_same_folder_weights("straight/checkpoint-8", "resumed/checkpoint-8")
    assert without_rates("straight/metrics.jsonl") == without_rates("resumed/metrics.jsonl")


@pytest.mark.parametrize(
    "flags", [(), ("--lambda_ot", 0.1, "--lambda_ot_end", 0.0, "--time_sampling", "logit_normal")]
)
def test_accumulation_equals_the_larger_batch(run_cafm, flags):
    common = ("--adam_epsilon", 1e-3, "--learning_rate", 1e-3, *flags)
    run_cafm("--train_batch_size", 16, "--output_dir", "whole", *common)
    run_cafm("--train_batch_size", 4, "--gradient_accumulation_steps", 4, "--output_dir", "parts", *common)
    assert_close_weights("whole", "parts", 5e-6)


def test_two_processes_equal_one_with_the_doubled_batch(run_cafm, run_command, tmp_path):
    common = ("--adam_epsilon", 1e-3, "--learning_rate", 1e-3)
    common += ("--pretrained_model_name_or_path", "start", "--ttur", 2)
    common += ("--discriminator_warmup_steps", 2, "--max_train_steps", 6, "--control_learning_rates")
    flags = ("--train_batch_size", 8, "--output_dir", "two", *common)
    result = run_command(*flags, launch=TWO_PROCESSES, timeout=400, script="train_cafm.py")
    assert result.returncode == 0, result.stderr
    run_cafm("--train_batch_size", 16, "--output_dir", "one", *common)
    assert_close_weights("one", "two", 5e-6)


def test_the_other_derivatives_give_the_same_run(run_cafm):
    common = ("--adam_epsilon", 1e-3, "--learning_rate", 1e-3)
    run_cafm("--output_dir", "reverse", *common)
    run_cafm("--output_dir", "forward", "--derivative", "forward", *common)
    assert_close_weights("reverse", "forward", 1e-5)
    run_cafm("--output_dir", "finite", "--derivative", "finite", *common)
    start, exact, finite = (weights(folder) for folder in ("start", "reverse", "finite"))
    moved = max((start[key] - exact[key]).abs().max() for key in start)
    # An approximation: in float32 its J is a few per cent off, and Adam enlarges that in small gradients.
    assert moved > 1e-3 and max((finite[key] - exact[key]).abs().max() for key in start) < 0.5 * moved


def test_gradient_checkpointing_and_bf16(run_cafm):
    run_cafm("--output_dir", "plain")
    run_cafm("--output_dir", "checkpointed", "--gradient_checkpointing")
    assert_same_folder_weights("plain", "checkpointed", ("transformer", "discriminator"))
    run_cafm("--output_dir", "bf16", "--mixed_precision", "bf16")
    assert read_metrics("bf16/metrics.jsonl")[-1]["skipped_updates"] == 0


def test_auto_warmup_that_never_ends_is_said(run_cafm, log_text):
    run_cafm("--discriminator_warmup_steps", "auto", "--discriminator_warmup_signal", 50)
    assert "The generator was never updated" in log_text()


def test_discriminators_of_other_sizes(run_cafm, run_fm, tmp_path):
    sizes = {"patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    run_fm("--output_dir", "other", "--model_config_name_or_path", tmp_path / "sizes.json")
    for name in ("other", "sizes.json"):
        run_cafm("--output_dir", "out", "--overwrite_output_dir", "--discriminator_name_or_path", name)
        config = json.loads(Path("out/discriminator/config.json").read_text())
        assert config["patch_size"] == 2 and config["attention_head_dim"] == 12
    run_cafm("--output_dir", "again", "--discriminator_name_or_path", "out/discriminator", "--max_train_steps", 3)


JIT = {"_class_name": "JiTTransformer2DModel", "patch_size": 4, "num_layers": 2, "num_attention_heads": 2}
JIT |= {"attention_head_dim": 8, "bottleneck_dim": 4, "in_context_length": 2, "in_context_start": 1}


def test_jit(run_cafm, run_fm, tmp_path):
    """Flow matching and CAFM of a model that predicts x; its velocities near the data are clamped."""
    (tmp_path / "jit.json").write_text(json.dumps(JIT))
    flags = ("--model_config_name_or_path", tmp_path / "jit.json", "--time_sampling", "logit_normal")
    run_fm("--output_dir", "jit", *flags, "--learning_rate", 1e-2, "--max_train_steps", 40)
    start = ("--pretrained_model_name_or_path", "jit", "--adam_epsilon", 1e-3, "--learning_rate", 1e-3)
    run_cafm(*start, "--output_dir", "whole", "--train_batch_size", 16)
    run_cafm(*start, "--output_dir", "parts", "--train_batch_size", 4, "--gradient_accumulation_steps", 4)
    assert_close_weights("whole", "parts", 5e-6)
    pipeline = AdversarialFlowPipeline.from_pretrained("whole")
    assert type(pipeline.transformer).__name__ == "JiTTransformer2DModel"
    times = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, inputs, kwargs: times.append(float(kwargs["timestep"])), with_kwargs=True
    )
    assert pipeline([3], 4, sampler="heun", guidance_scale=2.0).images[0].size == (8, 8)
    assert times == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]  # the last step is Euler's


def test_velocities_of_a_model_that_predicts_x(run_fm, train_fm, tmp_path, monkeypatch):
    (tmp_path / "jit.json").write_text(json.dumps(JIT))
    seen, original = [], train_fm.predict_velocity
    monkeypatch.setattr(
        train_fm, "predict_velocity", lambda model, batch: (seen.append(batch), original(model, batch))[1]
    )
    run_fm("--model_config_name_or_path", tmp_path / "jit.json", "--train_batch_size", 256, "--max_train_steps", 1)
    (batch,) = seen
    t = batch.timestep[:, None, None, None]
    x = batch.hidden_states - t.clamp_min(0.05) * batch.velocity  # v = (x_t - x) / max(t, 0.05)
    assert x.abs().max() < 1 + 1e-4 and (t < 0.05).any()


def test_comparison_with_the_control(run_cafm, run_fm, train_cafm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_cafm, "SampleEvaluator", SampleEvaluator)
    run_cafm("--control_learning_rates", 1e-4, 1e-3)
    result = json.loads((tmp_path / "cafm-digits" / "comparison.json").read_text())
    assert set(result["table"]) == {"start", "CAFM", "control"} and result["images"] == 64
    assert set(result["control_distances_by_learning_rate"]) == {"0.0001", "0.001"}
    assert (tmp_path / "cafm-digits" / "comparison.png").exists()
    assert "flow matching, as many" in capsys.readouterr().out
    steps = [row["step"] for row in read_metrics(tmp_path / "cafm-digits" / "control" / "0.001" / "metrics.jsonl")]
    assert max(steps) == 8


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_flags(train_cafm, run_cafm):
    for message, *flags in (
        ("--discriminator_warmup_steps 8 is not shorter than --max_train_steps 8", "--discriminator_warmup_steps", 8),
        ("--ttur must be at least 1, not 0", "--ttur", 0),
        ("--lambda_cp must not be negative", "--lambda_cp", -1),
        (r"--label_dropout must be in \[0, 1\)", "--label_dropout", 1),
        ("--time_shift must be positive", "--time_shift", 0),
        ("--compile works with --derivative reverse", "--compile", "--derivative", "forward"),
        ("--derivative forward does not go with", "--derivative", "forward", "--gradient_checkpointing"),
        ("--derivative finite divides by", "--derivative", "finite", "--mixed_precision", "bf16"),
        ("--logit_mean must be a finite number", "--logit_mean", "nan"),
        ("--control_learning_rates must be positive", "--control_learning_rates", 0),
        ("no AdversarialFlowTransformer2DModel could be loaded", "--pretrained_model_name_or_path", "nowhere"),
        ("no AdversarialFlowTransformer2DModel could be loaded", "--discriminator_name_or_path", "nowhere"),
    ):
        assert_fails(message, run_cafm, *flags)
    assert not Path("cafm-digits").exists() or not any(Path("cafm-digits").iterdir())


def test_starting_models_that_do_not_fit(train_cafm, run_cafm, run_fm, run, tmp_path):
    run("--output_dir", "afm", "--max_train_steps", 1)
    start = "--pretrained_model_name_or_path"
    assert_fails("afm: this is not a flow-matching model .* train one with train_fm.py", run_cafm, start, "afm")
    run_fm("--output_dir", "kept", "--label_dropout", 0, "--max_train_steps", 1)
    assert_fails("kept has no null class, which --label_dropout 0.1 needs", run_cafm, start, "kept")
    run_cafm(start, "kept", "--label_dropout", 0, "--output_dir", "without")
    config = tmp_path / "kept" / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_layers": 3}))
    assert_fails(r"kept: its config and weights disagree \(missing transformer_blocks.2", run_cafm, start, "kept")


def test_starting_models_of_other_data(train_cafm, run_cafm, tmp_path):
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(tmp_path / "images" / label / f"{i}.png")
    flags = ("--train_data_dir", tmp_path / "images", "--output_dir", "out", "--resolution")
    assert_fails("start: its sample_size is 8, the data has 16: .* --vae", run_cafm, *flags, 16)
    assert_fails("start: its in_channels is 1, the data has 3", run_cafm, *flags, 8)
    run_cafm(*flags, 8, "--channels", 1)  # fewer classes than the model has are fine
    controls = ("--control_learning_rates", 1e-3)
    assert_fails("--control_learning_rates: .* pass --feature_extractor", run_cafm, *flags, 8, *controls)


def test_scores_of_other_data(train_fm, run_fm, tmp_path, monkeypatch):
    """MNIST's files by their path; the score is of these images."""
    monkeypatch.setattr(train_fm, "SampleEvaluator", SampleEvaluator)
    generator = np.random.default_rng(0)
    for name, array in (
        ("train-images-idx3-ubyte", generator.integers(0, 256, (60, 4, 4), np.uint8)),
        ("train-labels-idx1-ubyte", np.arange(60, dtype=np.uint8) % 2),
    ):
        content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        (tmp_path / name).write_bytes(content)
    run_fm("--train_data_dir", tmp_path, "--feature_extractor", "small_classifier", "--output_dir", "out")
    results = json.loads(Path("out/results.json").read_text())
    assert results["num_images"] == 1000 and results["reference"] == "60 training images"
    assert results["metrics"]["frechet_distance"] > 0
    assert_fails("--resolution 8: the images of .* are 4x4", run_fm, "--train_data_dir", tmp_path, "--resolution", 8)


def test_starting_models_in_the_output_folder(train_cafm, run_cafm, run_fm):
    before = {path: path.read_bytes() for path in Path("start").rglob("*") if path.is_file()}
    message = "--pretrained_model_name_or_path start lies in --output_dir"
    assert_fails(message, run_cafm, "--output_dir", "start", "--overwrite_output_dir")
    flags = ("--pretrained_model_name_or_path", "start", "--output_dir", "start", "--overwrite_output_dir")
    assert_fails(message, run_fm, *flags)
    assert before == {path: path.read_bytes() for path in Path("start").rglob("*") if path.is_file()}


def test_discriminators_that_do_not_fit(train_cafm, run_cafm, run):
    run("--output_dir", "afm", "--max_train_steps", 1)
    flag = "--discriminator_name_or_path"
    assert_fails("a discriminator without the time can't judge velocities", run_cafm, flag, "afm/discriminator")
    assert_fails("afm: this is not a flow-matching model", run_cafm, flag, "afm")


def test_dropout_is_for_training(run_fm, run_cafm, train_cafm, train_fm, tmp_path, monkeypatch):
    """Of a start that was loaded too; samples are drawn without it."""
    import adversarial_flow.utils.results as results

    (tmp_path / "jit.json").write_text(json.dumps(JIT | {"num_layers": 4, "dropout": 0.2}))
    run_fm("--output_dir", "jit", "--model_config_name_or_path", tmp_path / "jit.json")
    modes, sampled = [], []
    original, grid = train_cafm.predict_velocity, results.sample_grid
    keep = lambda model, batch: (modes.append(model.training), original(model, batch))[1]  # noqa: E731
    monkeypatch.setattr(train_cafm, "predict_velocity", keep)
    look = lambda pipeline, seed: (sampled.append(pipeline.transformer.training), grid(pipeline, seed))[1]  # noqa: E731
    monkeypatch.setattr(results, "sample_grid", look)
    start = ("--pretrained_model_name_or_path", "jit")
    run_cafm(*start, "--validation_steps", 3)
    assert all(modes) and len(modes) == 8 and len(sampled) == 3 and not any(sampled)
    run_cafm(*start, "--derivative", "forward", "--output_dir", "forward")
    assert_fails(
        "--derivative finite: .* set its dropout to 0",
        run_cafm,
        *start,
        "--derivative",
        "finite",
        "--output_dir",
        "x",
    )


def test_attention_that_can_not_be_differentiated_twice(train_cafm, run_cafm, monkeypatch):
    monkeypatch.setattr(
        "diffusers.models.attention_dispatch._AttentionBackendRegistry._active_backend", "_native_flash"
    )
    assert_fails("--derivative reverse: .*'_native_flash' can't be differentiated twice", run_cafm)
