# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Quality of generated images: Frechet distance and class accuracy in the features of a small classifier.

The classifier is trained on the data set itself. Its distances are not Inception FIDs and are never called so.
"""

import hashlib
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from adversarial_flow.utils.arguments import on_digits
from adversarial_flow.utils.data import TrainingData
from adversarial_flow.utils.errors import InputError
from adversarial_flow.utils.randomness import numbered_generators


VALIDATION_SEED, EVALUATION_SEED = 1, 2
REFERENCE_IMAGES = 10_000  # of a larger data set so many, evenly spread,
REFERENCE_VALUES = 2**28  # and fewer of large images: 1 GiB


class SmallClassifier(nn.Module):
    """A small convolutional network for small images; `features` of shape `(batch, 64)`, logits from them."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))  # (B, num_classes)


def train_small_classifier(
    images: torch.Tensor, labels: torch.Tensor, updates: int = 450, batch_size: int = 128, seed: int = 0
) -> SmallClassifier:
    """
    Trains a [`SmallClassifier`] on `images` of shape `(N, C, H, W)` in [-1, 1] with integer `labels` of shape `(N,)`,
    on the CPU, in seconds for small images. The result depends on the data and the seed alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(images.shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        epochs = iter(lambda: torch.randperm(len(images)).split(batch_size), None)
        for index in itertools.islice(itertools.chain.from_iterable(epochs), updates):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def frechet_distance(features_a: torch.Tensor | np.ndarray, features_b: torch.Tensor | np.ndarray) -> float:
    """
    Frechet distance of the Gaussians fitted to two sets of features of shape `(N, D)`, in float64:
    ||m_a - m_b||^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), with symmetric eigendecompositions for the square roots.

    Raises:
        ValueError: if a set has fewer than two samples or the dimensions differ.
    """
    features_a, features_b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if min(len(features_a), len(features_b)) < 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"Two sets of features are needed, not shapes {features_a.shape} and {features_b.shape}.")
    mean_difference = features_a.mean(0) - features_b.mean(0)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (features_a, features_b))
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross_trace = np.sqrt(np.linalg.eigvalsh(root_a @ covariance_b @ root_a).clip(0)).sum()
    distance = mean_difference @ mean_difference + np.trace(covariance_a + covariance_b) - 2 * cross_trace
    return float(max(distance, 0.0))


def halves_distance(
    features: torch.Tensor, other_features: torch.Tensor | None = None, splits: int = 10, seed: int = 0
) -> float:
    """
    Mean Frechet distance between two random halves of a set of features: what a perfect model would reach.

    With `other_features`, between a random half of `features` and as many of the others: what a model reaches in the
    same comparison, with the same bias of small sets.
    """
    generator = torch.Generator().manual_seed(seed)
    half, distances = len(features) // 2, []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        second = features[order[half:]]
        if other_features is not None:
            second = other_features[torch.randperm(len(other_features), generator=generator)[: len(second)]]
        distances.append(frechet_distance(features[order[:half]], second))
    return float(np.mean(distances))


@torch.no_grad()
def evaluate_images(
    classifier: SmallClassifier, images: torch.Tensor, labels: torch.Tensor, real_features: torch.Tensor
) -> tuple[dict[str, float], torch.Tensor]:
    """
    Class accuracy and Frechet distance of generated `images` of shape `(N, C, H, W)` in [-1, 1], made for `labels`,
    against `real_features`; and the images' features. They are rounded to 8 bits first, as in a PNG file.
    """
    images = ((images.clamp(-1, 1) * 127.5 + 127.5).round() - 127.5) / 127.5
    features = torch.cat([classifier.features(chunk) for chunk in images.split(1000)])
    accuracy = (classifier.classifier(features).argmax(1) == labels).double().mean().item()
    distance = frechet_distance(features, real_features)
    return {"class_accuracy": accuracy, "frechet_distance": distance}, features


PIXELS_PER_CALL = 2**21  # 32 images of 256 x 256


def sample_images(pipeline, labels: list[int] | None, count: int, seed: int) -> torch.Tensor:
    """
    `count` images of shape `(count, C, H, W)` in [0, 1] on the CPU, for `labels` or of an unconditional pipeline.
    The noise of image i depends on (seed, i) alone.
    """
    side = pipeline.transformer.config.sample_size * pipeline.image_processor.config.vae_scale_factor
    images, batch_size = [], max(1, min(500, PIXELS_PER_CALL // side**2))
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        inputs = {"batch_size": len(indices)} if labels is None else {"class_labels": [labels[i] for i in indices]}
        generator = numbered_generators(seed, indices)
        images.append(pipeline(**inputs, generator=generator, output_type="pt").images.cpu().float())
    return torch.cat(images)


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy()).hexdigest()


class SampleEvaluator:
    """
    Scores samples of a pipeline against a small labelled data set that fits into memory.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): The real images in [-1, 1].
        labels (`torch.Tensor` of shape `(N,)`): Their classes.
    """

    NOTE = (
        "Frechet distance in the 64 features of a small classifier trained on this data set, in float64; it is not an "
        "Inception FID. The ratio compares like with like: sets of half the data's size against halves of the data."
    )

    _made: dict[str, "SampleEvaluator"] = {}  # a run with controls asks for the same one several times

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.reference_sha256 = _sha256(images)
        self.classifier = train_small_classifier(images, labels)
        self.real_features = torch.cat([self.classifier.features(chunk) for chunk in images.split(1000)])
        self.num_classes = self.classifier.classifier.out_features
        self.references = {"frechet_distance": halves_distance(self.real_features)}

    @classmethod
    def for_data(cls, args, data: TrainingData) -> "SampleEvaluator | None":
        """
        The evaluator that `--feature_extractor` asks for, of up to 10,000 training images; always one on digits.

        Raises:
            InputError: if the data has no labels.
        """
        if args.feature_extractor is None and not on_digits(args):
            return None
        if not data.id2label:
            raise InputError(f"--feature_extractor {args.feature_extractor}: needs images with labels.")
        count = min(REFERENCE_IMAGES, REFERENCE_VALUES // (data.channels * data.resolution**2))
        indices = np.unique(np.linspace(0, len(data.dataset) - 1, count).astype(int))
        samples = [data.dataset[int(index)] for index in indices]
        images = torch.stack([sample["image"] for sample in samples])
        labels = torch.tensor([sample["label"] for sample in samples])
        key = _sha256(images) + _sha256(labels)
        if key not in cls._made:
            cls._made[key] = cls(images, labels)
        return cls._made[key]

    def score(self, pipeline, images_per_class: int, seed: int) -> tuple[dict[str, float], torch.Tensor]:
        """Class accuracy and Frechet distance of class-balanced samples, and the samples' features."""
        labels = list(range(self.num_classes)) * images_per_class
        images = sample_images(pipeline, labels, len(labels), seed) * 2 - 1
        return evaluate_images(self.classifier, images, torch.tensor(labels), self.real_features)

    def quick(self, pipeline) -> dict[str, float]:
        """A noisy score for curves: 100 images of each class, on noise that the final score does not use."""
        return self.score(pipeline, images_per_class=100, seed=VALIDATION_SEED)[0]

    def final(self, pipeline) -> dict:
        """The score with its provenance: 500 images of each class."""
        metrics, features = self.score(pipeline, images_per_class=500, seed=EVALUATION_SEED)
        halves = self.references["frechet_distance"]
        half_size = halves_distance(self.real_features, other_features=features)
        metrics.update(halves_frechet_distance=halves, half_size_frechet_distance=half_size, ratio=half_size / halves)
        return {
            "metrics": metrics,
            "note": self.NOTE,
            "num_images": len(features),
            "extractor": "small classifier trained on the training images",
            "reference": f"{len(self.real_features)} training images",
            "reference_sha256": self.reference_sha256,
            "evaluation_seed": EVALUATION_SEED,
        }
