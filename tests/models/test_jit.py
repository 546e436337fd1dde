import pytest
import torch
from torch import nn

from adversarial_flow import DirectionalDerivative, JiTDiscriminator, JiTTransformer2DModel
from adversarial_flow.models.transformer_jit import rotary_angles, rotate


TINY = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "num_layers": 4, "num_attention_heads": 2}
TINY |= {"attention_head_dim": 8, "bottleneck_dim": 6, "in_context_length": 3, "in_context_start": 2, "num_classes": 5}
SIZES = {"b": (12, 12, 64, 128, 4), "l": (24, 16, 64, 128, 8), "h": (32, 16, 80, 256, 10)}
PARAMETERS = {  # published: 256 pixels with patch 16, 512 with patch 32; fixed positions are counted
    ("b", 16): 131_320_320,
    ("b", 32): 133_387_008,
    ("l", 16): 459_139_808,
    ("l", 32): 461_796_320,
    ("h", 16): 952_842_048,
    ("h", 32): 956_383_296,
}
DISCRIMINATOR_PARAMETERS = {"b": 129_548_545, "l": 456_253_409, "h": 948_578_881}


def published_size(name: str, patch: int) -> dict:
    layers, heads, head_dim, bottleneck, start = SIZES[name]
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    return sizes | {
        "bottleneck_dim": bottleneck,
        "in_context_start": start,
        "patch_size": patch,
        "sample_size": 16 * patch,
    }


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_published_parameter_counts():
    with torch.device("meta"):
        for (name, patch), count in PARAMETERS.items():
            assert JiTTransformer2DModel(**published_size(name, patch)).num_parameters() == count, (name, patch)
        for name, count in DISCRIMINATOR_PARAMETERS.items():
            assert JiTDiscriminator(**published_size(name, 16)).num_parameters() == count, name


def test_the_velocity_is_that_of_the_predicted_image():
    """At first the predicted image is zero, so that v = x_t / max(t, 0.05)."""
    model, x, labels = JiTTransformer2DModel(**TINY), torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 5])
    for time in (1.0, 0.3, 0.01):
        velocity = model(x, time, class_labels=labels).sample
        assert torch.allclose(velocity, x / max(time, 0.05))
    model = randomized(model)
    reference = model(x, torch.full((3,), 0.7), class_labels=labels, return_dict=False)[0]
    assert torch.equal(reference, model(x, 0.7, class_labels=labels).sample) and reference.shape == x.shape
    assert not torch.allclose(reference, model(x, 0.6, class_labels=labels).sample)
    assert not torch.allclose(reference[0], model(x, 0.7, class_labels=labels.flip(0)).sample[0])


def test_rotations_depend_on_distances_alone():
    """<R(p) q, R(p + d) k> is the same for every position p; the first half of a head turns with the row."""
    angles = rotary_angles(4, 8)
    cos, sin = angles.cos(), angles.sin()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 16, 1, 8)
    scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T
    for a, b in ((0, 5), (5, 10), (2, 7), (9, 14)):  # one row down and one column to the right
        assert torch.allclose(scores[a, b], scores[0, 5])
    assert torch.equal(angles[1, :4], torch.zeros(4, dtype=torch.float64)) and angles[1, 4] == 1  # column 1 of row 0
    assert torch.equal(angles[4, 4:], torch.zeros(4, dtype=torch.float64)) and angles[4, 0] == 1  # row 1
    assert angles[4, 2].item() == pytest.approx(10000 ** (-2 / 4))


def test_in_context_tokens_join_late_and_leave():
    model, lengths = randomized(JiTTransformer2DModel(**TINY)), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    model(torch.randn(1, 3, 8, 8), 0.5, class_labels=torch.tensor([1]))
    assert lengths == [16, 16, 19, 19]


def test_dropout_in_the_middle_half():
    model = JiTTransformer2DModel(**{**TINY, "num_layers": 8, "dropout": 0.2})
    rates = [block.attn.dropout.p for block in model.transformer_blocks]
    assert rates == [0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0]


@pytest.mark.parametrize("cls", [JiTTransformer2DModel, JiTDiscriminator])
def test_round_trip_and_gradient_checkpointing(cls, tmp_path):
    model = randomized(cls(**TINY))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])

    def gradients():
        model.zero_grad()
        model(x, 0.4, class_labels=labels, return_dict=False)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    expected = model(x, 0.4, class_labels=labels, return_dict=False)[0]
    assert torch.allclose(again(x, 0.4, class_labels=labels, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)


def test_discriminator_starts_from_the_transformer():
    transformer = randomized(JiTTransformer2DModel(**TINY))
    discriminator = JiTDiscriminator.from_transformer(transformer)
    own, other = discriminator.state_dict(), transformer.state_dict()
    assert {name for name in own if name not in other} == {"proj_out.weight", "proj_out.bias"} - set(other)
    same = [name for name in own if not name.startswith("proj_out")]
    assert len(same) > 40 and all(torch.equal(own[name], other[name]) for name in same)


def test_derivative():
    """Exact modes against each other and central differences in float64; with checkpointing; for all parameters."""
    model = randomized(JiTDiscriminator(**TINY)).double()
    x, first, second = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    t, labels = torch.rand(4, dtype=torch.float64), torch.tensor([0, 1, 2, 5])
    gradients = []
    for method in ("reverse", "forward"):
        model.zero_grad()
        logits, derivatives = DirectionalDerivative(model, method)(x, t, labels, (first, second))
        (derivatives[0].square().mean() + derivatives[1].mean() + logits.square().mean()).backward()
        gradients.append((derivatives, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    for a, b in zip(*(g for _, g in gradients)):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10 * a.abs().max().item() + 1e-14)
    for v, a, b in zip((first, second), *(d for d, _ in gradients)):
        ahead, behind = (model(x + h * v, t + h, labels).logits for h in (1e-5, -1e-5))
        assert (a - b).abs().max() < 1e-10 * a.abs().max()
        assert (a - (ahead - behind) / 2e-5).abs().max() < 1e-5 * a.abs().max()
    model.zero_grad()
    model.enable_gradient_checkpointing()
    logits, derivatives = DirectionalDerivative(model)(x, t, labels, (first, second))
    (derivatives[0].square().mean() + derivatives[1].mean() + logits.square().mean()).backward()
    assert all(
        torch.equal(p.grad, g) for p, g in zip((p for p in model.parameters() if p.requires_grad), gradients[0][1])
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"patch_size": 3}, "not divisible by `patch_size`"),
        ({"in_context_start": 4}, "must be the number of a block"),
        ({"in_context_length": 0}, "must be at least 1"),
        ({"attention_head_dim": 6}, "must be divisible by 4"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        JiTTransformer2DModel(**{**TINY, **change})


def test_bad_inputs():
    model = JiTTransformer2DModel(**TINY)
    with pytest.raises(ValueError, match="expected"):
        model(torch.randn(1, 3, 16, 16), 1.0, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="needs `class_labels`"):
        model(torch.randn(1, 3, 8, 8), 1.0)
