import pytest

from adversarial_flow.utils.schedules import scheduled_value


def test_cosine():
    values = [scheduled_value(0.2, 0.01, step, 100) for step in (0, 50, 100, 1000)]
    assert values == pytest.approx([0.2, 0.105, 0.01, 0.01])


def test_linear_and_constant():
    assert scheduled_value(1.0, 0.0, 25, 100, "linear") == pytest.approx(0.75)
    assert scheduled_value(1.0, 0.0, 25, 100, "constant") == 1.0


def test_monotone():
    values = [scheduled_value(0.2, 0.01, step, 37) for step in range(40)]
    assert all(a >= b for a, b in zip(values, values[1:]))
