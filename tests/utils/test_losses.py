import math

import pytest
import torch

from adversarial_flow.utils.losses import (
    centering_penalty,
    classifier_free_guidance_loss,
    classifier_guidance_loss,
    discriminator_adversarial_loss,
    generator_adversarial_loss,
    gradient_penalty,
    optimal_transport_loss,
)


def test_adversarial_losses_closed_form():
    real, fake = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    expected_d = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(4.0))) / 2
    expected_g = (math.log1p(math.exp(1.5)) + math.log1p(math.exp(-4.0))) / 2
    assert discriminator_adversarial_loss(real, fake).item() == pytest.approx(expected_d, abs=1e-12)
    assert generator_adversarial_loss(real, fake).item() == pytest.approx(expected_g, abs=1e-12)


def test_adversarial_losses_depend_on_differences_only():
    real, fake = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    for loss in (discriminator_adversarial_loss, generator_adversarial_loss):
        assert torch.allclose(loss(real, fake), loss(real + 7, fake + 7))


def test_gradients_are_sigmoids():
    real = torch.randn(5, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(5, dtype=torch.float64, requires_grad=True)
    grad_real, grad_fake = torch.autograd.grad(discriminator_adversarial_loss(real, fake), (real, fake))
    expected = torch.sigmoid(fake - real).detach() / 5
    assert torch.allclose(grad_real, -expected) and torch.allclose(grad_fake, expected)


def test_gradient_penalty_of_a_linear_discriminator_is_its_squared_gradient():
    """For D(x) = <a, x> the finite difference is exact: E_n <a, n>^2 = ||a||^2."""
    torch.manual_seed(0)
    a = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x, noise = torch.randn(200_000, 3, dtype=torch.float64), torch.randn(200_000, 3, dtype=torch.float64)
    weight = torch.full((200_000,), 0.25, dtype=torch.float64)
    penalty = gradient_penalty(x @ a, (x + 0.01 * noise) @ a, weight, 0.01)
    assert penalty.item() == pytest.approx(0.25 * a.square().sum().item(), rel=0.01)


def test_gradient_penalty_formula_and_gradient():
    logits = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    perturbed = torch.tensor([1.1, 1.7], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.5], dtype=torch.float64)
    penalty = gradient_penalty(logits, perturbed, weight, 0.1)
    assert penalty.item() == pytest.approx((1.0 * 1.0 + 0.5 * 9.0) / 2, abs=1e-9)
    grads = torch.autograd.grad(penalty, (logits, perturbed))
    assert torch.allclose(grads[0], -grads[1]) and grads[1].abs().min() > 0  # both sides are trained


def test_centering_closed_form():
    penalty = centering_penalty(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0]))
    assert penalty.item() == pytest.approx(4.5)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)])
def test_optimal_transport_closed_form(shape):
    """Also for one-dimensional toys of shape (B,)."""
    output, source = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64) + 0.1
    expected = sum(((output[i] - source[i]) ** 2).mean() / weight[i] for i in range(4)) / 4
    assert torch.allclose(optimal_transport_loss(output, source, weight), expected)


def test_classifier_guidance_closed_form():
    """Two classes: -log sigmoid of the difference of the logits; the wrong class pulls with the other's share."""
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    loss = classifier_guidance_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.5))) / 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    share = 1 / (1 + math.exp(-1.5)) / 2
    assert torch.allclose(gradient, torch.tensor([[share - 0.5, 0.5 - share], [share, -share]], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 1), (4, 2, 3, 3)])
def test_classifier_free_guidance_closed_form(shape):
    """The samples move along v - v(c), for each of them 1 / (batch n), and the velocities get no gradient."""
    output, null, conditional = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    loss = classifier_free_guidance_loss(output, null, conditional)
    assert torch.allclose(loss, -sum((o * (n - c)).mean() for o, n, c in zip(output, null, conditional)) / 4)
    gradients = torch.autograd.grad(loss, (output, null, conditional), allow_unused=True)
    assert torch.allclose(gradients[0], -(null - conditional) / output.numel()) and gradients[1:] == (None, None)


def test_losses_of_half_precision_logits_are_float32():
    real, fake = torch.randn(4, dtype=torch.bfloat16), torch.randn(4, dtype=torch.bfloat16)
    assert discriminator_adversarial_loss(real, fake).dtype == torch.float32
    assert centering_penalty(real, fake).dtype == torch.float32
    assert gradient_penalty(real, fake, torch.ones(4), 0.01).dtype == torch.float32
    assert optimal_transport_loss(real, fake, torch.ones(4)).dtype == torch.float32
    assert classifier_guidance_loss(real[:, None], torch.zeros(4, dtype=torch.long)).dtype == torch.float32
    assert classifier_free_guidance_loss(real, fake, fake).dtype == torch.float32
