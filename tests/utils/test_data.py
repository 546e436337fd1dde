import gzip
import io

import numpy as np
import pytest
from PIL import Image

from adversarial_flow.utils.data import IDX_FILES, center_crop, convert, load_idx
from adversarial_flow.utils.errors import InputError


def test_center_crop_is_adms():
    """Halved with a box filter, resized to the short side, cropped at (size - crop) // 2."""
    columns = np.broadcast_to(np.arange(13, dtype=np.uint8) * 10, (8, 13))
    cropped = np.asarray(center_crop(Image.fromarray(columns), 8))
    assert np.array_equal(cropped, columns[:, 2:10])  # (13 - 8) // 2
    columns = np.broadcast_to(np.arange(11, dtype=np.uint8) * 10, (8, 11))
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(columns), 8)), columns[:, 1:9])
    halved = np.asarray(center_crop(Image.fromarray(np.kron(columns[:8, :8], np.ones((2, 2), np.uint8))), 8))
    assert np.array_equal(halved, columns[:, :8])
    assert center_crop(Image.new("RGB", (5, 7)), 8).size == (8, 8)


@pytest.mark.parametrize("channels,mode", [(1, "L"), (3, "RGB")])
def test_sixteen_bits_are_scaled_and_not_cut(channels, mode):
    pixels = np.array([[0, 256, 32768, 65535]], np.uint16)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.astype(np.int32))):
        converted = convert(image, channels)
        assert converted.mode == mode and np.asarray(converted).reshape(4, -1)[:, 0].tolist() == [0, 1, 128, 255]
    small = convert(Image.fromarray(np.array([[0, 200]], np.int32)), 1)
    assert np.asarray(small).tolist() == [[0, 200]]
    with pytest.raises(OSError, match="floating-point"):
        convert(Image.fromarray(np.zeros((2, 2), np.float32)), 1)


def test_photos_stand_upright():
    import datasets

    from adversarial_flow.utils.data import ImageDataset

    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, quality=100)
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
    image = ImageDataset(dataset, "image", None, 8, 1)[0]["image"]
    assert image[0, :, 5:].mean() > 0.9 and image[0, :, :3].mean() < -0.9


def write_idx(folder, name: str, array: np.ndarray, compress: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path = folder / (name + (".gz" if compress else ""))
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [True, False])
def test_mnist_files(tmp_path, compress):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 4, 4), np.uint8)
    labels = np.array([0, 2, 1, 0, 2, 2], np.uint8)
    for name, array in zip(IDX_FILES, (images, labels)):
        write_idx(tmp_path, name, array, compress)
    data = load_idx(str(tmp_path))
    assert (data.channels, data.resolution, len(data.dataset)) == (1, 4, 6)
    assert data.id2label == {0: "0", 1: "1", 2: "2"}
    sample = data.dataset[1]
    assert sample["label"] == 2 and sample["image"].shape == (1, 4, 4)
    assert np.array_equal(((sample["image"][0] + 1) * 127.5).round().numpy(), images[1])
    with pytest.raises(InputError, match="--resolution 8: the images of .* are 4x4; leave it out"):
        load_idx(str(tmp_path), 8)


def test_bad_mnist_files(tmp_path):
    write_idx(tmp_path, IDX_FILES[0], np.zeros((6, 4, 4), np.uint8))
    with pytest.raises(InputError, match="train-labels-idx1-ubyte can't be read .there is no such file"):
        load_idx(str(tmp_path))
    write_idx(tmp_path, IDX_FILES[1], np.zeros(5, np.uint8))
    with pytest.raises(InputError, match=r"as many labels are needed, not \(6, 4, 4\) and \(5,\)"):
        load_idx(str(tmp_path))
    for broken in (b"", b"PNG and more", bytes([0, 0, 8, 3, 0, 0, 0, 9])):
        (tmp_path / IDX_FILES[0]).write_bytes(broken)
        with pytest.raises(InputError, match="train-images-idx3-ubyte can't be read"):
            load_idx(str(tmp_path))
    (tmp_path / IDX_FILES[0]).unlink()
    (tmp_path / f"{IDX_FILES[0]}.gz").write_bytes(gzip.compress(b"\0" * 1000)[:20])
    with pytest.raises(InputError, match="can't be read"):
        load_idx(str(tmp_path))
