import pytest
import torch

from adversarial_flow.utils.cafm import Phases
from adversarial_flow.utils.flow import sample_timesteps


def sequence(phases: Phases, count: int, loss: float = 1.9) -> str:
    updates = ""
    for _ in range(count):
        if phases.generator_is_next():
            phases.after_generator()
            updates += "G"
        else:
            phases.after_discriminator(loss)
            updates += "D"
    return updates


@pytest.mark.parametrize(
    "warmup,ttur,expected", [(3, 2, "DDDGDDGDDGDD"), (1, 1, "DGDGDGDGDGDG"), (0, 3, "GDDDGDDDGDDD")]
)
def test_warmup_is_exact_and_then_n_to_one(warmup, ttur, expected):
    """W updates of D before the first one of G: the released code makes W + 1."""
    assert sequence(Phases(warmup, ttur, 0.1), 12) == expected


@pytest.mark.parametrize("cut", range(12))
def test_resuming_at_any_place_of_the_cycle(cut):
    first = Phases(3, 2, 0.1)
    before = sequence(first, cut)
    second = Phases(3, 2, 0.1)
    second.load_state_dict(first.state_dict())
    assert before + sequence(second, 12 - cut) == "DDDGDDGDDGDD"


def test_auto_waits_for_the_signal():
    """The average loss 2 - 0.2 (1 - 0.98^k) reaches 4 / 2.1, where s = 0.1, after 33 updates with a loss of 1.8."""
    phases = Phases(None, 2, 0.1)
    assert sequence(phases, 100, loss=2.0) == "D" * 100 and phases.visible_signal == 0
    updates = sequence(phases, 40, loss=1.8)
    assert updates.index("G") == 33 and updates[33:] == "GDDGDDG" and phases.warmup == 133
    resumed = Phases(None, 2, 0.1)
    resumed.load_state_dict(phases.state_dict())
    assert resumed.warmup == 133 and sequence(resumed, 3) == sequence(phases, 3)


def test_times():
    """Quantiles: uniform; logit-normal with the mean and deviation given; and a shift that keeps 0 and 1."""
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    uniform = sample_timesteps(uniforms, "uniform", 0.8, 0.8, 1.0)
    assert uniform.mean().item() == pytest.approx(0.5) and 0 < uniform.min() and uniform.max() <= 1
    logits = torch.logit(sample_timesteps(uniforms, "logit_normal", 0.8, 0.6, 1.0))
    assert logits.mean().item() == pytest.approx(0.8, abs=1e-3) and logits.std().item() == pytest.approx(0.6, abs=1e-3)
    shifted = sample_timesteps(uniforms, "uniform", 0.8, 0.8, 3.0)
    own = 1 - uniform  # Z-Image's time, 0 = noise, with its shift of 1/3
    assert torch.allclose(1 - shifted, own / 3 / (1 + (1 / 3 - 1) * own))
    assert sample_timesteps(torch.zeros(1), "logit_normal", 0.8, 0.8, 1.0) <= 1
