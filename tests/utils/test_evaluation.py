from argparse import Namespace

import numpy as np
import pytest
import torch

from adversarial_flow.utils import evaluation
from adversarial_flow.utils.data import InMemoryDataset, TrainingData
from adversarial_flow.utils.errors import InputError
from adversarial_flow.utils.evaluation import (
    SampleEvaluator,
    evaluate_images,
    frechet_distance,
    halves_distance,
    train_small_classifier,
)


def test_closed_form_of_gaussians():
    """Samples that are whitened and then given exact moments; for diagonal covariances the distance is known."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((500, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    scale, shift = np.array([1.0, 2.0, 0.5, 3.0]), np.array([1.0, 0.0, -2.0, 0.5])
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x) < 1e-9


def test_rank_deficient_features():
    x = np.random.default_rng(0).standard_normal((10, 64))
    assert frechet_distance(x, x) < 1e-6 and frechet_distance(x, x + 1) == pytest.approx(64, rel=1e-6)


def test_halves_are_close_and_noise_is_far():
    features = torch.randn(600, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    halves = halves_distance(features)
    assert 0 < halves < 0.5
    assert halves_distance(features, other_features=features + 3) > 50 * halves


def test_wrong_shapes_raise():
    with pytest.raises(ValueError, match="Two sets of features"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))


def test_classifier_is_deterministic_and_scores_real_images_as_real():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    first, second = (train_small_classifier(images, labels, updates=90) for _ in range(2))
    assert torch.equal(first(images[:10]), second(images[:10]))
    features = first.features(images)
    metrics, _ = evaluate_images(first, images, labels, features)
    assert metrics["class_accuracy"] > 0.95 and metrics["frechet_distance"] < 0.1
    noise, _ = evaluate_images(first, torch.randn(500, 1, 8, 8), labels[:500], features)
    assert noise["class_accuracy"] < 0.4 and noise["frechet_distance"] > 20 * halves_distance(features)


def test_evaluator_of_any_labelled_data(monkeypatch):
    monkeypatch.setattr(evaluation, "REFERENCE_IMAGES", 40)
    images, labels = torch.rand(100, 3, 8, 8) * 2 - 1, torch.arange(100) % 3
    data = TrainingData(InMemoryDataset(images, labels), {0: "a", 1: "b", 2: "c"}, 3, 8)
    flags = {"train_data_dir": "somewhere", "dataset_name": None}
    assert SampleEvaluator.for_data(Namespace(**flags, feature_extractor=None), data) is None
    args = Namespace(**flags, feature_extractor="small_classifier")
    evaluator = SampleEvaluator.for_data(args, data)
    assert evaluator.real_features.shape == (40, 64) and evaluator.num_classes == 3
    assert SampleEvaluator.for_data(args, data) is evaluator  # its classifier is trained once
    other = TrainingData(InMemoryDataset(-images, labels), data.id2label, 3, 8)
    assert SampleEvaluator.for_data(args, other) is not evaluator
    with pytest.raises(InputError, match="--feature_extractor small_classifier: needs images with labels"):
        SampleEvaluator.for_data(args, TrainingData(data.dataset, {}, 3, 8))
