import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler

from adversarial_flow import AdversarialFlowPipeline, AdversarialFlowTransformer2DModel


def make_pipeline(num_steps=1, prediction_type=None, num_classes=3, vae=None, **config):
    time_conditioning = {1: "none", None: "source_target"}.get(num_steps, "source")
    time_conditioning = config.pop("time_conditioning", time_conditioning)
    prediction_type = prediction_type or ("sample" if num_steps == 1 else "velocity")
    config = {"sample_size": 8, "in_channels": 1, **config}
    torch.manual_seed(0)
    model = AdversarialFlowTransformer2DModel(
        patch_size=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=num_classes,
        time_conditioning=time_conditioning,
        prediction_type=prediction_type,
        **config,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    id2label = None if num_classes is None else {"0": "zero, nought", "1": "one", "2": "two"}
    pipeline = AdversarialFlowPipeline(model, FlowMapEulerDiscreteScheduler(), vae, id2label, num_steps)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


@pytest.mark.parametrize("num_steps,prediction_type", [(1, "sample"), (1, "velocity"), (3, "velocity"), (2, "sample")])
def test_samples_are_the_flow_map_of_the_noise(num_steps, prediction_type):
    pipeline = make_pipeline(num_steps, prediction_type)
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    expected = noise
    for i in range(num_steps, 0, -1):
        output = pipeline.transformer(expected, i / num_steps, (i - 1) / num_steps, labels).sample
        expected = output if prediction_type == "sample" else expected - output / num_steps
    sampled = pipeline([0, 2], latents=noise, output_type="latent").images
    assert torch.allclose(sampled, expected.detach(), atol=1e-5)


def test_any_step_model_takes_every_number_of_steps():
    pipeline, calls = make_pipeline(None), []
    pipeline.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    for steps, expected in ((None, 8), (1, 1), (5, 5)):
        calls.clear()
        pipeline(0, num_inference_steps=steps)
        assert len(calls) == expected
        times = [(float(k["timestep"]), float(k["r_timestep"])) for k in calls]
        assert times[0][0] == 1 and times[-1][1] == 0 and all(a[1] == b[0] for a, b in zip(times, times[1:]))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_sample_i_does_not_depend_on_the_batch(num_steps):
    pipeline = make_pipeline(num_steps)
    labels = [0, 1, 2, 1]
    together = pipeline(labels, generator=generator(), output_type="latent").images
    one = generator()
    alone = torch.cat([pipeline(label, generator=one, output_type="latent").images for label in labels])
    # The noise is the same bit by bit; the kernels of another batch size may sum in another order.
    one = generator()
    noise = [pipeline.prepare_latents(1, one, None) for _ in labels]
    assert torch.equal(pipeline.prepare_latents(4, generator(), None), torch.cat(noise))
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4)
    listed = pipeline(labels, generator=[generator(i) for i in range(4)], output_type="latent").images
    alone = pipeline(2, generator=generator(2), output_type="latent").images
    assert torch.allclose(listed[2:3], alone, rtol=1e-4, atol=1e-4) and not torch.allclose(
        listed[1:2], alone, atol=0.1
    )


def test_output_types_labels_and_tuple():
    pipeline = make_pipeline()
    images = pipeline(["one", "nought", 2], generator=generator()).images
    assert [image.size for image in images] == [(8, 8)] * 3 and images[0].mode == "L"
    array = pipeline([1, 0, 2], generator=generator(), output_type="np").images
    tensor = pipeline(torch.tensor([1, 0, 2]), generator=generator(), output_type="pt", return_dict=False)[0]
    assert array.shape == (3, 8, 8, 1) and tensor.shape == (3, 1, 8, 8)
    assert 0 <= array.min() and array.max() <= 1 and np.allclose(array[..., 0], tensor[:, 0].numpy())
    assert np.array_equal(np.asarray(images[0]), (array[0, ..., 0] * 255).round().astype("uint8"))


