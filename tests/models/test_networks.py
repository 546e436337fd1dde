import subprocess
import sys

import pytest
import torch

from adversarial_flow import AdversarialFlowDiscriminator, AdversarialFlowTransformer2DModel
from adversarial_flow.models.transformer_adversarial_flow import time_features


TINY = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "num_layers": 2, "num_attention_heads": 2}
TINY.update(attention_head_dim=8, num_classes=5)
SIZES = {"b": (12, 12, 64), "m": (16, 16, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}
# Published models at 256 pixels; the fixed positions are counted.
TRANSFORMER_PARAMETERS = {
    "b": (129_711_376, 130_499_344, 131_287_312),
    "m": (305_654_800, 306_967_568, 308_280_336),
    "l": (456_772_624, 458_085_392, 459_398_160),
    "xl": (673_485_712, 675_110_032, 676_734_352),
}
DISCRIMINATOR_PARAMETERS = {
    "b": (128_519_424, 129_307_392),
    "m": (303_541_248, 304_854_016),
    "l": (454_659_072, 455_971_840),
    "xl": (670_813_056, 672_437_376),
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """All weights random: at its initialisation the network is zero and hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2
    return model.eval()


@pytest.mark.parametrize("size", SIZES)
def test_published_parameter_counts(size):
    layers, heads, head_dim = SIZES[size]
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    with torch.device("meta"):
        transformers = [
            AdversarialFlowTransformer2DModel(**sizes, time_conditioning=t)
            for t in ("none", "source", "source_target")
        ]
        discriminators = [AdversarialFlowDiscriminator(**sizes, time_conditioning=t) for t in ("none", "source")]
        deep = AdversarialFlowTransformer2DModel(**sizes, repeats=4)
    assert tuple(m.num_parameters() for m in transformers) == TRANSFORMER_PARAMETERS[size]
    assert tuple(m.num_parameters() for m in discriminators) == DISCRIMINATOR_PARAMETERS[size]
    assert deep.num_parameters() == TRANSFORMER_PARAMETERS[size][1]  # repetitions share all weights


SIT = {"time_conditioning": "source", "time_scale": 1.0, "use_null_class": True, "sit_convention": True}


def test_published_parameter_counts_of_sit():
    layers, heads, head_dim = SIZES["xl"]
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim, **SIT}
    with torch.device("meta"):
        transformer = AdversarialFlowTransformer2DModel(**sizes, prediction_type="velocity")
        discriminator = AdversarialFlowDiscriminator.from_transformer(transformer)
    assert transformer.num_parameters() == 675_129_632 and discriminator.num_parameters() == 672_438_528


def test_sit_convention():
    """The same weights with the time and the sign turned, and without the channels that are not used."""
    config = TINY | SIT | {"prediction_type": "velocity"}
    sit = randomized(AdversarialFlowTransformer2DModel(**config))
    plain = AdversarialFlowTransformer2DModel(**config | {"sit_convention": False}).eval()
    own = sit.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):  # (p, p, 2 C): the first C channels of each pixel
        own[name] = own[name].unflatten(0, (4, 6))[:, :3].flatten(0, 1)
    plain.load_state_dict(own)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([1, 5])
    assert torch.allclose(
        sit(x, t, class_labels=labels).sample, -plain(x, 1 - t, class_labels=labels).sample, atol=1e-6
    )
    discriminator = randomized(AdversarialFlowDiscriminator.from_transformer(sit))
    plain = AdversarialFlowDiscriminator(**dict(discriminator.config) | {"sit_convention": False}).eval()
    plain.load_state_dict(discriminator.state_dict())
    assert torch.allclose(discriminator(x, t, labels).logits, plain(x, 1 - t, labels).logits, atol=1e-6)
    with pytest.raises(ValueError, match="`sit_convention` needs"):
        AdversarialFlowTransformer2DModel(**TINY, sit_convention=True)


@pytest.mark.parametrize("time_conditioning", ["none", "source", "source_target"])
@pytest.mark.parametrize("num_classes", [5, None])
@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_transformer_shapes_and_what_it_depends_on(time_conditioning, num_classes, norm_type):
    config = {**TINY, "num_classes": num_classes, "norm_type": norm_type, "time_conditioning": time_conditioning}
    model = randomized(AdversarialFlowTransformer2DModel(**config))
    x, labels = torch.randn(3, 3, 8, 8), None if num_classes is None else torch.tensor([0, 1, 4])
    reference = model(x, 0.7, 0.2, labels).sample
    assert reference.shape == x.shape and torch.isfinite(reference).all()
    changed_source = not torch.equal(model(x, 0.6, 0.2, labels).sample, reference)
    changed_target = not torch.equal(model(x, 0.7, 0.1, labels).sample, reference)
    assert changed_source == (time_conditioning != "none")
    assert changed_target == (time_conditioning == "source_target")
    assert torch.equal(model(x, torch.full((3,), 0.7), torch.full((3,), 0.2), labels, return_dict=False)[0], reference)
    if labels is not None:
        assert not torch.equal(model(x, 0.7, 0.2, labels.flip(0)).sample[0], reference[0])


@pytest.mark.parametrize("sample_size,patch_size,in_channels", [(8, 8, 1), (12, 3, 2), (16, 4, 4), (28, 7, 1)])
def test_any_size(sample_size, patch_size, in_channels):
    config = {**TINY, "sample_size": sample_size, "patch_size": patch_size, "in_channels": in_channels}
    x, labels = torch.randn(2, in_channels, sample_size, sample_size), torch.tensor([0, 1])
    assert randomized(AdversarialFlowTransformer2DModel(**config))(x, class_labels=labels).sample.shape == x.shape
    assert randomized(AdversarialFlowDiscriminator(**config))(x, class_labels=labels).logits.shape == (2,)


def test_patches_keep_their_place():
    """A network that is the identity on tokens must give the image back: embedding and unpatchify are inverse."""
    config = {**TINY, "sample_size": 6, "num_layers": 0, "num_attention_heads": 3, "attention_head_dim": 4}
    model = AdversarialFlowTransformer2DModel(**config, norm_type="rms_norm")
    with torch.no_grad():
        model.pos_embed.zero_()
        # token channel order of the output is (row, column, channel); of the convolution (channel, row, column)
        order = torch.arange(12).view(3, 2, 2).permute(1, 2, 0).flatten()
        model.patch_embed.weight.copy_(torch.eye(12)[order].view(12, 3, 2, 2))
        model.proj_out.weight.copy_(torch.eye(12))
    model.norm_out = torch.nn.Identity()
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(model(x, class_labels=torch.tensor([0, 1])).sample, x)


def test_repeats_unrolled():
    """`repeats=3` is the same stack three times with the time embeddings of 1, 2/3, 1/3 and a label-only output."""
    model = randomized(AdversarialFlowTransformer2DModel(**TINY, repeats=3))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    hidden = model._embed_patches(x)
    label_embed = model._embed_class(labels, hidden)
    for time in (1.0, 2 / 3, 1 / 3):
        hidden = model._run_blocks(hidden, label_embed + model._embed_time(model.time_embed, time, hidden))
    shift, scale = model.modulation_out(torch.nn.functional.silu(label_embed)).chunk(2, dim=1)
    hidden = model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
    expected = model._unpatchify(model.proj_out(hidden))
    assert torch.allclose(model(x, class_labels=labels).sample, expected, atol=1e-6)
    once = AdversarialFlowTransformer2DModel(**TINY, time_conditioning="source")
    once.load_state_dict(model.state_dict())
    assert not torch.allclose(once(x, 1.0, class_labels=labels).sample, expected, atol=1e-3)


def test_initialisation_is_zero_and_blocks_are_the_identity():
    model = AdversarialFlowTransformer2DModel(**TINY)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    assert model(x, class_labels=labels).sample.abs().max() == 0
    hidden = model._embed_patches(x)
    assert torch.equal(model._run_blocks(hidden, model._embed_class(labels, hidden)), hidden)
    logits = AdversarialFlowDiscriminator(**TINY)(x, class_labels=labels).logits
    assert torch.isfinite(logits).all() and logits[0] == logits[1]  # D looks at nothing but its token at first


def test_time_embedding_is_the_published_one():
    """256 features [cos, sin] of 1000 t * 10000^(-i/128)."""
    angles = 1000 * 0.37 * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angles.cos(), angles.sin()])
    assert torch.allclose(time_features(torch.tensor([370.0]))[0].double(), expected, atol=1e-4)
    assert torch.allclose(time_features(torch.tensor([370.0], dtype=torch.float64))[0], expected, atol=1e-12)
    for scale in (1000.0, 1.0):
        model = randomized(AdversarialFlowTransformer2DModel(**TINY, time_conditioning="source", time_scale=scale))
        x, labels = torch.randn(1, 3, 8, 8), torch.tensor([2])
        embedded = model.time_embed(time_features(torch.tensor([0.37 * scale])))
        assert torch.equal(model._embed_time(model.time_embed, 0.37, x), embedded)
        assert not torch.equal(model(x, 0.37, class_labels=labels).sample, model(x, 0.38, class_labels=labels).sample)


@pytest.mark.parametrize("cls", [AdversarialFlowTransformer2DModel, AdversarialFlowDiscriminator])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradient_checkpointing_and_attention_backends_agree(cls, qk_norm):
    model = randomized(cls(**TINY, qk_norm=qk_norm)).train()
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])

    def gradients():
        model.zero_grad()
        model(x, class_labels=labels, return_dict=False)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    reference = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(reference, gradients()))
    model.set_attention_backend("_native_math")
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(reference, gradients()))


def test_null_class():
    model = AdversarialFlowTransformer2DModel(**TINY, use_null_class=True)
    assert model.class_embed.weight.shape[0] == 6
    model(torch.randn(1, 3, 8, 8), class_labels=torch.tensor([5]))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"patch_size": 3}, "not divisible by `patch_size`"),
        ({"time_conditioning": "both"}, "`time_conditioning` must be"),
        ({"prediction_type": "epsilon"}, "`prediction_type` must be"),
        ({"norm_type": "batch_norm"}, "`norm_type` must be"),
        ({"repeats": 2, "time_conditioning": "source"}, "needs time_conditioning='none'"),
        ({"num_classes": None, "use_null_class": True}, "`use_null_class` needs `num_classes`"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        AdversarialFlowTransformer2DModel(**{**TINY, **change})


def test_bad_inputs():
    model = AdversarialFlowTransformer2DModel(**TINY, time_conditioning="source")
    with pytest.raises(ValueError, match="expected"):
        model(torch.randn(1, 3, 16, 16), 1.0, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="needs `timestep`"):
        model(torch.randn(1, 3, 8, 8), class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="needs `class_labels`"):
        model(torch.randn(1, 3, 8, 8), 1.0)
    with pytest.raises(ValueError, match="must be 'none' or 'source'"):
        AdversarialFlowDiscriminator(**TINY, time_conditioning="source_target")


def test_round_trip_in_a_fresh_process(tmp_path):
    config = {**TINY, "time_conditioning": "source_target", "prediction_type": "velocity"}
    model = randomized(AdversarialFlowTransformer2DModel(**config))
    discriminator = randomized(AdversarialFlowDiscriminator(**TINY, norm_type="rms_norm"))
    model.save_pretrained(tmp_path / "transformer")
    discriminator.save_pretrained(tmp_path / "discriminator")
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    outputs = model(x, 0.9, 0.4, labels).sample, discriminator(x, class_labels=labels).logits
    torch.save((x, labels, outputs, model.state_dict()), tmp_path / "expected.pt")
    code = """
import torch
torch.set_num_threads(1)
from adversarial_flow import AdversarialFlowDiscriminator, AdversarialFlowTransformer2DModel
x, labels, outputs, weights = torch.load("expected.pt")
model = AdversarialFlowTransformer2DModel.from_pretrained("transformer")
discriminator = AdversarialFlowDiscriminator.from_pretrained("discriminator")
assert model.config.prediction_type == "velocity" and discriminator.config.norm_type == "rms_norm"
assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
# Loaded weights lie elsewhere in memory, so that a CPU kernel may sum in another order.
torch.testing.assert_close(model(x, 0.9, 0.4, labels).sample, outputs[0], rtol=1e-5, atol=1e-6)
torch.testing.assert_close(discriminator(x, class_labels=labels).logits, outputs[1], rtol=1e-5, atol=1e-6)
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip().endswith("equal"), result.stderr
