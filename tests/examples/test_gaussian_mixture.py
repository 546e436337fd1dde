"""The toys: what is known in closed form, the methods as functions of their seed, the table, the notebook."""

import pickle
import sys
from concurrent.futures import Executor, Future

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_fails
from PIL import Image


sys.path.insert(0, str(ROOT / "examples"))

import gaussian_mixture  # noqa: E402
import toy_claims  # noqa: E402
import toy_runs  # noqa: E402
from toy_data import (  # noqa: E402
    MEANS,
    classifier_gradient,
    draw_data,
    euler_flow,
    even_noise,
    exact_velocity,
    optimal_map,
    wasserstein,
)
from toy_training import Trained, setting_of, train, train_adversarial, train_flow_matching, train_guide  # noqa: E402

from adversarial_flow.utils.errors import InputError  # noqa: E402


SMALL = {"width": 16, "discriminator_width": 16}


# -------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("name", ["mixture", "classes"])
def test_the_optimal_map_and_the_distance(name):
    """The monotone map gives the mixture; the distance of a shifted sample is the shift."""
    noise = even_noise(20_000).double()
    image = optimal_map(noise, name)
    assert (image[:, 0].diff() >= 0).all()
    assert wasserstein(image, name) < 1e-3 and abs(wasserstein(image + 0.3, name) - 0.3) < 1e-3
    data, labels = draw_data(name, 20_000, torch.Generator().manual_seed(1))
    assert wasserstein(data, name) < 0.02
    assert torch.allclose(data[labels == 2].mean(), torch.tensor(0.5), atol=0.01)


@pytest.mark.parametrize("name", ["mixture", "classes"])
def test_the_flow_is_the_monotone_map(name):
    """Two ways to the same points: Euler steps with the exact velocity, and the quantiles of the data."""
    noise = even_noise(1000).double()
    errors = [
        (euler_flow(noise, None, 1.0, steps, name) - optimal_map(noise, name)).abs().mean() for steps in (200, 800)
    ]
    assert errors[1] < 0.01 and errors[1] < errors[0] / 2  # a method of first order
    for timestep in (0.75, 0.5, 0.25):  # the flow on its way: as many steps of the same size, cut short
        points = noise[:, 0]
        for i in range(800, int(800 * timestep), -1):
            points = points - exact_velocity(points, i / 800, None, name) / 800
        assert (points - optimal_map(noise, name, timestep)[:, 0]).abs().max() < 0.01
    # One component is a Gaussian, whose map is affine; guidance 1 is none.
    label = euler_flow(noise, 3, 1.0, 800)
    assert (label - (MEANS[3] + 0.2 * noise)).abs().max() < 0.02


