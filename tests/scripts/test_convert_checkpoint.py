"""Conversion of plain checkpoints on state dicts of their exact names, at small width."""

import argparse
import importlib.util
import pickle

import pytest
import torch
from conftest import ROOT, assert_fails
from diffusers import AutoencoderKL
from plain_networks import _rms, dit_state, embed, jit_state, plain_dit, plain_jit
from torch import nn

from adversarial_flow import (
    AdversarialFlowClassifier,
    AdversarialFlowDiscriminator,
    AdversarialFlowPipeline,
    AdversarialFlowTransformer2DModel,
    JiTDiscriminator,
    JiTTransformer2DModel,
)
from adversarial_flow.utils.conversion import NAMES, Hints, infer_config, known_hints, ratio_of, to_plain_names


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script("convert_checkpoint")


HEADS = ("--num_attention_heads", "2")
JIT = ("--in_context_start", "1")
SAMPLE, VELOCITY = ("--prediction_type", "sample"), ("--prediction_type", "velocity")
AFM = [  # file name, its weights, flags, num_steps of the pipeline, entries of the config
    ("one.pth", {}, SAMPLE, 1, {"time_conditioning": "none", "prediction_type": "sample", "repeats": 1}),
    ("velocity.pth", {}, VELOCITY, 1, {"time_conditioning": "none", "prediction_type": "velocity"}),
    ("two.pth", {"times": 1}, (*VELOCITY, "--num_steps", "2"), 2, {"prediction_type": "velocity"}),
    ("four.pth", {"times": 1}, (*VELOCITY, "--num_steps", "4"), 4, {"time_conditioning": "source"}),
    ("any.pth", {"times": 2}, VELOCITY, None, {"time_conditioning": "source_target", "prediction_type": "velocity"}),
    ("deep.pth", {"times": 1}, (*SAMPLE, "--repeats", "4"), 1, {"repeats": 4, "prediction_type": "sample"}),
    ("sit.pth", {"times": 1, "outputs": 8}, ("--sit",), None, {"sit_convention": True, "num_classes": 4}),
]


@pytest.mark.parametrize("name,shape,flags,num_steps,entries", AFM, ids=[row[0] for row in AFM])
def test_generators(script, tmp_path, name, shape, flags, num_steps, entries):
    """A pipeline that samples with the right number of steps; and back, bitwise."""
    state = dit_state(**shape)
    torch.save(state, tmp_path / name)
    script.main([str(tmp_path / name), str(tmp_path / "out"), *HEADS, *flags, "--vae", "none"])
    pipeline = AdversarialFlowPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    assert pipeline.config.num_steps == num_steps and {key: config[key] for key in entries} == entries
    assert pipeline.is_flow == (name == "sit.pth") and config.sample_size == 8 and config.num_layers == 2
    steps = {} if num_steps else {"num_inference_steps": 2}
    images = pipeline([0, 1], output_type="latent", generator=torch.Generator().manual_seed(0), **steps).images
    assert images.shape == (2, 4, 8, 8) and images.isfinite().all()
    script.main([str(tmp_path / "out"), str(tmp_path / "back.pth"), "--to", "sit" if name == "sit.pth" else "afm"])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("weights", ["ema1", "ema2", "raw"])
