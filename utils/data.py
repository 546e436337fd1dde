# Copyright 2026 The Adversarial Flow Authors. Licensed under the Apache License, Version 2.0.
"""Images and labels: the embedded digits, MNIST's files, a folder of images, or any data set that `datasets` reads.

A sample is `{"image": float tensor (C, H, W) in [-1, 1], "label": int, "broken": str}`.
"""

import gzip
import io
import logging
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from adversarial_flow.utils.arguments import on_digits
from adversarial_flow.utils.errors import InputError, first_line


logger = logging.getLogger(__name__)

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")  # MNIST's format and names, also gzipped
DEFAULT_RESOLUTION = 64
CHECKED_IMAGES = 1000  # how many images, evenly spread, are looked at before training starts


@dataclass
class TrainingData:
    """A data set with what the networks need to know of it. `id2label` is empty for unlabelled images."""

    dataset: Dataset
    id2label: dict[int, str]
    channels: int
    resolution: int


def load_training_data(args) -> TrainingData:
    """The data that the flags ask for (see [`~utils.arguments.add_data_arguments`])."""
    if on_digits(args):
        return load_digits(args.resolution)
    if args.train_data_dir is not None and args.dataset_name is not None:
        raise InputError("--train_data_dir and --dataset_name exclude each other: pass one of them.")
    if args.train_data_dir is not None and _idx_path(args.train_data_dir, IDX_FILES[0]) is not None:
        args.channels = 1
        return load_idx(args.train_data_dir, args.resolution)
    args.resolution = args.resolution or DEFAULT_RESOLUTION
    dataset = _load_image_dataset(args)
    if args.image_column not in dataset.column_names:
        raise InputError(_missing_column("--image_column", args.image_column, dataset))
    dataset, id2label = _encode_labels(dataset, args)
    try:
        dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        kind = dataset.features[args.image_column]
        raise InputError(f"--image_column {args.image_column}: this column holds {kind}, not images.") from error
    images = ImageDataset(
        dataset, args.image_column, args.label_column, args.resolution, args.channels, args.allow_upscaling
    )
    images.check()
    return TrainingData(images, id2label, args.channels, args.resolution)


# ----------------------------------------------------------------------------------- digits, files of MNIST