def test_unconditional():
    pipeline = make_pipeline(num_classes=None)
    assert len(pipeline().images) == 1 and len(pipeline(batch_size=3).images) == 3
    with pytest.raises(ValueError, match="unconditional"):
        pipeline(class_labels=0)


def test_latent_model():
    vae = tiny_vae()
    pipeline = make_pipeline(vae=vae, in_channels=4)
    latents = pipeline(1, generator=generator(), output_type="latent").images
    images = pipeline(1, generator=generator(), output_type="pt").images
    expected = (vae.decode(latents / 0.5 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    assert images.shape == (1, 3, 16, 16) and torch.allclose(images, expected.detach(), atol=1e-5)


def test_callback():
    pipeline, seen = make_pipeline(4), []

    def callback(pipe, step, timestep, inputs):
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(inputs["latents"])}

    pipeline(0, callback_on_step_end=callback)
    assert seen == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]
    assert pipeline(0, callback_on_step_end=callback, output_type="latent").images.abs().max() == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"class_labels": 0, "num_inference_steps": 2}, r"trained for 4 step\(s\) and can't be sampled in 2"),
        ({"class_labels": 0, "num_inference_steps": 0}, "positive integer"),
        ({"class_labels": 3}, "ids from 0 to 2"),
        ({"class_labels": []}, "empty"),
        ({"class_labels": "seven"}, "no class named 'seven'"),
        ({}, "pass `class_labels`"),
        ({"class_labels": 0, "output_type": "jpg"}, "`output_type` must be"),
        ({"class_labels": [0, 1], "batch_size": 3}, "number of class labels"),
        ({"class_labels": 0, "latents": torch.zeros(1, 1, 4, 4)}, "`latents` must have shape"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators were passed for a batch of 2"),
    ],
)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(4)(**arguments)


def test_bfloat16_model_has_the_same_noise():
    pipeline = make_pipeline()
    reference = pipeline.prepare_latents(2, generator(), None)
    pipeline.to(torch.bfloat16)
    assert torch.equal(pipeline.prepare_latents(2, generator(), None), reference.bfloat16())
    assert pipeline([0, 1], output_type="pt").images.dtype == torch.float32


@pytest.mark.parametrize("num_steps", [4, None])
def test_round_trip_in_a_fresh_process(tmp_path, num_steps):
    pipeline = make_pipeline(num_steps, vae=tiny_vae() if num_steps == 4 else None, in_channels=4)
    pipeline.save_pretrained(tmp_path / "model")
    expected = pipeline(["two", 1], generator=generator(5), output_type="latent").images
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import torch
torch.set_num_threads(1)
from adversarial_flow import AdversarialFlowPipeline
pipe = AdversarialFlowPipeline.from_pretrained("model")
assert pipe.config.num_steps == {num_steps} and (pipe.vae is not None) == {num_steps == 4}
images = pipe(["two", 1], generator=torch.Generator().manual_seed(5), output_type="latent").images
torch.testing.assert_close(images, torch.load("expected.pt"), rtol=1e-4, atol=1e-5)
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip().endswith("equal"), result.stderr


def test_names_with_commas():
    """Each of a class's names, and all of them together: "New York, NY" is one name to its user."""
    pipeline = make_pipeline()
    assert pipeline.get_label_ids(["zero", "nought", "zero, nought", "two"]) == [0, 0, 0, 2]


def test_progress_bar(capsys):
    pipeline = make_pipeline(4)
    pipeline(0)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False)
    pipeline(0)
    assert "4/4" in capsys.readouterr().err