def test_official_jit(script, tmp_path, weights):
    """One of the three sets of weights, without the prefix and the computed rotations; and back."""
    states = {name: {f"net.{key}": value + i for key, value in jit_state().items()} for i, name in enumerate("abc")}
    content = dict(zip(("model", "model_ema1", "model_ema2"), states.values()))
    content["model"]["net.feat_rope.freqs_cos"] = content["model_ema1"]["net.feat_rope.freqs_sin"] = torch.zeros(2)
    flags = argparse.Namespace(lr=0.1, output_dir="out")
    torch.save(content | {"epoch": 3, "optimizer": {"lr": 0.1}, "args": flags}, tmp_path / "checkpoint-last.pth")
    script.main([str(tmp_path / "checkpoint-last.pth"), str(tmp_path / "out"), *JIT, "--weights", weights])
    pipeline = AdversarialFlowPipeline.from_pretrained(tmp_path / "out")
    config = pipeline.transformer.config
    assert isinstance(pipeline.transformer, JiTTransformer2DModel) and pipeline.is_flow and pipeline.vae is None
    assert (config.num_attention_heads, config.in_context_length, config.num_classes) == (2, 3, 5)
    expected = content[{"raw": "model"}.get(weights, f"model_{weights}")]
    script.main([str(tmp_path / "out"), str(tmp_path / "back.pth"), "--to", "jit"])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == {"model", "model_ema1", "model_ema2"}
    for copy in back.values():
        assert all(torch.equal(value, expected[key]) for key, value in copy.items())
    assert set(expected) - set(back["model"]) <= {"net.feat_rope.freqs_cos", "net.feat_rope.freqs_sin"}


def test_a_converted_network_is_the_plain_one(script, tmp_path):
    """Against functions of the plain state dicts, for each kind: time, sign, labels, norms, tokens."""
    torch.manual_seed(1)
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.7, 1.0]), torch.tensor([0, 3, 4])

    def convert(name, state, *flags):
        torch.save(state, tmp_path / f"{name}.pth")
        script.main([str(tmp_path / f"{name}.pth"), str(tmp_path / name), *flags])
        return tmp_path / name

    def pipeline(name, state, *flags):
        return AdversarialFlowPipeline.from_pretrained(convert(name, state, *flags, "--vae", "none")).transformer

    with torch.no_grad():
        state = dit_state(times=2)
        r = t / 2
        expected = plain_dit(state, x, embed(state, labels, t_embedder=1000 * t, t_tgt_embedder=1000 * r), heads=2)
        assert torch.allclose(pipeline("any", state, *HEADS, *VELOCITY)(x, t, r, labels).sample, expected, atol=1e-5)

        state = dit_state(times=1, outputs=8)
        expected = -plain_dit(state, x, embed(state, labels, t_embedder=1 - t), heads=2)[:, :4]
        sit = pipeline("sit", state, *HEADS, "--sit")
        assert torch.allclose(sit(x, t, class_labels=labels).sample, expected, atol=1e-5)

        state = dit_state(times=1, head="dis_embed")
        folder = convert("d", state, *HEADS, "--no-sit")
        expected = plain_dit(state, x, embed(state, labels, t_embedder=1000 * t), heads=2)[:, 0]
        assert torch.allclose(AdversarialFlowDiscriminator.from_pretrained(folder)(x, t, labels).logits, expected)
        folder = convert("sit-d", state, *HEADS, "--sit")
        expected = plain_dit(state, x, embed(state, labels, t_embedder=1 - t), heads=2, norm=_rms)[:, 0]
        logits = AdversarialFlowDiscriminator.from_pretrained(folder)(x, t, labels).logits
        assert torch.allclose(logits, expected, atol=1e-5)

        state = dit_state(times=1, head="cls_embed")
        folder = convert("c", state, *HEADS)
        expected = plain_dit(state, x, embed(state, t_embedder=1000 * t), heads=2)
        assert torch.allclose(AdversarialFlowClassifier.from_pretrained(folder)(x, t).logits, expected, atol=1e-5)

        x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 5])
        state = jit_state()
        sample = plain_jit(state, x, 1 - t, labels, heads=2, start=1)
        expected = (x - sample) / t[:, None, None, None]
        velocity = pipeline("jit", state, *JIT)(x, t, class_labels=labels).sample
        assert torch.allclose(velocity, expected, rtol=1e-4, atol=1e-5)
        state = jit_state(discriminator=True)
        expected = plain_jit(state, x, 1 - t, labels, heads=2, start=1)
        logits = JiTDiscriminator.from_pretrained(convert("jit-d", state, *JIT))(x, t, labels).logits
        assert torch.allclose(logits, expected, atol=1e-5)


