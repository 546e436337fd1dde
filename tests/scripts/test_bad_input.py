"""Bad input: one clear error before training, nothing overwritten."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_fails
from PIL import Image


@pytest.fixture
def fails(run):
    """Asserts that `train_afm.py` with these flags ends with an `InputError` of one line that matches."""
    return lambda message, *flags: assert_fails(message, run, *flags)


def make_images(folder: Path, count: int = 10, size: tuple[int, int] = (16, 16), classes=("a", "b")) -> str:
    rng = np.random.default_rng(0)
    for label in classes:
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / label / f"{i}.png")
    return str(folder)


def test_missing_and_empty_folders(fails, tmp_path):
    fails("--train_data_dir nowhere: there is no such folder", "--train_data_dir", "nowhere")
    (tmp_path / "empty").mkdir()
    fails("--train_data_dir .*empty: no images could be loaded", "--train_data_dir", tmp_path / "empty")
    fails("--dataset_name no/where: no images could be loaded", "--dataset_name", "no/where")
    fails("exclude each other", "--dataset_name", "x", "--train_data_dir", "y")


def test_all_images_broken(fails, tmp_path):
    (tmp_path / "broken" / "a").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "broken" / "a" / f"{i}.png").write_bytes(b"not an image")
    fails("none of the images", "--train_data_dir", tmp_path / "broken")


def test_small_images(fails, tmp_path):
    folder = make_images(tmp_path / "data", size=(16, 12))
    fails("--resolution 16: .*png is only 12x16 pixels. Lower", "--train_data_dir", folder, "--resolution", 16)


def test_small_images_can_be_enlarged(run, tmp_path):
    folder = make_images(tmp_path / "data", size=(16, 12))
    run("--train_data_dir", folder, "--resolution", 16, "--allow_upscaling", "--output_dir", "out")
    assert (tmp_path / "out" / "model_index.json").exists()


def save_dataset(folder: Path, features: dict, rows: dict) -> Path:
    import datasets

    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(folder)
    return folder


def test_data_sets_with_holes(fails, run, tmp_path, log_text):
    """Null images, null labels, no rows, columns of other kinds, and images that are bombs."""
    import datasets

    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    common = ("--resolution", 8, "--output_dir", "out")
    empty = save_dataset(tmp_path / "empty", kinds, {"image": [], "label": []})
    fails("empty: the data set is empty", "--dataset_name", empty, *common)
    null_label = save_dataset(tmp_path / "label", kinds, {"image": [picture] * 10, "label": [0] * 9 + [None]})
    fails("--label_column label: some images have no label", "--dataset_name", null_label, *common)
    whole = save_dataset(tmp_path / "whole", kinds, {"image": [picture] * 10, "label": [0] * 10})
    for flag, column, kind in (("--image_column", "label", "ClassLabel"), ("--label_column", "image", "Image")):
        fails(f"{flag} {column}: this column holds {kind}", "--dataset_name", whole, *common, flag, column)
    null_image = save_dataset(tmp_path / "image", kinds, {"image": [picture] * 11 + [None], "label": [0, 1] * 6})
    run("--dataset_name", null_image, *common)
    assert "row 11: the image is missing (null)" in log_text()


def test_data_sets_with_splits_and_far_labels(fails, run, tmp_path):
    import datasets

    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [picture] * 10, "label": list(range(10))}, features=features)
    far = rows.map(lambda row: {"label": 2_000_000 * row["label"]})
    rows.save_to_disk(tmp_path / "plain")
    far.save_to_disk(tmp_path / "far")
    datasets.DatasetDict({"small": rows}).save_to_disk(tmp_path / "splits")
    common = ("--resolution", 8, "--output_dir", "out", "--dataset_name")
    fails("10 different labels go up to 18000000; number the classes from 0 on", *common, tmp_path / "far")
    fails("--dataset_split tset: .* was saved without splits", *common, tmp_path / "plain", "--dataset_split", "tset")
    fails("--dataset_split tset: .* has no such split", *common, tmp_path / "splits", "--dataset_split", "tset")
    run(*common, tmp_path / "splits", "--dataset_split", "small")


def test_no_labels_for_a_model_with_classes(fails, tmp_path):
    make_images(tmp_path / "data", classes=("a",))
    (tmp_path / "classes.json").write_text(patch(tmp_path, 4).read_text().replace("{", '{"num_classes": 1000, '))
    flags = ("--train_data_dir", tmp_path / "data" / "a", "--resolution", 16)
    fails("the data has no labels and .* says 1000", *flags, "--model_config_name_or_path", tmp_path / "classes.json")


def test_bombs_are_broken_images(fails, tmp_path, monkeypatch):
    folder = make_images(tmp_path / "data")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    fails("none of the images", "--train_data_dir", folder, "--resolution", 16)


def test_an_error_in_a_worker_is_one_line(run_command, tmp_path):
    """Whole headers and no pixels: only the workers notice."""
    for path in Path(make_images(tmp_path / "data", size=(64, 64))).rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    flags = ("--train_data_dir", tmp_path / "data", "--resolution", 16, "--dataloader_num_workers", 1)
    result = run_command(*flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: 20 broken images, more than 10: clean the data set (see the log)."]


def test_columns(fails, tmp_path):
    folder = make_images(tmp_path / "data")
    common = ("--train_data_dir", folder, "--resolution", 16)
    fails(
        "--label_column kind: there is no such column. The columns are: image, label",
        *common,
        "--label_column",
        "kind",
    )
    fails("--image_column picture: there is no such column", *common, "--image_column", "picture")


def test_more_classes_than_the_model(fails, tmp_path):
    (tmp_path / "small.json").write_text(
        '{"patch_size": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "num_classes": 3}'
    )
    fails("10 classes and .*small.json says 3", "--model_config_name_or_path", tmp_path / "small.json")


def test_network_configs(fails, tmp_path):
    fails("`sample_size` .8. is not divisible by `patch_size` .3.", "--model_config_name_or_path", patch(tmp_path, 3))
    fails("no config could be read there", "--model_config_name_or_path", "nowhere.json")
    (tmp_path / "typo.json").write_text('{"patch_sise": 4}')
    fails("networks' config does not work", "--model_config_name_or_path", tmp_path / "typo.json")


def patch(tmp_path, size):
    path = tmp_path / "patch.json"
    path.write_text(f'{{"patch_size": {size}, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}}')
    return path


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many"])
def test_number_of_steps(run, capsys, value):
    with pytest.raises(SystemExit) as info:
        run(f"--num_steps={value}")
    assert info.value.code == 2 and "is not a number of steps: pass 1, 2, 3, ... or any" in capsys.readouterr().err


def test_three_steps_are_fine(run, tmp_path):
    run("--num_steps", 3, "--max_train_steps", 1)
    assert (tmp_path / "afm-digits" / "model_index.json").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--train_batch_size", 2000), r"a batch of 2000 .* is larger than the data set \(1797 images\)"),
        (("--train_batch_size", 0), "--train_batch_size must be at least 1"),
        (("--train_batch_size", 900, "--gradient_accumulation_steps", 2), "a batch of 1800"),
        (("--ema_decay", 1.0), r"--ema_decay must be in \[0, 1\)"),
        (("--repeats", 2, "--num_steps", 4), "--repeats makes deep one-step models"),
        (("--lambda_gp", -1), "--lambda_gp must not be negative"),
        (("--gp_batch_ratio", 0), "--gp_batch_ratio must be in"),
        (("--checkpoints_total_limit", 0), "--checkpoints_total_limit must be at least 1"),
        (("--resolution", 16), "the embedded digits are 8x8"),
        (("--mixed_precision", "fp16"), "--mixed_precision fp16: .* use bf16 or no"),
        (("--vae", "nowhere"), "--vae nowhere: no AutoencoderKL could be loaded"),
        (("--recipe", "nowhere.json"), "--recipe nowhere.json: can't be read"),
        (("--resume_from_checkpoint", "checkpoint-7"), "there is no such folder"),
        (("--seed", -1), "--seed must be between 0 and 4294967295, not -1"),
        (("--lr_scheduler", "polynomial", "--learning_rate", 1e-8), "--lr_scheduler polynomial and --learning_rate"),
        (("--learning_rate", -1), "--learning_rate must not be negative"),
        (("--discriminator_learning_rate", "inf"), "--discriminator_learning_rate must not be negative, not inf"),
        (("--adam_beta2", 1.0), r"--adam_beta2 must be in \[0, 1\)"),
        (("--dataloader_num_workers", -1), "--dataloader_num_workers must not be negative"),
        (("--augmentation_probability", 7), "--augmentation_probability must be between 0 and 1, not 7"),
        (("--lambda_ot_end", -1), "--lambda_ot_end must not be negative"),
        (("--lambda_gp_decay_steps", 0), "--lambda_gp_decay_steps must be at least 1"),
        (("--max_grad_norm", -1), "--max_grad_norm must be positive"),
    ],
)
def test_flags(fails, tmp_path, flags, message):
    fails(message, *flags)
    assert not list(tmp_path.glob("afm-digits/*"))


def test_json_that_is_not_an_object(fails, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    fails("--recipe .*list.json: can't be read as a JSON object", "--recipe", tmp_path / "list.json")
    fails("list.json: no config could be read", "--model_config_name_or_path", tmp_path / "list.json")
    fails("networks' config does not work", "--model_config_name_or_path", patch(tmp_path, 0))
    (tmp_path / "null.json").write_text('{"model_config_name_or_path": null, "lambda_to": 1}')
    fails("there is no flag --lambda_to", "--recipe", tmp_path / "null.json")


def test_precision_of_accelerate(fails, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    fails("accelerate is configured for fp8: pass --mixed_precision bf16 or no")


def test_missing_tracker(fails, monkeypatch):
    monkeypatch.setattr("adversarial_flow.utils.training.is_wandb_available", lambda: False)
    fails("--report_to wandb: wandb is not installed", "--report_to", "wandb")


def test_recipe_with_an_unknown_flag(fails, tmp_path):
    (tmp_path / "recipe.json").write_text('{"lambda_to": 0.1}')
    fails("there is no flag --lambda_to", "--recipe", tmp_path / "recipe.json")


@pytest.mark.parametrize(
    "variable,name", [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron-LM")]
)
def test_untested_distribution_is_refused(fails, monkeypatch, variable, name):
    """The variables are what `accelerate launch` sets for these kinds."""
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    fails(f"accelerate is configured for {name}: .* not tested", "--max_train_steps", 1)


def test_output_dir_of_another_run(fails, run, tmp_path):
    run()
    before = (tmp_path / "afm-digits" / "model_index.json").read_bytes()
    fails("afm-digits holds another run .* --resume_from_checkpoint latest, .* --overwrite_output_dir")
    assert (tmp_path / "afm-digits" / "model_index.json").read_bytes() == before
    (tmp_path / "afm-digits" / "notes.txt").write_text("mine")
    run("--overwrite_output_dir", "--num_steps", 2)
    run("--dry_run")  # writes nothing, and therefore takes a folder that holds a run
    assert b'"num_steps": 2' in (tmp_path / "afm-digits" / "model_index.json").read_bytes()
    assert (tmp_path / "afm-digits" / "notes.txt").read_text() == "mine"  # what no run wrote is never removed


def test_overwriting_removes_runs_only(fails, tmp_path):
    folder = tmp_path / "papers"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    fails("papers holds files that no training script", "--output_dir", folder, "--overwrite_output_dir")
    fails("papers holds other files and no run", "--output_dir", folder, "--resume_from_checkpoint", "latest")
    fails("papers holds another run or other files", "--output_dir", folder)
    assert (folder / "README.md").read_text() == "mine" and (folder / "logs").is_dir()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resuming_never_replaces_what_it_does_not_continue(fails, run, tmp_path):
    run("--checkpointing_steps", 2)
    run("--output_dir", "other", "--max_train_steps", 2)
    folder, resume = tmp_path / "afm-digits", "--resume_from_checkpoint"
    before = files_of(folder)
    fails("going on from there would replace checkpoint-4 in", resume, "checkpoint-2")
    fails("would replace checkpoint-2, checkpoint-4, model_index.json", resume, "other/checkpoint-2")
    assert files_of(folder) == before
    for path in folder.glob("checkpoint-*/optimizer.bin"):
        path.write_bytes(b"")
    damaged = files_of(folder)
    fails(
        "latest: .* has checkpoint-2, checkpoint-4, transformer, .* but no checkpoint that is whole", resume, "latest"
    )
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    fails("latest: .* has transformer, discriminator, but no checkpoint that is whole", resume, "latest")
    assert files_of(folder) == {path: data for path, data in damaged.items() if "checkpoint-" not in str(path)}
    run(resume, "other/checkpoint-2", "--overwrite_output_dir")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4"}


def test_checkpoint_of_another_number_of_steps(fails, run):
    run("--num_steps", 2, "--max_train_steps", 1)
    fails(
        r"its pipeline has another architecture \(num_steps 2 -> 4\)",
        *("--resume_from_checkpoint", "latest", "--num_steps", 4),
    )


def test_failing_input_with_overwrite_removes_nothing(fails, run, tmp_path):
    run()
    fails("a batch of 5000", "--overwrite_output_dir", "--train_batch_size", 5000)
    assert (tmp_path / "afm-digits" / "model_index.json").exists()
    assert (tmp_path / "afm-digits" / "checkpoint-4").is_dir()


def test_checkpoint_of_another_architecture(fails, run, tmp_path):
    run()
    fails(
        r"its transformer has another architecture \(num_layers 2 -> 1, .*\)",
        *("--resume_from_checkpoint", "latest", "--model_config_name_or_path", patch(tmp_path, 4)),
    )
    assert (tmp_path / "afm-digits" / "checkpoint-4" / "trainer_state.json").exists()


def test_damaged_named_checkpoint(fails, run, tmp_path):
    run()
    (tmp_path / "afm-digits" / "checkpoint-4" / "optimizer.bin").unlink()
    fails("optimizer.bin is missing or truncated", "--resume_from_checkpoint", "checkpoint-4")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; run the tests as an ordinary user")
def test_no_write_permission(fails, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    fails("can't be written .*Permission denied", "--output_dir", tmp_path / "locked" / "run")


def test_output_dir_that_can_not_be_made(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    fails("this is a file", "--output_dir", tmp_path / "file")
    fails("can't be written", "--output_dir", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_one_line_and_exit_code(run_command, tmp_path):
    result = run_command("--train_data_dir", "nowhere")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: --train_data_dir nowhere: there is no such folder."]
