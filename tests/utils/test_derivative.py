"""The directional derivative: exact in both modes, against differences and closed forms, and its gradients."""

import pytest
import torch
from torch import nn

from adversarial_flow import (
    AdversarialFlowDiscriminator,
    AdversarialFlowTransformer2DModel,
    DirectionalDerivative,
    JiTDiscriminator,
)
from adversarial_flow.utils.losses import (
    discriminator_velocity_loss,
    generator_velocity_loss,
    potential_centering_penalty,
    visible_signal,
)
from adversarial_flow.utils.training import frozen


def make_discriminator(dtype=torch.float64, **config) -> AdversarialFlowDiscriminator:
    torch.manual_seed(0)
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3, **config}
    model = AdversarialFlowDiscriminator(
        sample_size=4, patch_size=2, in_channels=2, time_conditioning="source", norm_type="rms_norm", **config
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def inputs(dtype=torch.float64, batch=5):
    torch.manual_seed(1)
    x, first, second = torch.randn(3, batch, 2, 4, 4, dtype=dtype)
    return x, torch.rand(batch, dtype=dtype), torch.arange(batch) % 3, (first, second)


def loss_and_gradients(derivative, model, arguments):
    model.zero_grad()
    logits, (real, fake) = derivative(*arguments)
    loss = discriminator_velocity_loss(real, fake) + 0.1 * potential_centering_penalty(logits)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_both_exact_modes_agree_and_match_central_differences(time_scale):
    model, (x, t, labels, directions) = make_discriminator(time_scale=time_scale), inputs()
    logits, reverse = DirectionalDerivative(model)(x, t, labels, directions)
    assert torch.allclose(logits, model(x, t, labels).logits) and len(reverse) == 2 and reverse[0].shape == (5,)
    _, forward = DirectionalDerivative(model, "forward")(x, t, labels, directions)
    step = 1e-5 / time_scale
    for v, a, b in zip(directions, reverse, forward):
        ahead, behind = (model(x + h * v, t + h, labels).logits for h in (step, -step))
        scale = a.abs().max()
        assert (a - b).abs().max() < 1e-10 * scale
        assert (a - (ahead - behind) / (2 * step)).abs().max() < 1e-5 * scale
    _, finite = DirectionalDerivative(model, "finite", epsilon=step)(x, t, labels, directions)
    assert (torch.stack(finite) - torch.stack(reverse)).abs().max() < 1e-5 * torch.stack(reverse).abs().max()


def test_parameter_gradients_of_the_modes_agree():
    model, arguments = make_discriminator(), inputs()
    loss, reverse = loss_and_gradients(DirectionalDerivative(model), model, arguments)
    other_loss, forward = loss_and_gradients(DirectionalDerivative(model, "forward"), model, arguments)
    assert loss == pytest.approx(other_loss, rel=1e-12)
    for a, b in zip(reverse, forward):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10 * a.abs().max().item() + 1e-14)
    _, finite = loss_and_gradients(DirectionalDerivative(model, "finite", epsilon=1e-7), model, arguments)
    for a, b in zip(reverse, finite):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item() + 1e-10)


def test_parameter_gradients_match_central_differences():
    model, arguments = make_discriminator(time_scale=1.0), inputs()
    derivative = DirectionalDerivative(model)
    _, gradients = loss_and_gradients(derivative, model, arguments)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(2)
    change = [torch.randn_like(p) for p in parameters]
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            [p.add_(step * c) for p, c in zip(parameters, change)]
        values.append(loss_and_gradients(derivative, model, arguments)[0])
        with torch.no_grad():
            [p.sub_(step * c) for p, c in zip(parameters, change)]
    expected = sum((g * c).sum() for g, c in zip(gradients, change)).item()
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-5)


def test_gradient_checkpointing_changes_nothing():
    """Also when the outer backward comes after the context of the math kernel has ended."""
    model, arguments = make_discriminator(torch.float32), inputs(torch.float32)
    derivative = DirectionalDerivative(model)
    _, plain = loss_and_gradients(derivative, model, arguments)
    model.enable_gradient_checkpointing()
    _, checkpointed = loss_and_gradients(derivative, model, arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))