def test_released_jit_without_prefix_and_its_discriminator(script, tmp_path):
    torch.save(jit_state(), tmp_path / "ema.pth")
    torch.save(jit_state(discriminator=True), tmp_path / "dis.pth")
    script.main([str(tmp_path), str(tmp_path / "out"), *JIT])
    assert isinstance(AdversarialFlowPipeline.from_pretrained(tmp_path / "out").transformer, JiTTransformer2DModel)
    assert JiTDiscriminator.from_pretrained(tmp_path / "out" / "discriminator").config.in_context_start == 1


@pytest.mark.parametrize("sit", [False, True])
def test_training_folders(script, tmp_path, sit):
    """gen, ema and dis of the released training code: the average, or --raw; D of a SiT is told by its generator."""
    models = tmp_path / "states" / "0000000100" / "models"
    models.mkdir(parents=True)
    shape = {"times": 1, "outputs": 8} if sit else {}
    for i, name in enumerate(("gen", "ema")):
        torch.save({key: value + i for key, value in dit_state(**shape).items()}, models / f"{name}.pth")
    torch.save(dit_state(head="dis_embed", times=int(sit)), models / "dis.pth")
    for flags, i in (((), 1), (("--raw",), 0)):
        out = tmp_path / f"out{i}"
        kind = ("--sit",) if sit else SAMPLE
        script.main([str(models.parent), str(out), *HEADS, "--vae", "none", *kind, *flags])
        transformer = AdversarialFlowPipeline.from_pretrained(out).transformer
        expected = dit_state(**shape)["x_embedder.proj.weight"] + i
        assert torch.equal(transformer.patch_embed.weight, expected)
        discriminator = AdversarialFlowDiscriminator.from_pretrained(out / "discriminator")
        assert discriminator.config.sit_convention == sit
        assert discriminator.config.norm_type == ("rms_norm" if sit else "layer_norm")
        assert discriminator.config.time_conditioning == ("source" if sit else "none")


def test_classifiers_and_discriminators_alone(script, tmp_path):
    for head, cls in (("cls_embed", AdversarialFlowClassifier), ("dis_embed", AdversarialFlowDiscriminator)):
        state = dit_state(head=head, times=1)
        torch.save(state, tmp_path / f"{head}.pth")
        kind = ("--no-sit",) if head == "dis_embed" else ()
        script.main([str(tmp_path / f"{head}.pth"), str(tmp_path / head), *HEADS, *kind])
        model = cls.from_pretrained(tmp_path / head)
        back = to_plain_names(model)
        assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
        script.main([str(tmp_path / head), str(tmp_path / f"{head}-back.pth"), "--to", "afm"])
    x = torch.randn(2, 4, 8, 8)
    logits = AdversarialFlowClassifier.from_pretrained(tmp_path / "cls_embed")(x, 0.3).logits
    assert logits.shape == (2, 5)


def test_vae(script, tmp_path):
    """A folder is copied and checked; a Hub id is kept as a reference, by default that of the released models."""
    torch.save(dit_state(), tmp_path / "one.pth")
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 2}
    sizes |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4}
    for name, change in (("vae", {}), ("channels", {"latent_channels": 3}), ("scaling", {"scaling_factor": 1.0})):
        AutoencoderKL(**sizes | {"scaling_factor": 0.18215} | change).save_pretrained(tmp_path / name)
    file, common = str(tmp_path / "one.pth"), (*HEADS, *SAMPLE)
    script.main([file, str(tmp_path / "out"), *common, "--vae", str(tmp_path / "vae")])
    pipeline = AdversarialFlowPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.vae is not None and pipeline([1]).images[0].size == (16, 16)
    script.main([file, str(tmp_path / "referred"), *common])
    text = (tmp_path / "referred" / "model_index.json").read_text()
    assert '"vae_name_or_path": "stabilityai/sd-vae-ft-mse"' in text
    again = AdversarialFlowPipeline.from_pretrained(tmp_path / "referred", vae=pipeline.vae)  # no network needed
    assert again.vae is pipeline.vae
    for name, message in (("channels", "has 3 latent channels, the model 4"), ("scaling", "scales latents by 1.0")):
        assert_fails(message, run(script), file, tmp_path / "x", *common, "--vae", tmp_path / name)
    assert_fails("neither a folder .* nor a Hub id", run(script), file, tmp_path / "x", *common, "--vae", "./no/vae")
    assert_fails("neither a folder .* nor a Hub id", run(script), file, tmp_path / "x", *common, "--vae", file)
    torch.save(jit_state(), tmp_path / "jit.pth")
    flags = (*JIT, "--vae", tmp_path / "vae")
    assert_fails("this is a model of pixels", run(script), tmp_path / "jit.pth", tmp_path / "x", *flags)
    torch.save(dit_state(channels=16), tmp_path / "wide.pth")
    message = "The released VAE has 4 latent channels, the model 16: give --vae FOLDER"
    assert_fails(message, run(script), tmp_path / "wide.pth", tmp_path / "x", *common)
    (tmp_path / "empty").mkdir()
    assert_fails("no AutoencoderKL", run(script), file, tmp_path / "x", *common, "--vae", tmp_path / "empty")


