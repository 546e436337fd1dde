import copy

import pytest
import torch

from adversarial_flow.utils.gradient_normalization import GradientNormalization, gradient_square


def test_first_gradient_has_unit_norm():
    """The released code starts its average at 0 without correction: its first gradient is sqrt(10) too large."""
    gradient = torch.randn(16, 3, 4, 4, dtype=torch.float64) * 1e-3
    normalized = gradient * GradientNormalization().update(gradient_square(gradient))
    assert gradient_square(normalized).sqrt().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6])
def test_invariance_to_the_scale_of_the_loss(scale):
    gradients = [torch.randn(8, 5, dtype=torch.float64) for _ in range(6)]
    plain, scaled = GradientNormalization(eps=0.0), GradientNormalization(eps=0.0)
    for gradient in gradients:
        a = gradient * plain.update(gradient_square(gradient))
        b = scale * gradient * scaled.update(gradient_square(scale * gradient))
        assert torch.allclose(a, b, rtol=1e-10)


def test_square_does_not_depend_on_the_batch_or_its_division():
    """The gradient of a mean over 12 samples, whole and as the mean of 3 micro-batches of 4."""
    directions = torch.randn(12, 2, 3, dtype=torch.float64)
    whole = gradient_square(directions / 12)
    parts = torch.stack([gradient_square(part / 4) for part in directions.split(4)]).mean()
    doubled = gradient_square(torch.cat([directions, directions]) / 24)
    assert torch.allclose(whole, parts) and torch.allclose(whole, doubled)


def test_closed_form_of_the_bias_corrected_average():
    normalization = GradientNormalization(decay=0.9, eps=0.0)
    squares = [4.0, 1.0, 9.0]
    average = 0.0
    for k, square in enumerate(squares, start=1):
        factor = normalization.update(torch.tensor(square, dtype=torch.float64))
        average = 0.9 * average + 0.1 * square
        assert factor.item() == pytest.approx((average / (1 - 0.9**k)) ** -0.5, rel=1e-12)


def test_a_spike_is_bounded():
    """The current square is part of the average: no gradient comes out longer than sqrt(1 / (1 - decay))."""
    normalization = GradientNormalization()
    for _ in range(50):
        normalization.update(torch.tensor(1.0))
    spike = torch.tensor(1e8)
    assert (spike.sqrt() * normalization.update(spike)).item() < 10**0.5 + 1e-3


def test_state_is_restored():
    first = GradientNormalization()
    for square in (1.0, 3.0, 2.0):
        first.update(torch.tensor(square))
    second = GradientNormalization()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.update(torch.tensor(5.0)), second.update(torch.tensor(5.0)))