def test_bf16_autocast():
    model, (x, t, labels, directions) = make_discriminator(torch.float32, qk_norm=True), inputs(torch.float32)
    derivative = DirectionalDerivative(model)
    _, exact = derivative(x, t, labels, directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rounded = derivative(x, t, labels, directions)
        discriminator_velocity_loss(*rounded).backward()
    assert rounded[0].dtype == torch.float32
    assert torch.allclose(torch.stack(exact), torch.stack(rounded), rtol=0.2, atol=0.1 * exact[0].abs().max().item())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_the_generators_step_builds_nothing_of_second_order():
    """With D frozen, J is linear in the direction: its gradient is grad_x D, any attention kernel serves."""
    model, (x, t, labels, (direction, _)) = make_discriminator(), inputs()
    direction.requires_grad_()
    for method in ("reverse", "forward"):
        kernels = []
        hook = model.register_forward_hook(lambda *_, k=kernels: k.append(torch.backends.cuda.flash_sdp_enabled()))
        with frozen(model):
            _, (fake,) = DirectionalDerivative(model, method)(x, t, labels, (direction,))
        hook.remove()
        assert kernels == [method == "reverse"]
        (gradient,) = torch.autograd.grad(generator_velocity_loss(fake), direction)
        x_, t_ = x.clone().requires_grad_(), t.clone().requires_grad_()
        g, h = torch.autograd.grad(model(x_, t_, labels).logits.sum(), (x_, t_))
        j = (g * direction).flatten(1).sum(1) + h
        expected = (2 * (j - 1) / len(x))[:, None, None, None] * g
        assert torch.allclose(fake, j) and torch.allclose(gradient, expected)
        assert all(p.grad is None for p in model.parameters())


class Linear(nn.Module):
    """D(x, t) = <w, x> + b t + c."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.slope = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(()))

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=False):
        return (hidden_states @ self.weight + self.slope * timestep + 0.5,)


@pytest.mark.parametrize("method", ["reverse", "forward", "finite"])
def test_linear_discriminator(method):
    """J = <w, v> + b, whatever x and t; and the gradient of G's loss is 2 (J - 1) w / B."""
    torch.manual_seed(0)
    model = Linear(6).double()
    x, v = torch.randn(2, 4, 6, dtype=torch.float64)
    t = torch.rand(4, dtype=torch.float64)
    v.requires_grad_()
    logits, (derivative,) = DirectionalDerivative(model, method, epsilon=1e-3)(x, t, None, (v,))
    expected = v @ model.weight + model.slope
    assert torch.allclose(derivative, expected) and torch.allclose(logits, model(x, t)[0])
    (gradient,) = torch.autograd.grad(generator_velocity_loss(derivative), v, retain_graph=True)
    assert torch.allclose(gradient, (2 * (expected - 1) / 4)[:, None] * model.weight)


def test_optimal_loss_of_a_linear_gaussian_problem():
    """
    v_real ~ N(m, S) and v_fake = m - delta at one (x_t, t): minimising L^D over g and h gives 2 / (1 + s/2) with
    s = delta^T S^-1 delta; [`visible_signal`] recovers s.
    """
    torch.manual_seed(0)
    count, dim = 4000, 3
    mixing = torch.randn(dim, dim, dtype=torch.float64)
    noise = torch.randn(count, dim, dtype=torch.float64)
    noise = noise - noise.mean(0)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / count)).T  # exactly white
    mean, delta = torch.randn(2, dim, dtype=torch.float64)
    real, fake = mean + noise @ mixing.T, (mean - delta).expand(count, dim)
    signal = delta @ torch.linalg.solve(mixing @ mixing.T, delta)
    rows = torch.cat([real, fake])
    design = torch.cat([rows, torch.ones(2 * count, 1, dtype=torch.float64)], dim=1)
    target = torch.cat([torch.ones(count), -torch.ones(count)]).double()
    solution = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    model = Linear(dim).double()
    with torch.no_grad():
        model.weight.copy_(solution[:dim]), model.slope.copy_(solution[dim])
    zeros = torch.zeros(count, dim, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    _, derivatives = DirectionalDerivative(model)(*zeros, None, (real, fake))
    loss = discriminator_velocity_loss(*derivatives)
    assert loss.item() == pytest.approx(2 / (1 + signal.item() / 2), rel=1e-9)
    assert visible_signal(loss.item()) == pytest.approx(signal.item(), rel=1e-8)


def test_discriminator_from_a_transformer():
    config = {"sample_size": 4, "patch_size": 2, "in_channels": 2, "num_layers": 2, "num_attention_heads": 2}
    transformer = AdversarialFlowTransformer2DModel(
        **config, attention_head_dim=8, num_classes=3, use_null_class=True, time_conditioning="source", time_scale=1.0
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter)
    discriminator = AdversarialFlowDiscriminator.from_transformer(transformer)
    assert discriminator.config.norm_type == "rms_norm" and discriminator.config.time_scale == 1.0
    own, other = discriminator.state_dict(), transformer.state_dict()
    new = {name for name in own if name not in other}
    assert new == {"cls_token"}
    assert all(torch.equal(own[name], other[name]) for name in own if name not in ("cls_token", "proj_out.weight"))
    assert own["proj_out.weight"].shape == (1, 16)


def make_small_discriminator() -> AdversarialFlowDiscriminator:
    return make_discriminator(torch.float32, num_layers=1, time_scale=1.0)


def make_jit_discriminator() -> JiTDiscriminator:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
    tokens = {"bottleneck_dim": 6, "in_context_length": 2, "in_context_start": 1}
    model = JiTDiscriminator(sample_size=4, patch_size=2, in_channels=2, **sizes, **tokens)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("make", [make_small_discriminator, make_jit_discriminator])
def test_compiled(make):
    """One graph; the values and parameter gradients of eager mode, for D's step; G's step stays eager."""
    torch._dynamo.reset()
    model = make()
    arguments, compiled = inputs(torch.float32), DirectionalDerivative(model, compile=True)
    loss, eager = loss_and_gradients(DirectionalDerivative(model), model, arguments)
    torch._dynamo.utils.counters.clear()
    other_loss, other = loss_and_gradients(compiled, model, arguments)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for a, b in zip(eager, other):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-8
    with frozen(model):
        _, (derivative, _) = compiled(*arguments)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.allclose(derivative, DirectionalDerivative(model)(*arguments)[1][0], rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    model = make_discriminator()
    with pytest.raises(ValueError, match="`compile` is for the method 'reverse', not 'forward'"):
        DirectionalDerivative(model, "forward", compile=True)
    with pytest.raises(ValueError, match="`method` must be one of reverse, forward, finite"):
        DirectionalDerivative(model, "backward")
    for processor in model.attn_processors.values():
        processor._attention_backend = "sage"
    with pytest.raises(ValueError, match="'sage' can't be differentiated twice: use .*'_native_math'"):
        DirectionalDerivative(model)
    DirectionalDerivative(model, "finite")