def run(script):
    return lambda *flags: script.main([str(flag) for flag in flags])


def test_bad_input(script, tmp_path):
    state, out = dit_state(), tmp_path / "out"

    def fails(message, content, *flags, name="x.pth"):
        if content is not None:
            torch.save(content, tmp_path / name)
        assert_fails(message, run(script), tmp_path / name, out, *flags)
        assert not out.exists() and not list(out.parent.glob(f".{out.name}.*"))

    fails("there is no such file", None, name="nothing.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    fails("refuses it|can't be read", None, name="text.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"run": print}))
    fails("refuses it", None, name="pickle.pth")
    fails("not a state dict", {"step": 3})
    fails("not a state dict", [1, 2])
    fails("refuses it", {"model": nn.Linear(2, 2)})
    fails("neither a DiT, a SiT nor a JiT", {"weight": torch.zeros(2)})
    fails("heads of width 32 is not known: pass --num_attention_heads", state)
    fails("--num_attention_heads 5 does not divide the width 32", state, "--num_attention_heads", 5)
    fails("what it predicts: pass --prediction_type sample or velocity", state, *HEADS)
    fails("pass --num_steps .* or --repeats", dit_state(times=1), *HEADS, *VELOCITY)
    fails("--num_steps 4, but a generator with no time embedding", state, *HEADS, *SAMPLE, "--num_steps", 4)
    fails("--num_steps 4, but .* two time", dit_state(times=2), *HEADS, *VELOCITY, "--num_steps", 4)
    fails("--repeats 2 is for models of one step", state, *HEADS, *SAMPLE, "--repeats", 2)
    fails("those of a SiT .pass --sit.", dit_state(times=1, outputs=8), *HEADS)
    fails("does not have the shapes of a SiT", state, *HEADS, "--sit")
    fails("pass --sit or --no-sit", dit_state(times=1, head="dis_embed"), *HEADS)
    fails("pass --in_context_start", jit_state())
    fails("--num_attention_heads 4, but the norms .* say 2", jit_state(), *JIT, "--num_attention_heads", 4)
    one = (*HEADS, *SAMPLE)
    missing = {key: value for key, value in state.items() if "blocks.1.attn.qkv" not in key}
    fails("missing weights: blocks.1.attn.qkv.bias, blocks.1.attn.qkv.weight", missing, *one)
    fails("a weight is missing .'pos_embed'", {k: v for k, v in state.items() if k != "pos_embed"}, *one)
    fails("extra.9 and 2 more", state | {f"extra.{i}": torch.zeros(1) for i in range(12)}, *one)
    fails("no known network has: blocks.a.weight", state | {"blocks.a.weight": torch.zeros(1)}, *one)
    fails("unknown weights: t_embedder", state | {"t_embedder.mlp.0.bias": torch.zeros(32)}, *one)
    both = dit_state(head="dis_embed") | {"final_layer.linear.weight": torch.zeros(1, 32)}
    fails("no known network has: final_layer.linear.weight", both, *HEADS)
    fails(
        r"wrong shape: blocks.0.attn.proj.bias \(3,\), expected \(32,\)",
        state | {"blocks.0.attn.proj.bias": torch.zeros(3)},
        *one,
    )
    fails("not a state dict", {1: torch.zeros(2)})
    fails("not a state dict", {"model_ema1": state}, "--weights", "ema2")
    fails("--weights ema1: .* holds no choice", state, "--weights", "ema1")
    fails("--raw is for a training's folder", state, "--raw")
    fails("--num_steps must be at least 1, not 0", state, "--num_steps", 0)
    (tmp_path / "folder").mkdir()
    fails("there is no ema.pth", None, name="folder")
    fails("no network of a known class", None, "--to", "afm", name="folder")
    torch.save(state, tmp_path / "good.pth")
    out.mkdir()
    assert_fails("exists: choose another output", run(script), tmp_path / "good.pth", out, *HEADS)
    script.main([str(tmp_path / "good.pth"), str(tmp_path / "afm"), *one, "--vae", "none"])
    back = (tmp_path / "afm", tmp_path / "y.pth", "--to")
    assert_fails("--to jit: .* of the kind 'afm'", run(script), *back, "jit")
    assert_fails("--num_steps: not for --to", run(script), *back, "afm", "--num_steps", 2)
    sizes = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    for i, (change, message) in enumerate(
        (
            ({"norm_type": "rms_norm"}, "can't hold what this network is: norm_type 'rms_norm'"),
            ({"qk_norm": True}, "has no weights like these: transformer_blocks.0.attn.norm_q"),
            ({"time_conditioning": "source", "time_scale": 1.0, "prediction_type": "velocity"}, "time_scale 1.0"),
            ({"num_classes": None}, "a weight is missing"),
        )
    ):
        AdversarialFlowTransformer2DModel(**sizes | change).save_pretrained(tmp_path / f"own{i}")
        assert_fails(message, run(script), tmp_path / f"own{i}", tmp_path / "y.pth", "--to", "afm")
    assert not list(tmp_path.glob("*y.pth*"))


RELEASED = [  # file, depth, width, times, outputs, steps, repeats
    ("b2_1nfe_guided_FID3.05.pth", 12, 768, 0, 4, 1, 1),
    ("b2_1nfe_noguide_FID6.07.pth", 12, 768, 0, 4, 1, 1),
    ("m2_1nfe_guided_FID2.82.pth", 16, 1024, 0, 4, 1, 1),
    ("m2_1nfe_noguide_FID5.21.pth", 16, 1024, 0, 4, 1, 1),
    ("l2_1nfe_guided_FID2.63.pth", 24, 1024, 0, 4, 1, 1),
    ("l2_1nfe_noguide_FID4.36.pth", 24, 1024, 0, 4, 1, 1),
    ("xl2_1nfe_guided_FID2.38.pth", 28, 1152, 0, 4, 1, 1),
    ("xl2_1nfe_noguide_FID3.98.pth", 28, 1152, 0, 4, 1, 1),
    ("xl2_2nfe_guided_FID2.11.pth", 28, 1152, 1, 4, 2, 1),
    ("xl2_2nfe_noguide_FID2.36.pth", 28, 1152, 1, 4, 2, 1),
    ("xl2_4nfe_guided_FID2.03.pth", 28, 1152, 1, 4, 4, 1),
    ("xl2_56layer_1nfe_guided_FID2.08.pth", 28, 1152, 1, 4, 1, 2),
    ("xl2_112layer_1nfe_guided_FID1.94.pth", 28, 1152, 1, 4, 1, 4),
    ("sit_xl2_cafm.pth", 28, 1152, 1, 8, None, 1),
    ("SiT-XL-2-256.pt", 28, 1152, 1, 8, None, 1),
]
COUNTS = {(12, 0): 129_711_376, (16, 0): 305_654_800, (24, 0): 456_772_624, (28, 0): 673_485_712, (28, 1): 675_110_032}


@pytest.mark.parametrize("name,depth,width,times,outputs,steps,repeats", RELEASED, ids=[row[0] for row in RELEASED])
def test_released_files_at_full_size(name, depth, width, times, outputs, steps, repeats):
    """By their names and the shapes of their weights, on `meta`: config, steps and the published parameter counts."""
    rows = 1001 if outputs == 8 else 1000
    sizes = {"width": width, "depth": depth, "rows": rows, "times": times, "outputs": outputs, "tokens": 256}
    state = dit_state(**sizes, device="meta")
    cls, config, found_steps = infer_config(state, known_hints(name), name)
    with torch.device("meta"):
        model = cls(**config)
    assert cls is AdversarialFlowTransformer2DModel and found_steps == steps
    assert config.get("repeats", 1) == repeats and config.get("sit_convention", False) == (outputs == 8)
    assert config["num_classes"] == 1000 and config["num_attention_heads"] == (12 if width == 768 else 16)
    expected = 675_129_632 if outputs == 8 else COUNTS[depth, times]
    assert model.num_parameters() == expected == sum(value.numel() for value in state.values())
    assert {k: v.shape for k, v in to_plain_names(model).items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize(
    "name,width,depth,heads,bottleneck,start,patch,count",
    [
        ("jit_h16_cafm.pth", 1280, 32, 16, 256, 10, 16, 952_842_048),
        ("checkpoint-last.pth", 768, 12, 12, 128, 4, 16, 131_320_320),
        ("checkpoint-last.pth", 1024, 24, 16, 128, 8, 32, 461_796_320),
    ],
)
def test_jit_files_at_full_size(name, width, depth, heads, bottleneck, start, patch, count):
    sizes = {"width": width, "depth": depth, "heads": heads, "bottleneck": bottleneck, "patch": patch}
    state = jit_state(**sizes, rows=1001, context=32, tokens=256, device="meta")
    cls, config, steps = infer_config(state, known_hints(name), name)
    assert cls is JiTTransformer2DModel and steps is None and config["in_context_start"] == start
    assert config["dropout"] == (0.2 if width == 1280 else 0.0) and config["sample_size"] == 16 * patch
    with torch.device("meta"):
        model = cls(**config)
    assert model.num_parameters() == count == sum(value.numel() for value in state.values())
    assert {k: v.shape for k, v in to_plain_names(model).items()} == {k: v.shape for k, v in state.items()}


def test_other_discriminators_and_classifiers_at_full_size():
    for head, name, flags, count in (
        ("dis_embed", "a", {"sit": True}, 672_438_528),
        ("dis_embed", "b", {"sit": False}, 672_437_376),
        ("cls_embed", "classifier.pth", {}, 672_437_224),
    ):
        rows = 1001 if flags.get("sit") else 1000
        state = dit_state(1152, 28, rows=rows, times=1, head=head, tokens=256, device="meta")
        cls, config, _ = infer_config(state, Hints(**flags), name)
        with torch.device("meta"):
            assert cls(**config).num_parameters() == count


def test_inner_widths():
    """Of every network that a ratio can describe."""
    for cut in (1.0, 2 / 3):
        for width in (32, 36, 100, 768, 1280):
            for inner in range(1, 5 * width, 7):
                assert int(int(width * ratio_of(inner, width, cut)) * cut) == inner


def test_every_weight_has_a_name():
    """Of each network, in both directions."""
    with torch.device("meta"):
        models = [
            AdversarialFlowTransformer2DModel(num_layers=1, time_conditioning="source_target"),
            AdversarialFlowDiscriminator(num_layers=1, time_conditioning="source"),
            AdversarialFlowClassifier(num_layers=1),
            JiTTransformer2DModel(num_layers=5),
            JiTDiscriminator(num_layers=5),
        ]
    assert {type(model) for model in models} == set(NAMES)
    for model in models:
        plain = to_plain_names(model)
        assert None not in plain and len(plain) == len(model.state_dict())
