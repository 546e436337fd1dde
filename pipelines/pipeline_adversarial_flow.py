# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""The pipeline that samples adversarial flow models.

This file imports nothing but torch, diffusers and what diffusers needs, so that it can be uploaded next to the weights
as it is. `save_pretrained` does so.
"""

import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import FlowMapEulerDiscreteScheduler
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, snapshot_download, upload_folder


# Sampling steps when none are asked for: of an any-step model, as in the released code, and of a model of the flow's
# velocity (flow matching, CAFM), which has no target time.
ANY_STEP_DEFAULT, FLOW_DEFAULT = 8, 50

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from adversarial_flow import AdversarialFlowPipeline

        >>> pipe = AdversarialFlowPipeline.from_pretrained("afm-digits")
        >>> image = pipe(class_labels=7, generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""


class AdversarialFlowPipeline(DiffusionPipeline):
    r"""
    Class-conditional or unconditional images from an adversarial flow model (arXiv 2511.22475), in one, few or any
    number of steps, or from a continuous one (arXiv 2604.11521) or a flow-matching model, whose flow is integrated.

    Parameters:
        transformer ([`AdversarialFlowTransformer2DModel`]): The generator.
        scheduler ([`FlowMapEulerDiscreteScheduler`]): Makes the steps of a model that predicts velocities.
        vae ([`AutoencoderKL`], *optional*): Decodes latents to images; without it the model works in pixels.
        id2label (`dict`, *optional*): The name of each class id; several names of one class are separated by commas
            (each of them, and all together, can be asked for).
        num_steps (`int`, *optional*, defaults to 1):
            The number of steps trained for; `None` means any number, and is what models of a velocity have.
        vae_name_or_path (`str`, *optional*):
            A VAE on the Hub or on disk to load when none is given: a reference, for folders without weights of a VAE.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: FlowMapEulerDiscreteScheduler,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
        num_steps: int | None = 1,
        vae_name_or_path: str | None = None,
    ):
        super().__init__()
        if vae is None and vae_name_or_path is not None:
            vae = AutoencoderKL.from_pretrained(vae_name_or_path)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        id2label = {int(index): str(name) for index, name in (id2label or {}).items()}
        self.register_to_config(id2label=id2label, num_steps=num_steps, vae_name_or_path=vae_name_or_path)
        self.labels = {name.strip(): index for index, names in id2label.items() for name in names.split(",")}
        self.labels.update({name: index for index, name in id2label.items()})
        vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae_scale_factor)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        r"""
        Saves the pipeline with the two files of code that it needs, so that
        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it where this package is not.

        Args:
            save_directory (`str`): A folder.
            push_to_hub (`bool`, defaults to `False`): Upload the folder afterwards.
            safe_serialization, variant, max_shard_size, kwargs: As for [`~DiffusionPipeline.save_pretrained`].
        """
        hub = {key: kwargs.pop(key) for key in ("repo_id", "token", "private") if key in kwargs}
        commit = {key: kwargs.pop(key) for key in ("commit_message", "create_pr") if key in kwargs}
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        index["_class_name"] = [_copy_code(type(self), folder), type(self).__name__]
        transformer = getattr(self.transformer, "_orig_mod", self.transformer)  # of a compiled model
        index["transformer"] = [_copy_code(type(transformer), folder / "transformer"), type(transformer).__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")
        if push_to_hub:
            name = hub.pop("repo_id", folder.resolve().name)
            token = hub.get("token")
            repo_id = create_repo(name, exist_ok=True, **hub).repo_id
            upload_folder(repo_id=repo_id, folder_path=folder, token=token, **commit)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        r"""
        Loads a pipeline; the arguments are those of [`~DiffusionPipeline.from_pretrained`]. The installed package uses
        its own code and never a folder's, which is not even downloaded, so that no trust is needed.
        """
        name = pretrained_model_name_or_path
        if "vae" in kwargs and kwargs["vae"] is None:
            kwargs.setdefault("vae_name_or_path", None)  # no VAE was asked for, also none that is referred to
        if _is_installed(cls) and not os.path.isdir(name):
            options = ("cache_dir", "force_download", "local_files_only", "token", "revision")
            hub = {key: kwargs[key] for key in options if key in kwargs}
            ending = "bin" if kwargs.get("use_safetensors") is False else "safetensors"
            weights = f"*.{kwargs['variant']}*.{ending}" if kwargs.get("variant") else f"*.{ending}"
            others = [] if kwargs.get("variant") else [f"*/*.*.{ending}"]  # weights of variants
            folders = ("transformer", "scheduler", "vae")
            patterns = [cls.config_name] + [f"{folder}/{end}" for folder in folders for end in ("*.json", weights)]
            pretrained_model_name_or_path = snapshot_download(
                str(name), allow_patterns=patterns, ignore_patterns=others, **hub
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """The config of a saved pipeline, which names the installed package's code if it is there."""
        config = super().load_config(*args, **kwargs)
        if not _is_installed(cls):
            return config
        values = config[0] if isinstance(config, tuple) else config
        if isinstance(values.get("_class_name"), list):
            values["_class_name"] = values["_class_name"][1]
        module, class_name = values.get("transformer") or ("", None)
        own = f"adversarial_flow.models.{module.rsplit('.', 1)[-1]}"
        if own in sys.modules:
            values["transformer"] = [own, class_name]
        return config

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        r"""
        Maps names of classes to class ids.

        Raises:
            ValueError: if a name is not known.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                known = ", ".join(map(repr, list(self.labels)[:20])) or "none: this model was saved without names"
                raise ValueError(f"There is no class named {name!r}. Known names: {known}.")
        return [self.labels[name] for name in names]

    @property
    def default_num_inference_steps(self) -> int:
        """The number of steps when none is asked for."""
        if self.config.num_steps is not None:
            return self.config.num_steps
        return FLOW_DEFAULT if self.is_flow else ANY_STEP_DEFAULT

    @property
    def is_flow(self) -> bool:
        """Whether the transformer predicts the velocity of the flow itself, at one time."""
        return self.config.num_steps is None and self.transformer.config.get("time_conditioning", "source") == "source"

    def check_inputs(
        self,
        class_labels: list[int] | None,
        batch_size: int | None,
        num_inference_steps: int,
        output_type: str,
        guidance_scale: float = 1.0,
        sampler: str = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """Raises a `ValueError` that says what to change when the arguments do not fit the model."""
        num_classes, trained = self.transformer.config.num_classes, self.config.num_steps
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be a positive integer, not {num_inference_steps!r}.")
        if trained is not None and num_inference_steps != trained:
            raise ValueError(
                f"This model was trained for {trained} step(s) and can't be sampled in {num_inference_steps}: leave "
                "`num_inference_steps` out, or use a model trained with `--num_steps any`."
            )
        if sampler not in ("euler", "heun"):
            raise ValueError(f"`sampler` must be 'euler' or 'heun', not {sampler!r}.")
        if sampler == "heun" and not self.is_flow:
            raise ValueError("`sampler='heun'` integrates a velocity, and this model makes steps: leave it out.")
        if guidance_scale != 1.0 and not getattr(self.transformer.config, "use_null_class", False):
            raise ValueError(
                f"`guidance_scale={guidance_scale}` needs a model with a null class; this one has none: leave it out."
            )
        if not (len(guidance_interval) == 2 and 0 <= guidance_interval[0] <= guidance_interval[1] <= 1):
            raise ValueError(f"`guidance_interval` must be two times in [0, 1], not {guidance_interval!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', not {output_type!r}.")
        if num_classes is None and class_labels is not None:
            raise ValueError("This model is unconditional: leave `class_labels` out and use `batch_size`.")
        if num_classes is not None:
            if class_labels is None:
                raise ValueError(f"This model has {num_classes} classes: pass `class_labels`, ids or names.")
            highest = num_classes + int(self.transformer.config.use_null_class)
            wrong = [label for label in class_labels if not 0 <= label < highest]
            if wrong or not class_labels:
                raise ValueError(f"`class_labels` must be ids from 0 to {highest - 1}, not {wrong or 'empty'}.")
            if batch_size not in (None, len(class_labels)):
                raise ValueError("`batch_size` is for unconditional models; here it is the number of class labels.")
        elif batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, not {batch_size}.")

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Noise of shape `(batch_size, channels, height, width)`. It is drawn sample by sample, so that sample i of a
        generator is the same whatever the batch size.
        """
        config, device, dtype = self.transformer.config, self._execution_device, self.transformer.dtype
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"`latents` must have shape {shape}, not {tuple(latents.shape)}.")
            return latents.to(device=device, dtype=dtype)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were passed for a batch of {batch_size}.")
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        # Drawn in float32 and then rounded: the dtype of the model does not change the noise.
        noise = [randn_tensor((1, *shape[1:]), generator=g, device=device, dtype=torch.float32) for g in generators]
        return torch.cat(noise).to(dtype)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images in [-1, 1]; the identity for a model without VAE."""
        if self.vae is None:
            return latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        return self.vae.decode(latents, return_dict=False)[0]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str = "euler",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*):
                Ids or names of the classes, one image for each. Required by a class-conditional model.
            num_inference_steps (`int`, *optional*):
                Number of steps. Defaults to the number that the model was trained for (8 for an any-step model, 50
                for a model of a velocity).
            batch_size (`int`, *optional*, defaults to 1): Number of images of an unconditional model.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance v_null + w (v_c - v_null) of a model with a null class; 1 is without.
            guidance_interval (`tuple`, defaults to `(0.0, 1.0)`): The times (1 is noise) at which it is applied.
            sampler (`str`, defaults to `"euler"`):
                `"euler"`, or `"heun"`, two evaluations a step, for a model of a velocity. JiT's last step is Euler's:
                its velocity is not exact near the data.
            generator (`torch.Generator` or `list`, *optional*): For reproducible noise; a list has one for each image.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): The noise itself.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (in [0, 1], channels last), `"pt"` (in [0, 1], channels first) or `"latent"` (what the
                transformer returned).
            return_dict (`bool`, defaults to `True`): Return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step, timestep, {"latents": ...})`; it may return a
                dictionary with other latents.
            callback_on_step_end_tensor_inputs (`list`, defaults to `["latents"]`): What the callback is given.

        Returns:
            `ImagePipelineOutput` or `tuple`: the images.

        Raises:
            ValueError: on labels, shapes or a number of steps that the model can't serve.
        Examples:
        """
        class_labels = self._label_ids(class_labels)
        if num_inference_steps is None:
            num_inference_steps = self.default_num_inference_steps
        self.check_inputs(
            class_labels, batch_size, num_inference_steps, output_type, guidance_scale, sampler, guidance_interval
        )
        if class_labels is not None:
            batch_size = len(class_labels)
        elif batch_size is None:
            batch_size = 1 if latents is None else len(latents)

        device = self._execution_device
        labels = None if class_labels is None else torch.tensor(class_labels, device=device)
        latents = self.prepare_latents(batch_size, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sigmas = self.scheduler.sigmas

        def predict(latents: torch.Tensor, time: torch.Tensor, r_time: torch.Tensor) -> torch.Tensor:
            # Without guidance the time is not read: that would wait for the device.
            guided = guidance_scale != 1.0 and guidance_interval[0] <= float(time) <= guidance_interval[1]
            return self._predict(latents, time, r_time, labels, guidance_scale if guided else 1.0)

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                time, r_time = sigmas[i], sigmas[i + 1]
                model_output = predict(latents, time, r_time)
                if self.transformer.config.get("prediction_type", "velocity") == "sample":
                    latents = model_output
                else:
                    last_by_euler = self.transformer.config.get("time_floor", 0.0) > 0 and i + 1 == num_inference_steps
                    if sampler == "heun" and not last_by_euler:
                        end = latents - (time - r_time) * model_output
                        model_output = (model_output + predict(end, r_time, r_time)) / 2
                    latents = self.scheduler.step(model_output, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    inputs = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, i, timestep, inputs) or {}).get("latents", latents)
                progress_bar.update()

        images = latents if output_type == "latent" else self.decode_latents(latents).float()
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents, time, r_time, labels, guidance_scale: float) -> torch.Tensor:
        """The transformer's output; with guidance, of the labels and of the null class in one batch."""
        times = {"timestep": time, "r_timestep": r_time, "return_dict": False}
        if guidance_scale == 1.0:
            return self.transformer(latents, class_labels=labels, **times)[0]
        null = torch.full_like(labels, self.transformer.config.num_classes)
        both = self.transformer(torch.cat([latents, latents]), class_labels=torch.cat([null, labels]), **times)[0]
        output_null, output_class = both.chunk(2)
        return output_null + guidance_scale * (output_class - output_null)

    def _label_ids(self, class_labels) -> list[int] | None:
        if class_labels is None:
            return None
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        return [self.get_label_ids(label)[0] if isinstance(label, str) else int(label) for label in class_labels]


def _is_installed(cls: type) -> bool:
    """Whether the class is the package's or derived from it, and not one that was loaded with `trust_remote_code`."""
    return any(base.__module__.startswith("adversarial_flow.") for base in cls.__mro__)


def _copy_code(cls: type, folder: Path) -> str:
    """Copies the file that defines a class into a folder; returns the file's name without `.py`."""
    source = Path(inspect.getfile(cls))
    if source.resolve() != (folder / source.name).resolve():
        shutil.copyfile(source, folder / source.name)
    return source.stem
