import torch

from adversarial_flow.utils.randomness import draw_normals_and_uniforms, numbered_generators, sample_seeds


def test_a_sample_keeps_its_noise_however_the_batch_is_divided():
    whole = draw_normals_and_uniforms(sample_seeds(3, 7, list(range(8))), 2, (1, 4, 4), 5, "cpu")
    parts = [draw_normals_and_uniforms(sample_seeds(3, 7, list(p)), 2, (1, 4, 4), 5, "cpu") for p in ([0, 1], [6, 7])]
    assert torch.equal(whole[0][:, :2], parts[0][0]) and torch.equal(whole[0][:, 6:], parts[1][0])
    assert torch.equal(whole[1][:2], parts[0][1]) and torch.equal(whole[1][6:], parts[1][1])


def test_seeds_differ_between_samples_updates_and_runs():
    seeds = [seed for run in (0, 1) for update in range(20) for seed in sample_seeds(run, update, list(range(64)))]
    assert len(set(seeds)) == len(seeds)


def test_distributions():
    normals, uniforms = draw_normals_and_uniforms(sample_seeds(0, 0, list(range(2000))), 1, (1, 4, 4), 4, "cpu")
    assert abs(normals.mean()) < 0.02 and abs(normals.std() - 1) < 0.02
    assert uniforms.min() >= 0 and uniforms.max() < 1 and abs(uniforms.mean() - 0.5) < 0.02


def test_numbered_generators():
    a = [torch.randn(3, generator=g) for g in numbered_generators(5, range(6))]
    b = [torch.randn(3, generator=g) for g in numbered_generators(5, [4, 2])]
    assert torch.equal(a[4], b[0]) and torch.equal(a[2], b[1]) and not torch.equal(a[0], a[1])