def test_model_cpu_offload_moves_every_model_in_order():
    """Without an accelerator the "device" is the CPU: the hooks are real, the moves are not."""
    pipeline = make_pipeline(vae=tiny_vae(), in_channels=4)
    expected = pipeline(1, generator=generator(), output_type="pt").images
    pipeline.enable_model_cpu_offload(device="cpu")
    assert len(pipeline._all_hooks) == 2
    assert pipeline.transformer._hf_hook is pipeline._all_hooks[0].hook
    assert torch.equal(pipeline(1, generator=generator(), output_type="pt").images, expected)


def make_flow_pipeline():
    return make_pipeline(None, time_conditioning="source", prediction_type="velocity", use_null_class=True)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_flow_is_integrated_on_a_uniform_grid(sampler):
    pipeline = make_flow_pipeline()
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    x, steps = noise, 5
    for i in range(steps, 0, -1):
        velocity = pipeline.transformer(x, i / steps, class_labels=labels).sample
        if sampler == "heun":
            end = pipeline.transformer(x - velocity / steps, (i - 1) / steps, class_labels=labels).sample
            velocity = (velocity + end) / 2
        x = x - velocity / steps
    sampled = pipeline([0, 2], 5, sampler=sampler, latents=noise, output_type="latent").images
    assert torch.allclose(sampled, x.detach(), rtol=1e-4, atol=1e-4)


def test_samplers_converge_with_their_orders():
    """The flow of v = x + t in closed form: Euler's error halves with the step, Heun's is a quarter."""
    pipeline = make_flow_pipeline().to(torch.float64)
    pipeline.transformer.forward = lambda x, timestep, **kwargs: (x + timestep,)
    noise = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    exact = (noise + 2) * torch.exp(torch.tensor(-1.0)) - 1  # x' = x + t from t = 1 to 0
    errors = {}
    for sampler in ("euler", "heun"):
        results = [pipeline(0, n, sampler=sampler, latents=noise, output_type="latent").images for n in (20, 40)]
        errors[sampler] = [(result - exact).abs().max().item() for result in results]
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.1)
    assert errors["heun"][0] / errors["heun"][1] == pytest.approx(4, rel=0.1)


def test_guidance_in_its_interval():
    pipeline = make_flow_pipeline()
    noise, null = torch.randn(1, 1, 8, 8), torch.tensor([3])
    plain = pipeline(1, 2, latents=noise, output_type="latent").images
    assert torch.equal(pipeline(1, 2, guidance_scale=1.0, latents=noise, output_type="latent").images, plain)
    x = noise
    for time, scale in ((1.0, 1.0), (0.5, 3.0)):  # the interval leaves the first step alone
        v_class, v_null = (pipeline.transformer(x, time, class_labels=c).sample for c in (torch.tensor([1]), null))
        x = x - 0.5 * (v_null + scale * (v_class - v_null))
    guided = pipeline(1, 2, guidance_scale=3.0, guidance_interval=(0.0, 0.9), latents=noise, output_type="latent")
    assert torch.allclose(guided.images, x.detach(), rtol=1e-4, atol=1e-4) and not torch.allclose(guided.images, plain)


def test_steps_by_default():
    assert make_pipeline(None).default_num_inference_steps == 8
    assert make_flow_pipeline().default_num_inference_steps == 50
    assert make_pipeline(4).default_num_inference_steps == 4


def test_samplers_and_guidance_that_do_not_fit():
    with pytest.raises(ValueError, match="`sampler='heun'` integrates a velocity"):
        make_pipeline(4)(0, sampler="heun")
    with pytest.raises(ValueError, match="`sampler` must be"):
        make_flow_pipeline()(0, sampler="rk4")
    with pytest.raises(ValueError, match="`guidance_interval` must be two times"):
        make_flow_pipeline()(0, guidance_scale=2.0, guidance_interval=(0.9, 0.1))
    for pipeline in (make_pipeline(4), make_pipeline(4, num_classes=None)):
        with pytest.raises(ValueError, match="needs a model with a null class"):
            pipeline(
                **({} if pipeline.transformer.config.num_classes is None else {"class_labels": 0}), guidance_scale=2
            )
