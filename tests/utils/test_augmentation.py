import torch

from adversarial_flow.utils.augmentation import NUM_AUGMENTATION_UNIFORMS, augment, erase, translate


def uniforms(batch: int, count: int = NUM_AUGMENTATION_UNIFORMS) -> torch.Tensor:
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(0))


def test_probability_zero_is_the_identity_and_the_pair_is_treated_alike():
    images = torch.randn(16, 2, 8, 8)
    assert augment(images, uniforms(16), 0.0) is images
    mask_a = augment(torch.ones_like(images), uniforms(16), 0.7)
    mask_b = augment(torch.full_like(images, 3.0), uniforms(16), 0.7)
    assert torch.equal(mask_a * 3, mask_b) and not torch.equal(mask_a, torch.ones_like(images))


def test_translation_moves_whole_pixels_within_its_limit():
    images = torch.zeros(200, 1, 10, 10)
    images[:, :, 5, 5] = 1
    moved = translate(images, uniforms(200, 3), probability=1.0)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(200))  # the pixel is never lost: the limit is 3
    rows, columns = moved.squeeze(1).flatten(1).argmax(1) // 10, moved.squeeze(1).flatten(1).argmax(1) % 10
    assert rows.min() == 2 and rows.max() == 8 and columns.min() == 2 and columns.max() == 8


def test_translation_fills_with_zeros():
    moved = translate(torch.ones(1, 1, 10, 10), torch.tensor([[0.0, 1.0, 0.5]]), probability=1.0)
    assert moved[0, 0, :3].sum() == 0 and moved[0, 0, 3:].sum() == 70


def test_erasing_area():
    erased = erase(torch.ones(4000, 1, 64, 64), uniforms(4000, 5), probability=1.0)
    share = 1 - erased.mean((1, 2, 3))
    assert share.min() > 0.05 and share.max() < 0.55 and abs(share.mean() - 0.3) < 0.03


def test_gradient_is_the_same_mask():
    images = torch.randn(8, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(augment(images, uniforms(8), 0.5).sum(), images)
    assert set(gradient.unique().tolist()) <= {0.0, 1.0} and 0 < gradient.mean() < 1
