import pytest
import torch

from adversarial_flow.utils.flow import interpolate, step_times, step_weight, transport


@pytest.mark.parametrize("num_steps", range(1, 257))
def test_fixed_step_grid(num_steps):
    """Exactly N source times 1/N ... 1, and targets that meet them: 0 is reached exactly, nothing is negative."""
    uniforms = ((torch.arange(num_steps) + 0.5) / num_steps)[:, None].expand(-1, 2)
    source, target = step_times(num_steps, uniforms)
    expected = torch.arange(num_steps + 1) / num_steps
    assert torch.equal(target, expected[:-1]) and torch.equal(source, expected[1:])
    assert target[0] == 0 and source[-1] == 1


def test_extreme_uniforms_stay_on_the_grid():
    largest = torch.tensor([[0.0, 0.0], [1 - 2**-24, 0.0]])
    for num_steps in (1, 3, 7, 49, 256):
        source, target = step_times(num_steps, largest)
        assert source.max() == 1 and target.min() == 0 and (target < source).all()


def test_grid_is_uniform():
    source, _ = step_times(4, torch.rand(40_000, 2, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount((source * 4).round().long(), minlength=5)
    assert counts[0] == 0 and ((counts[1:] - 10_000).abs() < 400).all()


def test_any_step_times():
    uniforms = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0))
    source, target = step_times(None, uniforms)
    assert (target <= source).all() and source.min() > 0 and source.max() <= 1 and target.min() >= 0
    assert abs(source.mean() - 0.5) < 0.02 and abs((target / source).mean() - 0.5) < 0.02


def test_interpolate_ends_and_direction():
    x, z = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(interpolate(x, z, torch.zeros(3)), x)
    assert torch.equal(interpolate(x, z, torch.ones(3)), z)
    assert torch.allclose(interpolate(x, z, torch.full((3,), 0.25)), 0.75 * x + 0.25 * z)


def test_transport_with_the_true_velocity_lands_on_the_flow():
    x, z = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    s, t = torch.tensor([1.0, 0.5, 0.75]).double(), torch.tensor([0.0, 0.25, 0.5]).double()
    moved = transport(z - x, interpolate(x, z, s), s, t, "velocity")
    assert torch.allclose(moved, interpolate(x, z, t))
    assert transport(z, x, s, t, "sample") is z


def test_step_weight_is_clamped():
    weight = step_weight(torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0.0, 0.25, 0.4999]))
    assert torch.allclose(weight, torch.tensor([1.0, 0.25, 0.001]))