def test_guidance_of_velocities_is_the_gradient_of_a_classifier():
    """v(x_t) - v(x_t, c) = t / (1 - t) grad log p(c | x_t), which classifier-free guidance rests on."""
    points, time = torch.linspace(-3, 3, 50, dtype=torch.float64).requires_grad_(), 0.4
    variance = ((1 - time) * 0.2) ** 2 + time**2
    means = (1 - time) * torch.tensor(MEANS, dtype=torch.float64)
    log_posterior = torch.log_softmax(-((points[:, None] - means) ** 2) / (2 * variance), dim=1)
    for label in range(len(MEANS)):
        (gradient,) = torch.autograd.grad(log_posterior[:, label].sum(), points, retain_graph=True)
        null, conditional = (exact_velocity(points.detach(), time, c, "classes") for c in (None, label))
        assert torch.allclose(null - conditional, time / (1 - time) * gradient, atol=1e-10)
        assert torch.allclose(classifier_gradient(points.detach(), time, label, "classes"), gradient, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("data", ["mixture", "classes", "eight_gaussians", "two_moons"])
@pytest.mark.parametrize("method", ["afm", "gan", "fm", "cafm"])
def test_methods(method, data):
    changes = {"data": data, "steps": 3, "warmup": 2, "pretraining": 3, **SMALL}
    small = setting_of(method, **changes)
    noise = torch.randn(10, small.dim, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 4 if small.num_classes else None
    first, again = (train(small).sample(noise, class_labels=labels) for _ in range(2))
    other = train(setting_of(method, seed=1, **changes)).sample(noise, class_labels=labels)
    assert first.shape == (10, small.dim) and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("num_steps", [2, 4, None])
def test_steps(num_steps):
    trained = train(setting_of("afm", steps=2, num_steps=num_steps, **SMALL))
    noise = torch.randn(10, 1)
    assert len(trained.path(noise)) == (num_steps or 4) + 1
    assert num_steps is not None or trained.path(noise, 7).shape == (8, 10, 1)


@pytest.mark.parametrize("guidance", ["classifier", "classifier_at_data", "classifier_free"])
def test_guidance_pulls_towards_the_guide(guidance):
    """With a guide that holds class 0 for what lies to the left, strong guidance moves class 0 to the left."""
    changes = {"data": "classes", "steps": 300, "guidance": guidance, **SMALL}
    noise, labels = even_noise(100), torch.zeros(100, dtype=torch.long)

    class Left(torch.nn.Module):  # logits of four classes; or a velocity to the left for a class, none without
        def forward(self, points, timestep, class_labels=None):
            if class_labels is None:
                return (torch.cat([-points, points, points, points], dim=1),)
            return (torch.where(class_labels[:, None] == 4, 0.0, 1.0).expand_as(points),)

    weak, strong = (
        train_adversarial(setting_of("afm", guidance_scale=scale, **changes), Left()).sample(
            noise, class_labels=labels
        )
        for scale in (0.0, 30.0)
    )
    assert strong.mean() < weak.mean() - 0.1


def test_classifier_free_guidance_of_the_flow():
    """Scale 1 is the conditional velocity, 0 the one without class; between them velocities are linear."""
    trained = train_flow_matching(setting_of("fm", data="classes", steps=3, **SMALL))
    noise, labels = even_noise(20), torch.full((20,), 2)
    null = trained.sample(noise, 1, torch.full((20,), 4))
    samples = []
    for scale in (0.0, 1.0, 3.0):
        trained.setting.guidance_scale = scale
        samples.append(trained.sample(noise, 1, labels))
    assert torch.allclose(samples[0], null, atol=1e-6)
    assert torch.allclose(samples[2], null + 3 * (samples[1] - null), atol=1e-5)


def test_guides_learn():
    """A short classifier knows the classes of clean samples; a short conditional flow sends classes apart."""
    setting = setting_of("afm", data="classes", steps=300, guidance="classifier", width=32)
    data, labels = draw_data("classes", 1000, torch.Generator().manual_seed(5))
    logits = train_guide(setting)(data, torch.full((1000,), 0.05))[0]
    assert (logits.argmax(1) == labels).float().mean() > 0.95
    setting.guidance = "classifier_free"
    flow = Trained(train_guide(setting), setting_of("fm", data="classes"))
    noise = even_noise(100)
    left, right = (flow.sample(noise, 16, torch.full((100,), label)).mean() for label in (0, 3))
    assert left < -1 and right > 1


def test_afm_learns():
    """1,000 updates bring the distance to the data to a fifth of that of noise, and the map close to the best."""
    trained = train(setting_of("afm", steps=1000, width=64, discriminator_width=64))
    noise = even_noise(4000)
    samples = trained.sample(noise)
    assert wasserstein(samples) < wasserstein(noise) / 5
    assert (samples - optimal_map(noise)).square().mean() < 0.02


# -------------------------------------------------------------------------------------------- script, table, notebook


def test_pictures(tmp_path, capsys):
    for flags in (
        ["fm"],
        ["afm", "--dim", "2", "--data", "two_moons"],
        ["afm", "--guidance", "classifier"],
        ["fm", "--guidance", "classifier_free", "--guidance_scale", "1.5"],
        ["afm", "--num_steps", "any", "--lambda_ot", "0.2", "--lambda_ot_end", "0"],
    ):
        gaussian_mixture.main([*flags, "--steps", "2", "--output", str(tmp_path / "new" / "out.png")])
        assert Image.open(tmp_path / "new" / "out.png").size[0] > 1000
    printed = capsys.readouterr().out
    assert "1-Wasserstein distance to the data" in printed and "Class 3:" in printed


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for message, flags in (
        ("Choose a method", ""),
        ("--data two_moons: of --dim 1 there are: mixture", "afm --data two_moons"),
        ("--steps must be at least 1", "afm --steps 0"),
        ("--num_steps must be a number from 1 to 1000 or any", "afm --num_steps 0"),
        ("--num_steps must be a number from 1 to 1000 or any", "afm --num_steps 99999999999"),
        ("--seed must be a number from 0", "afm --seed -1"),
        ("--seed must be a number from 0", "afm --seed 18446744073709551616"),
        ("--guidance is for --dim 1", "afm --dim 2 --guidance classifier"),
        ("--num_steps is for afm and gan", "fm --num_steps 4"),
        ("--lambda_ot is for afm, not for gan", "gan --lambda_ot 1"),
        ("--lambda_ot must be a number of at least 0", "afm --lambda_ot nan"),
        ("--guidance_scale needs --guidance: classifier_free", "fm --guidance_scale 2"),
        ("--guidance classifier is for one-step afm", "fm --guidance classifier"),
        ("--guidance classifier is for one-step afm", "afm --guidance classifier --num_steps 2"),
        ("--guidance needs --data classes", "afm --guidance classifier --data mixture"),
        ("--output out.doc must be a picture", "afm --output out.doc"),
        ("--output: file/x can't be written to", "afm --output file/x/out.png"),
        ("--reproduce trains all methods with settings of its own: leave out afm", "afm --reproduce"),
        ("leave out --seed", "--reproduce --seed 3"),
        ("--output: file can't be written to", "--reproduce --output file"),
    ):
        assert_fails(message, gaussian_mixture.main, flags.split())
    with pytest.raises(InputError, match="The training diverged"):
        gaussian_mixture.main("afm --steps 3 --lambda_ot 1e39".split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


class InThisProcess(Executor):
    """A pool of processes without processes; what they are sent is pickled all the same."""

    def __init__(self, *args, **kwargs):
        pass

    def submit(self, function, *args):
        function, args = pickle.loads(pickle.dumps((function, args)))
        future = Future()
        future.set_result(function(*args))
        return future


def test_the_table(tmp_path, monkeypatch, capsys):
    """Every section is written, with all pictures; untrained networks don't pass for what is claimed."""
    for module in (toy_runs, toy_claims):
        monkeypatch.setattr(module, "SEEDS", (0, 1, 2))
        monkeypatch.setattr(module, "NOISE", even_noise(100))
    monkeypatch.setattr(toy_runs, "ProcessPoolExecutor", InThisProcess)
    gaussian_mixture.main(["--reproduce", "--steps", "2", "--output", str(tmp_path / "out")])
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line[:5] for line in table.splitlines() if line.startswith("## ")] == [f"## {i}." for i in range(1, 6)]
    assert table.count("**Does not hold.**") == 12 and "**Holds.**" not in table
    for picture in ("maps", "steps", "cafm", "guidance"):
        assert f"({picture}.png)" in table and Image.open(tmp_path / "out" / f"{picture}.png").size[0] > 500


def ideal_paths() -> dict[str, np.ndarray]:
    """What the theory says, as if trained over five seeds."""
    noise, generator = toy_runs.NOISE, np.random.default_rng(0)

    def flow(num_steps: int, error: float = 0.0) -> np.ndarray:
        points = [optimal_map(noise, timestep=1 - i / num_steps)[:, 0].numpy() for i in range(num_steps + 1)]
        points = np.repeat(np.stack(points)[None], 5, axis=0)
        points[:, 1:] += error * generator.standard_normal(points[:, 1:].shape).astype(np.float32)
        return points

    def jump(samples: np.ndarray) -> np.ndarray:
        return np.repeat(np.stack([noise[:, 0].numpy(), samples])[None], 5, axis=0).astype(np.float32)

    def euler(label: int | None, scale: float = 1.0, steps: int = 64, name: str = "mixture") -> np.ndarray:
        return euler_flow(noise, label, scale, steps, name)[:, 0].numpy()

    optimal, identity = optimal_map(noise)[:, 0].numpy(), noise[:, 0].numpy()
    other = jump(optimal)
    for seed in range(5):  # a cyclic shift of the quantiles fits the data as well
        other[seed, 1] = np.roll(optimal, 50 * (seed + 1))
    paths = {
        toy_runs.GAN: other,
        toy_runs.SMALL: other,
        toy_runs.AFM: flow(1, 0.005),
        toy_runs.HEAVY: jump(0.9 * optimal + 0.1 * identity),
        toy_runs.HEAVIER: jump(0.1 * optimal + 0.9 * identity),
        toy_runs.DECAYED: flow(1),
        "AFM, 2 steps": flow(2),
        "AFM, 4 steps": flow(4),
        **{f"AFM for any step, {n} taken": flow(n, 0.05) for n in (1, 2, 4)},
        **{f"flow matching, {n} steps": jump(euler(None, 1.0, n)) for n in (1, 64)},
        **{f"flow matching, {n} steps": flow(n, 0.3) for n in (2, 4)},
        "flow": classes(1.0),
        toy_runs.GUIDED_FLOW: classes(2.0),
        toy_runs.CONDITIONAL: classes(1.0) + 0.02 * generator.standard_normal((5, 4, 2, 400)),
        toy_runs.ON_FLOW: classes(2.0),
        toy_runs.BY_FLOW: classes(2.0),
        toy_runs.AT_DATA: classes(1.0),
        toy_runs.AT_DATA_TWICE: classes(1.0),
    }
    for name, error in (
        (toy_runs.FLOW, 0.02),
        (toy_runs.SCRATCH, 0.02),
        (toy_runs.SCRATCH_INPUT, 0.5),
        (toy_runs.START, 0.2),
        (toy_runs.CONTROL, 0.2),
        (toy_runs.CAFM, 0.1),
        (toy_runs.CAFM_INPUT, 0.4),
    ):
        paths[name] = flow(64, error)
    return paths


def classes(scale: float) -> np.ndarray:
    samples = [euler_flow(toy_runs.NOISE, label, scale)[:, 0].numpy() for label in range(4)]
    noise = np.repeat(toy_runs.NOISE.T.numpy(), 4, axis=0)
    return np.repeat(np.stack([noise, np.stack(samples)], axis=1)[None], 5, axis=0)


def test_the_verdicts(monkeypatch):
    """What the theory says holds in every point; each point fails when the run it speaks of is another."""
    for module in (toy_runs, toy_claims):
        monkeypatch.setattr(module, "NOISE", even_noise(400))
    claims = (
        toy_claims.one_map, toy_claims.transport_weight, toy_claims.few_steps, toy_claims.continuous,
        toy_claims.guidance,
    )  # fmt: skip
    paths = ideal_paths()
    failing = lambda changed: [f.claim for claim in claims for f in claim(paths | changed).findings if not f.holds]  # noqa: E731
    assert failing({}) == []
    any_steps = "AFM for any step, 2 taken"
    for changed, name, words in (
        (toy_runs.GAN, toy_runs.AFM, ["one optimal map", "none or little"]),
        (toy_runs.HEAVIER, toy_runs.AFM, ["too much"]),
        (toy_runs.DECAYED, toy_runs.HEAVIER, ["From the same start"]),
        ("AFM, 2 steps", "flow matching, 2 steps", ["AFM of 2 and of 4"]),
        (any_steps, "flow matching, 2 steps", ["AFM of any step"]),
        (toy_runs.SCRATCH, toy_runs.SCRATCH_INPUT, ["From scratch", "takes the velocity"]),
        (toy_runs.CONTROL, toy_runs.CAFM, ["Post-training"]),
        (toy_runs.CAFM, toy_runs.START, ["Post-training"]),
        (toy_runs.CAFM_INPUT, toy_runs.CAFM, ["takes the velocity"]),
        (toy_runs.ON_FLOW, toy_runs.CONDITIONAL, ["A classifier on the flow", "At t = 0"]),
        (toy_runs.AT_DATA, toy_runs.ON_FLOW, ["At t = 0"]),
    ):
        found = failing({changed: paths[name]})
        assert len(found) == len(words) and all(w in claim for w, claim in zip(words, found)), (changed, found)


def test_the_measures():
    """On maps that are known: the optimal one, the identity, and the exact guided flow."""
    noise = toy_claims.NOISE
    optimal = torch.stack([noise[:, 0], optimal_map(noise)[:, 0]]).numpy()[None]  # (1, 2, N)
    identity = torch.stack([noise[:, 0], noise[:, 0]]).numpy()[None]
    assert toy_claims.to_data(optimal).item() < 1e-3 < 0.3 < toy_claims.to_data(identity).item()
    assert toy_claims.to_optimal_map(optimal).item() == 0 == toy_claims.cost(identity).item()
    assert toy_claims.cost(optimal).item() == pytest.approx(toy_claims.to_optimal_map(identity).item())
    half = torch.stack([noise[:, 0], optimal_map(noise, timestep=0.5)[:, 0], optimal_map(noise)[:, 0]]).numpy()[None]
    assert toy_claims.to_flow(half).item() == 0
    paths = [torch.stack([euler_flow(noise, c, w) for c in range(4)]).numpy()[None, :, None, :, 0] for w in (1.0, 2.0)]
    slope, correlation = toy_claims.displacement(paths[1], paths[0], toy_claims.exact_displacement())
    assert slope.item() == pytest.approx(1) and correlation.item() == pytest.approx(1)
    both = torch.cat([torch.as_tensor(optimal), torch.as_tensor(optimal) + 0.5]).numpy()
    assert toy_claims.between_seeds(both).item() == pytest.approx(0.25, rel=1e-4)


def test_the_notebook_runs():
    """From top to bottom in a kernel of its own, with few updates."""
    notebook = nbformat.read(ROOT / "examples" / "gaussian_mixture.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = "SHARE = 0.002"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "examples"}})
    client.execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/png" in output.data for output in pictures) == 8
