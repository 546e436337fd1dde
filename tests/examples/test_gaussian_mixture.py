"""The toys: each method runs and is a function of its seed; what is known in closed form."""

import importlib.util

import pytest
import torch
from conftest import ROOT, assert_fails
from PIL import Image


@pytest.fixture(scope="module")
def toys():
    spec = importlib.util.spec_from_file_location("gaussian_mixture", ROOT / "examples" / "gaussian_mixture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_optimal_map_and_the_distance(toys):
    """The monotone map gives the mixture; the distance of a shifted sample is the shift."""
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = toys.optimal_map(noise)
    order = noise[:, 0].argsort()
    assert (image[order, 0].diff() >= 0).all()
    assert toys.wasserstein(image) < 0.02 and abs(toys.wasserstein(image + 0.3) - 0.3) < 0.02
    data, labels = toys.draw_data("mixture", 20_000, torch.Generator().manual_seed(1))
    assert toys.wasserstein(data) < 0.02
    assert torch.allclose(data[labels == 2].mean(), torch.tensor(0.5), atol=0.01)


@pytest.mark.parametrize("data", ["mixture", "eight_gaussians", "two_moons"])
@pytest.mark.parametrize("method", ["afm", "gan", "fm", "cafm"])
def test_methods(toys, method, data):
    small = toys.Setting(method, data, steps=3, width=16, discriminator_width=16)
    noise = torch.randn(10, small.dim, generator=torch.Generator().manual_seed(0))
    first, again = (toys.train(small).sample(noise) for _ in range(2))
    other = toys.train(toys.Setting(method, data, 3, seed=1, width=16, discriminator_width=16)).sample(noise)
    assert first.shape == (10, small.dim) and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("num_steps", [2, 4, None])
def test_steps(toys, num_steps):
    trained = toys.train(toys.Setting("afm", steps=2, num_steps=num_steps, width=16, discriminator_width=16))
    noise = torch.randn(10, 1)
    assert len(trained.path(noise)) == (num_steps or 4) + 1
    assert num_steps is not None or trained.path(noise, 7).shape == (8, 10, 1)


def test_afm_learns(toys):
    """1,000 updates bring the distance to the data to a fifth of that of noise, and the map close to the best."""
    trained = toys.train(toys.Setting("afm", steps=1000, width=64, discriminator_width=64))
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    samples = trained.sample(noise)
    assert toys.wasserstein(samples) < toys.wasserstein(noise) / 5
    assert (samples - toys.optimal_map(noise)).square().mean() < 0.05


def test_pictures_and_bad_input(toys, tmp_path):
    for flags in (["fm"], ["afm", "--dim", "2", "--data", "two_moons"]):
        toys.main([*flags, "--steps", "2", "--output", str(tmp_path / "out.png")])
        assert Image.open(tmp_path / "out.png").size[0] > 1000
    main = lambda *flags: toys.main(list(flags))  # noqa: E731
    assert_fails("--data two_moons: of --dim 1 there are: mixture", main, "afm", "--data", "two_moons")
    assert_fails("--steps must be at least 1", main, "afm", "--steps", "0")
    assert_fails("--num_steps must be a positive number or any", main, "afm", "--num_steps", "0")
