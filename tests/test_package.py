"""The package's layout, its recipes, and the commands of the README."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import adversarial_flow


def test_public_names():
    for name in (
        "AdversarialFlowTransformer2DModel AdversarialFlowDiscriminator AdversarialFlowPipeline DirectionalDerivative "
        "JiTTransformer2DModel JiTDiscriminator AdversarialFlowClassifier"
    ).split():
        assert name in adversarial_flow.__all__ and hasattr(adversarial_flow, name)


def test_setup_lists_every_package_folder():
    """find_packages can't see mapped folders, so that setup.py's list is compared with what is there."""
    text = (ROOT / "setup.py").read_text()
    mapped = dict(re.findall(r'"(adversarial_flow[\w.]*)": "([\w/]+)"', text))
    listed = set(re.findall(r'"(adversarial_flow[\w.]*)"', text.split("packages=[")[1].split("]")[0]))
    folders = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.rglob("__init__.py") if "tests" not in p.parts}
    folders = {f for f in folders if not f.startswith((".", "build"))}
    assert set(mapped) == listed and set(mapped.values()) == folders


def test_networks_of_the_hub_import_torch_and_diffusers_only():
    for path in (*ROOT.glob("models/transformer_*.py"), *ROOT.glob("pipelines/pipeline_*.py")):
        imported = re.findall(r"^(?:from|import) ([\w]+)", path.read_text(), flags=re.MULTILINE)
        assert set(imported) <= {"torch", "diffusers", "huggingface_hub", *sys.stdlib_module_names}, path


def test_scripts_and_tests_import_the_package_only():
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("scripts/*.py"),
    ]:
        assert not re.search(r"^\s*(?:from|import) (?:models|utils|pipelines)\b", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "recipes").glob("*.json")), ids=lambda p: p.stem)
def test_recipes_parse(train_afm, train_fm, train_cafm, recipe):
    script = {"fm": train_fm, "cafm": train_cafm}.get(recipe.stem.split("_")[0], train_afm)
    args = script.parse_args(["--recipe", str(recipe), "--seed", "3"])
    values = json.loads(recipe.read_text())
    assert args.seed == 3 and args.max_train_steps == values["max_train_steps"]
    assert script is train_cafm or Path(args.model_config_name_or_path).is_file()
    assert script.parse_args(["--recipe", str(recipe), "--max_train_steps", "99999"]).max_train_steps == 99_999


def test_readme_names_files_and_flags_that_exist(train_afm, train_fm, train_cafm, capsys):
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:configs|docs|benchmarks)/[\w/.]+\.(?:json|yaml|png|md)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:cafm_)?imagenet_\w+\.json)`", text):
        assert (ROOT / "configs" / "recipes" / name).exists(), name
    known = {}
    for script in (train_afm, train_fm, train_cafm):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        known[script.__name__] = set(re.findall(r"--\w+", capsys.readouterr().out))
    launcher = {"--config_file", "--machine_rank", "--main_process_ip"}
    commands = re.findall(r"^(?:CUDA_\S+ )?(accelerate launch .*(?:\\\n.*)*)$", text, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        script = re.search(r"(train_\w+)\.py", command)[1]
        flags = set(re.findall(r"--[a-z_0-9]+", command.split("#")[0]))
        assert flags <= known[script] | launcher, command


def test_readme_use_a_model(run, monkeypatch, tmp_path):
    run("--output_dir", "afm-digits")
    code = re.search(r"## Use a model\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    scope = {}
    exec(code, scope)
    assert len(scope["images"]) == 2