class InMemoryDataset(Dataset):
    """
    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In [-1, 1].
        labels (`torch.Tensor` of shape `(N,)`): Integers from 0.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index]), "broken": ""}


def load_digits(resolution: int | None = None) -> TrainingData:
    """The 1,797 grey 8x8 digits that scikit-learn ships: real data that needs no download."""
    from sklearn.datasets import load_digits

    if resolution not in (None, 8):
        raise InputError(f"--resolution {resolution}: the embedded digits are 8x8; pass --train_data_dir for others.")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (N, 1, 8, 8)
    dataset = InMemoryDataset(images, torch.tensor(digits.target))
    return TrainingData(dataset, {i: str(i) for i in range(10)}, channels=1, resolution=8)


def _idx_path(folder: str, name: str) -> Path | None:
    paths = (Path(folder) / name, Path(folder) / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def _read_idx(folder: str, name: str) -> np.ndarray:
    """An array of bytes: two zeros, 8 for bytes, the number of dimensions, each size as a big-endian int32, data."""
    path = _idx_path(folder, name)
    try:
        if path is None:
            raise OSError("there is no such file")
        content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as a file of bytes in this format does")
        shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"--train_data_dir {folder}: {name} can't be read ({error}).") from error


def load_idx(folder: str, resolution: int | None = None) -> TrainingData:
    """The training images of MNIST, Fashion-MNIST and others in their format: grey, with labels, of one size."""
    images, labels = (torch.tensor(_read_idx(folder, name)) for name in IDX_FILES)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1] or not len(images):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise InputError(f"--train_data_dir {folder}: square images and as many labels are needed, not {shapes}.")
    size = images.shape[-1]
    if resolution not in (None, size):
        raise InputError(f"--resolution {resolution}: the images of {folder} are {size}x{size}; leave it out.")
    dataset = InMemoryDataset(images.unsqueeze(1).float() / 127.5 - 1, labels.long())  # (N, 1, H, W)
    return TrainingData(dataset, {i: str(i) for i in range(int(labels.max()) + 1)}, channels=1, resolution=size)


# ---------------------------------------------------------------------------------------------------------- images


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing: halve with a box filter while possible, resize the short side (bicubic), crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Grey (1) or RGB (3) with 8 bits; of 16-bit grey images the upper 8 bits, where Pillow would saturate."""
    if image.mode == "F":
        raise OSError("floating-point images have no range that is known: convert them to 8 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        image = Image.fromarray((pixels >> (8 if pixels.max() > 255 else 0)).clip(0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


class ImageDataset(Dataset):
    """
    Images of a `datasets.Dataset` whose image column is not decoded (so that a broken file can be named).

    A broken or too small image is replaced by the next good one; `broken` then says what was skipped.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        label_column: str | None,
        resolution: int,
        channels: int,
        allow_upscaling: bool = False,
    ):
        self.dataset, self.image_column, self.label_column = dataset, image_column, label_column
        self.resolution, self.channels, self.allow_upscaling = resolution, channels, allow_upscaling

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        broken = []
        for offset in range(len(self)):
            row = self.dataset[(index + offset) % len(self)]
            try:
                image = self._open(row)
                image.load()
                image = ImageOps.exif_transpose(image)
                if self._too_small(image):
                    raise OSError(f"{image.size[0]}x{image.size[1]} is smaller than {self.resolution} pixels")
                image = center_crop(convert(image, self.channels), self.resolution)
            except Exception as error:  # a broken file makes Pillow raise more than a dozen kinds
                broken.append(f"{self._name(row, index + offset)}: {error}")
                continue
            label = row[self.label_column] if self.label_column else 0
            tensor = TF.pil_to_tensor(image).float() / 127.5 - 1  # (C, H, W)
            return {"image": tensor, "label": int(label), "broken": "\n".join(broken)}
        # Not one image can be read. The counter ends the run, in the main process, where an error is one line.
        image = torch.zeros(self.channels, self.resolution, self.resolution)
        return {"image": image, "label": 0, "broken": "\n".join(broken)}

    def _open(self, row: dict) -> Image.Image:
        value = row[self.image_column]
        if value is None:
            raise OSError("the image is missing (null)")
        return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])

    def _name(self, row: dict, index: int) -> str:
        return (row[self.image_column] or {}).get("path") or f"row {index % len(self)}"

    def _too_small(self, image: Image.Image) -> bool:
        return min(image.size) < self.resolution and not self.allow_upscaling

    def check(self) -> None:
        """Looks at the headers of up to 1,000 images: refuses small ones, says once when modes are converted."""
        converted, mode = 0, "L" if self.channels == 1 else "RGB"
        indices = np.unique(np.linspace(0, len(self) - 1, CHECKED_IMAGES).astype(int))
        readable = 0
        for index in indices:
            row = self.dataset[int(index)]
            try:
                image = self._open(row)
            except Exception:
                continue  # counted and logged when its turn comes in training
            readable += 1
            if self._too_small(image):
                raise InputError(
                    f"--resolution {self.resolution}: {self._name(row, int(index))} is only {image.width}x"
                    f"{image.height} pixels. Lower --resolution, remove the small images, or enlarge them with "
                    "--allow_upscaling."
                )
            converted += image.mode != mode
        if readable == 0:
            raise InputError("--train_data_dir / --dataset_name: none of the images that were tried can be read.")
        if converted:
            wanted = "grey" if self.channels == 1 else "RGB"
            logger.warning(f"{converted} of {readable} images looked at are not {wanted}: they are converted.")


def _load_image_dataset(args) -> datasets.Dataset:
    if args.train_data_dir is not None:
        if not os.path.isdir(args.train_data_dir):
            raise InputError(f"--train_data_dir {args.train_data_dir}: there is no such folder.")
        # All files are the training data: left to itself, `imagefolder` takes "test" in a name for another split.
        files = {"train": os.path.join(args.train_data_dir, "**")}
        source, kwargs = "imagefolder", {"data_files": files}
    else:
        source, kwargs = args.dataset_name, {"name": args.dataset_config_name}
    flag = "--train_data_dir" if args.train_data_dir is not None else "--dataset_name"
    value = args.train_data_dir or args.dataset_name
    saved_with_splits = os.path.isfile(os.path.join(source, "dataset_dict.json"))
    saved_without_splits = not saved_with_splits and os.path.isfile(os.path.join(source, "dataset_info.json"))
    if args.dataset_name is not None and saved_without_splits and args.dataset_split != "train":
        raise InputError(f"--dataset_split {args.dataset_split}: {value} was saved without splits; leave it out.")
    try:
        if args.train_data_dir is not None:
            dataset = datasets.load_dataset(source, split="train", cache_dir=args.cache_dir, **kwargs)
        elif saved_with_splits:
            dataset = datasets.load_from_disk(source)[args.dataset_split]
        elif saved_without_splits:
            dataset = datasets.load_from_disk(source)
        else:
            dataset = datasets.load_dataset(source, split=args.dataset_split, cache_dir=args.cache_dir, **kwargs)
    except KeyError as error:
        raise InputError(f"--dataset_split {args.dataset_split}: {value} has no such split.") from error
    except IndexError as error:  # what `load_from_disk` makes of a data set without rows
        raise InputError(f"{flag} {value}: the data set is empty.") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{flag} {value}: no images could be loaded ({first_line(error)}).") from error
    if len(dataset) == 0:
        raise InputError(f"{flag} {value}: the data set is empty.")
    return dataset


def _missing_column(flag: str, name: str, dataset: datasets.Dataset) -> str:
    return f"{flag} {name}: there is no such column. The columns are: {', '.join(dataset.column_names)}."


def _encode_labels(dataset: datasets.Dataset, args) -> tuple[datasets.Dataset, dict[int, str]]:
    """Labels as integers from 0, and their names. Sets `args.label_column` to the column in use, or to `None`."""
    if args.label_column is None:  # "label" is used when it exists
        args.label_column = "label" if "label" in dataset.column_names else None
    elif args.label_column not in dataset.column_names:
        raise InputError(_missing_column("--label_column", args.label_column, dataset))
    if args.label_column is None:
        return dataset, {}
    feature = dataset.features[args.label_column]
    try:
        values = dataset.unique(args.label_column)
    except (TypeError, ValueError, NotImplementedError) as error:  # a list, an image, ...
        raise InputError(
            f"--label_column {args.label_column}: this column holds {feature}, not one label for each image."
        ) from error
    if any(value is None or value == -1 for value in values):
        raise InputError(f"--label_column {args.label_column}: some images have no label; filter them out.")
    if not isinstance(feature, datasets.ClassLabel):
        if all(isinstance(value, int) for value in values):
            if min(values) < 0:
                raise InputError(f"--label_column {args.label_column}: the label {min(values)} is negative.")
            if max(values) >= 1000 + 100 * len(values):
                raise InputError(
                    f"--label_column {args.label_column}: {len(values)} different labels go up to {max(values)}; "
                    "number the classes from 0 on, or turn the column into strings."
                )
            return dataset, {i: str(i) for i in range(max(values) + 1)}
        dataset = dataset.class_encode_column(args.label_column)
    return dataset, dict(enumerate(dataset.features[args.label_column].names))
