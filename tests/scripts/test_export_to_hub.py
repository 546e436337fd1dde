"""Self-contained folders: used where the package is not, and uploaded to a Hub on loopback."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_FLAGS, assert_fails
from hub_server import HubServer
from huggingface_hub.utils import filter_repo_objects
from test_convert_checkpoint import load_script

from adversarial_flow import AdversarialFlowPipeline
from adversarial_flow.utils.hub import UPLOADED


WITHOUT_PACKAGE = """
import sys
sys.modules["adversarial_flow"] = None  # an import of it fails
import torch
from diffusers import DiffusionPipeline

folder, images = sys.argv[1:3]

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images

try:
    DiffusionPipeline.from_pretrained(folder)
    raise SystemExit("it was loaded without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
expected = torch.load(images)
assert torch.equal(draw(pipeline), expected)
pipeline.save_pretrained(folder + "-again")
assert torch.equal(draw(DiffusionPipeline.from_pretrained(folder + "-again", trust_remote_code=True)), expected)
assert torch.equal(draw(type(pipeline).from_pretrained(folder + "-again", trust_remote_code=True)), expected)
half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
assert half.transformer.dtype == torch.bfloat16 and (draw(half) - expected).abs().max() < 0.1
assert pipeline.to(torch.float64).transformer.dtype == torch.float64
if pipeline.vae is None:
    pipeline.model_cpu_offload_seq = "transformer"
if torch.cuda.is_available():
    draw(pipeline.to(torch.float32)), pipeline.enable_model_cpu_offload(), draw(pipeline)
assert "adversarial_flow" not in {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
"""


@pytest.fixture(scope="module")
def script():
    return load_script("export_to_hub")


def images_of(folder) -> torch.Tensor:
    pipeline = AdversarialFlowPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images


def environment(tmp_path, **more) -> dict:
    # The dynamic modules' cache is this test's own, the network is off.
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **cache, **more}


def use_without_package(folder, tmp_path) -> None:
    torch.save(images_of(folder), tmp_path / "images.pt")
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), str(tmp_path / "images.pt")]
    subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), check=True, timeout=300)


def test_what_training_leaves_needs_no_package(run, run_fm, tmp_path):
    """Of a one-step model, and of a flow-matching model that is sampled with many steps."""
    run("--output_dir", "afm")
    use_without_package(tmp_path / "afm", tmp_path)
    run_fm("--output_dir", "fm")
    use_without_package(tmp_path / "fm", tmp_path)


def test_export(script, run, tmp_path):
    """Everything but checkpoints; with the installed package no trust is needed; it can be exported again."""
    run("--output_dir", "afm", "--checkpointing_steps", 2)
    script.main(["afm", "out"])
    names = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    assert {"model_index.json", "pipeline_adversarial_flow.py", "README.md", "samples.png", "results.json"} <= names
    assert {f"transformer/{name}" for name in ("transformer_adversarial_flow.py", "config.json")} <= names
    assert not any(name.startswith("checkpoint-") for name in names)
    card = Path("out/README.md").read_text()
    assert "\n# out\n" in card
    assert 'DiffusionPipeline.from_pretrained("out", trust_remote_code=True)' in card
    assert "license: apache-2.0" in card and "## Recipe" in card
    assert torch.equal(images_of("out"), images_of("afm"))
    use_without_package(tmp_path / "out", tmp_path)
    script.main(["out", "twice"])
    again = {str(path.relative_to("twice")) for path in Path("twice").rglob("*") if path.is_file()}
    assert again == names and torch.equal(images_of("twice"), images_of("afm"))


def test_jit_and_old_folders(script, tmp_path, monkeypatch):
    """A JiT's code goes along; folders that were saved without code load and can be exported."""
    from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler

    from adversarial_flow import JiTTransformer2DModel

    monkeypatch.chdir(tmp_path)
    sizes = {"sample_size": 8, "patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    model = JiTTransformer2DModel(**sizes, bottleneck_dim=4, in_context_length=2, in_context_start=1, num_classes=3)
    pipeline = AdversarialFlowPipeline(model, FlowMapEulerDiscreteScheduler(), num_steps=None)
    DiffusionPipeline.save_pretrained(pipeline, "old")  # without code
    assert not Path("old/pipeline_adversarial_flow.py").exists()
    script.main(["old", "out"])
    assert Path("out/transformer/transformer_jit.py").exists() and Path("out/samples.png").exists()
    use_without_package(tmp_path / "out", tmp_path)


def test_bad_input(script, run, tmp_path):
    assert_fails("nowhere: this is no pipeline's folder", lambda *f: script.main(list(f)), "nowhere", "out")
    run("--output_dir", "afm")
    main = lambda *flags: script.main([str(flag) for flag in flags])  # noqa: E731
    assert_fails("afm exists: choose another folder", main, "afm", "afm")
    assert_fails("--push_to_hub afm: this is no NAMESPACE/NAME", main, "afm", "out", "--push_to_hub", "afm")
    assert_fails("--push_to_hub a/b/c: this is no", main, "afm", "out", "--push_to_hub", "a/b/c")
    assert_fails("exclude each other", main, "afm", "out", "--hub_revision", "b", "--hub_create_pr")
    weights = Path("afm/transformer/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert_fails("afm: the pipeline can't be loaded", main, "afm", "out")
    assert not Path("out").exists() and not list(Path().glob(".out.*"))


# ------------------------------------------------------------------------------------------------------------- uploads


def run_export(tmp_path, hub: HubServer, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "export_to_hub.py"), *flags]
    return run_hub(tmp_path, hub, command)


def run_hub(tmp_path, hub: HubServer, command: list[str]) -> subprocess.CompletedProcess:
    hub_environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    variables = environment(tmp_path, HF_HUB_DISABLE_XET="1", **hub_environment)
    return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)


def test_upload(run, tmp_path):
    """A repository, a private one, a branch and a pull request; large files are not sent twice."""
    run("--output_dir", "afm", "--checkpointing_steps", 2)
    with HubServer() as hub:
        process = run_export(tmp_path, hub, "afm", "out", "--push_to_hub", "me/afm", "--hub_private_repo")
        assert process.returncode == 0 and "Uploaded to" in process.stdout, process.stderr
        files = hub.repositories["me/afm"]["main"]
        local = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
        assert set(files) == local and hub.private["me/afm"] is True
        for name, content in files.items():
            assert content == (tmp_path / "out" / name).read_bytes(), name
        assert 'from_pretrained("me/afm", trust_remote_code=True)' in files["README.md"].decode()
        sent = [path for method, path, _ in hub.requests if method == "PUT"]
        assert len(sent) == 2 and all(token == "Bearer hf_secret" for m, p, token in hub.requests if m == "POST")
        for flags, revision in ((("--hub_revision", "trial"), "trial"), (("--hub_create_pr",), "pr")):
            process = run_export(tmp_path, hub, "afm", f"out-{revision}", "--push_to_hub", "me/afm", *flags)
            assert process.returncode == 0, process.stderr
            assert set(hub.repositories["me/afm"][revision]) == set(files)
        assert [path for method, path, _ in hub.requests if method == "PUT"] == sent


PUSH = """
from adversarial_flow import AdversarialFlowPipeline
pipeline = AdversarialFlowPipeline.from_pretrained("afm")
pipeline.save_pretrained("mine", push_to_hub=True, repo_id="me/saved", private=True)
pipeline.save_pretrained("positional", True)  # safe_serialization, as in diffusers
pipeline.push_to_hub("me/pushed")
"""


def test_pipelines_push_themselves(run, tmp_path):
    """By diffusers' two ways, with their code."""
    run("--output_dir", "afm")
    with HubServer() as hub:
        process = run_hub(tmp_path, hub, [sys.executable, "-c", PUSH])
        assert process.returncode == 0, process.stderr
        assert set(hub.repositories) == {"me/saved", "me/pushed"} and hub.private["me/saved"]
        for repository in hub.repositories.values():
            assert {"pipeline_adversarial_flow.py", "transformer/transformer_adversarial_flow.py"} <= set(
                repository["main"]
            )


def test_training_pushes(tiny_config, tmp_path):
    """What a training script uploads at its end loads by name, and has no checkpoints."""
    command = [sys.executable, str(ROOT / "train_afm.py"), "--model_config_name_or_path", tiny_config, *TINY_FLAGS]
    with HubServer() as hub:
        process = run_hub(tmp_path, hub, [*command, "--push_to_hub", "--hub_model_id", "me/trained"])
        assert process.returncode == 0, process.stderr
        files = hub.repositories["me/trained"]["main"]
        wanted = {"model_index.json", "pipeline_adversarial_flow.py", "transformer/transformer_adversarial_flow.py"}
        assert wanted | {"README.md", "results.json", "samples.png", "curves.png"} <= set(files)
        assert not any(name.startswith(("checkpoint-", "logs")) for name in files)
        assert 'from_pretrained("me/trained", trust_remote_code=True)' in files["README.md"].decode()


def test_only_what_belongs_to_a_model_is_uploaded():
    """Not what else lies in the folder of a run: other pictures, checkpoints, half-written ones, logs."""
    wanted = ["README.md", "samples.png", "transformer/config.json", "vae/config.json", "pipeline_adversarial_flow.py"]
    others = ["private/photos/a.png", "control/0.001/samples.png", "checkpoint-3/transformer/config.json", "notes.txt"]
    others += ["tmp-checkpoint-3/trainer_state.json", "logs/events", "data.png", "comparison.json"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=UPLOADED)) == wanted


def test_a_private_upload_does_not_go_to_a_public_repository(run, tmp_path):
    run("--output_dir", "afm")
    with HubServer() as hub:
        hub.repositories["me/afm"], hub.private["me/afm"] = {"main": {}}, False
        process = run_export(tmp_path, hub, "afm", "out", "--push_to_hub", "me/afm", "--hub_private_repo")
        assert process.returncode == 1 and "me/afm exists and is public" in process.stderr
        assert "hf upload" not in process.stderr  # which would publish it
        assert hub.repositories["me/afm"] == {"main": {}}


BY_NAME = """
import json, sys, torch
from diffusers import DiffusionPipeline
from adversarial_flow import AdversarialFlowPipeline

class Own(AdversarialFlowPipeline):
    pass

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images

expected = torch.load(sys.argv[1])
for cls in (AdversarialFlowPipeline, Own):
    pipeline = cls.from_pretrained("me/afm")
    assert type(pipeline) is cls and type(pipeline.transformer).__module__.startswith("adversarial_flow.")
    assert torch.equal(draw(pipeline), expected)
assert AdversarialFlowPipeline.from_pretrained("me/afm", variant="fp16").transformer.dtype == torch.float32
assert torch.equal(draw(AdversarialFlowPipeline.from_pretrained("me/afm", revision="other")), expected)
"""
WITH_TRUST = """
import sys
sys.modules["adversarial_flow"] = None
import torch
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained("me/afm")
    raise SystemExit("it was loaded without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
pipeline = DiffusionPipeline.from_pretrained("me/afm", trust_remote_code=True)
images = pipeline([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images
assert torch.equal(images, torch.load(sys.argv[1]))
"""


def test_use_by_name(run, tmp_path):
    """The package fetches what it needs and no code; without the package the code is fetched when it is trusted."""
    run("--output_dir", "afm", "--checkpointing_steps", 2)
    torch.save(images_of("afm"), tmp_path / "images.pt")
    AdversarialFlowPipeline.from_pretrained("afm").save_pretrained("afm", variant="fp16")
    with HubServer() as hub:
        files = {str(p.relative_to("afm")): p.read_bytes() for p in Path("afm").rglob("*") if p.is_file()}
        hub.repositories["me/afm"] = {"main": files, "other": files}
        process = run_hub(tmp_path, hub, [sys.executable, "-c", BY_NAME, str(tmp_path / "images.pt")])
        assert process.returncode == 0, process.stderr
        weights = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
        folder = {f"transformer/{name}" for name in ("config.json", *weights)}
        assert hub.downloads() == folder | {"model_index.json", "scheduler/scheduler_config.json"}
        hub.requests.clear()
        process = run_hub(tmp_path, hub, [sys.executable, "-c", WITH_TRUST, str(tmp_path / "images.pt")])
        assert process.returncode == 0, process.stderr
        assert {"pipeline_adversarial_flow.py", "transformer/transformer_adversarial_flow.py"} <= hub.downloads()


@pytest.mark.parametrize("fault,reason", [("401", "401"), ("403", "403"), ("500", "500"), ("drop", "uploading")])
def test_failed_uploads_name_the_command_that_works_later(run, tmp_path, fault, reason):
    run("--output_dir", "afm")
    with HubServer(fault) as hub:
        process = run_export(tmp_path, hub, "afm", "out", "--push_to_hub", "me/afm", "--hub_private_repo")
        assert process.returncode == 1 and "Traceback" not in process.stderr
        message = re.search(r"^error: The upload to me/afm failed.*$", process.stderr, re.MULTILINE)[0]
        assert reason in message
        assert "secret" not in message and torch.equal(images_of("out"), images_of("afm"))
        command = shlex.split(re.search(r"upload it later with: (hf upload .*)$", message)[1])
        hub.fault = None
        program = str(Path(sys.executable).with_name("hf"))
        process = run_hub(tmp_path, hub, [program, *command[1:]])
        assert process.returncode == 0, process.stderr
        files = hub.repositories["me/afm"]["main"]
        local = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
        assert set(files) == local and hub.private["me/afm"] is True
        assert json.loads(files["model_index.json"])["_class_name"][1] == "AdversarialFlowPipeline"
