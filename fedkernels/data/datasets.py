"""Datasets as tensors: bytes in, class labels out. Images here, text beside it."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from .tokens import BYTES, Tokens

Metric = Literal["matthews", "f1", "perplexity"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples of one task, held as bytes, tokens of large vocabularies as int32.

    Args:
        kind: `image` and `text` classify, `language` predicts the next token.
        train_inputs: uint8 images `[n, channels, height, width]`, or tokens `[n, length]`.
        train_targets: int64 `[n]` class labels; for `language` tokens `[n, length]`, the next ones.
        test_inputs: as `train_inputs`.
        test_targets: as `train_targets`.
        classes: number of classes, for `language` the vocabulary size.
        labels: int64 `[n]`, what label-skew partitions look at: the class, for `language` the topic group.
        groups: int64 `[n]`, the natural client of each training sample; None where there is none.
        mean: per channel on the 0..1 scale, images only.
        std: as `mean`.
        augment: whether training crops (pad 4) and flips at random; done on the device, not here.
        tokens: what the tokens are, for text and language.
        metrics: what a model is scored by beside loss and accuracy.
    """

    kind: Literal["image", "language", "text"]
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    labels: Tensor
    groups: Tensor | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: bool = False
    tokens: Tokens = BYTES
    metrics: tuple[Metric, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_inputs.shape[1:])


@dataclass(frozen=True)
class Digits:
    """scikit-learn's bundled handwritten digits: 1,797 grey 8x8 images, 10 classes.

    Args:
        test_fraction: share of every class that is held out; which samples those are never changes.
    """

    test_fraction: Fraction = 0.2

    def load(self) -> Dataset:
        """Read the bundled images and hold out the test share of every class.

        Example:
            >>> data = Digits().load()
            >>> data.input_shape, data.classes, len(data.train_inputs) + len(data.test_inputs)
            ((1, 8, 8), 10, 1797)
        """
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
        targets = bunch.target.astype(np.int64)
        rng = np.random.Generator(np.random.Philox(1797))
        test = np.zeros(len(targets), bool)
        for c in range(10):
            members = rng.permutation(np.flatnonzero(targets == c))
            test[members[: round(self.test_fraction * len(members))]] = True
        return _images(images[~test], targets[~test], images[test], targets[test], classes=10)


@dataclass(frozen=True)
class Synthetic:
    """Generated images of any size: a smooth random pattern per class under heavy noise.

    Args:
        classes: patterns to tell apart.
        samples: training images; classes are balanced to within one.
        test_samples: test images, drawn alike.
        channels: of every image.
        size: height and width, in pixels.
        seed: of the patterns and the noise.
    """

    classes: Count = 10
    samples: Count = 2000
    test_samples: Count = 500
    channels: Count = 3
    size: Count = 32
    seed: Annotated[int, Field(ge=0)] = 0

    def load(self) -> Dataset:
        """Generate the images.

        Example:
            >>> Synthetic(samples=6, test_samples=2, size=4).load().train_inputs.shape
            torch.Size([6, 3, 4, 4])
        """
        rng = np.random.Generator(np.random.Philox(self.seed))
        # Patterns four times coarser than the image survive crops, pooling and patching.
        coarse = -(-self.size // 4)
        patterns = rng.standard_normal((self.classes, self.channels, coarse, coarse), np.float32)
        patterns = patterns.repeat(4, axis=2).repeat(4, axis=3)[..., : self.size, : self.size]

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            targets = rng.permutation(n) % self.classes
            images = np.empty((n, *patterns.shape[1:]), np.uint8)
            for at in range(0, n, 1024):
                signal = patterns[targets[at : at + 1024]]
                noise = rng.standard_normal(signal.shape, np.float32)
                images[at : at + 1024] = np.clip(128 + 24 * signal + 48 * noise, 0, 255)
            return images, targets

        return _images(*draw(self.samples), *draw(self.test_samples), classes=self.classes)


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10 from its Python files: 60,000 colour 32x32 images, 10 classes.

    Args:
        path: the folder `cifar-10-batches-py`, or the one it lies in.
    """

    path: str

    @staticmethod
    def blank() -> Dataset:
        """Black images in the published numbers and shapes, for planning where the files are not."""
        return _blank(50_000, 10_000, (3, 32, 32), classes=10)

    def load(self) -> Dataset:
        """Read `data_batch_1` to `data_batch_5`, `test_batch` and `batches.meta`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, corrupt, or holds other counts than it should.
        """
        folder = _folder(self.path, "cifar-10-batches-py", "batches.meta")
        meta = _unpickle(folder / "batches.meta")
        names = _entry(meta, b"label_names", list, folder / "batches.meta")
        rows = _entry(meta, b"num_cases_per_batch", int, folder / "batches.meta")
        batches = [_cifar(folder / f"data_batch_{i}", b"labels", len(names), rows) for i in range(1, 6)]
        images, targets = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        test = _cifar(folder / "test_batch", b"labels", len(names), rows)
        return _images(images, targets, *test, classes=len(names), augment=True)


@dataclass(frozen=True)
class Cifar100:
    """CIFAR-100 from its Python files: 60,000 colour 32x32 images, 100 classes.

    Args:
        path: the folder `cifar-100-python`, or the one it lies in.
    """

    path: str

    @staticmethod
    def blank() -> Dataset:
        """Black images in the published numbers and shapes, for planning where the files are not."""
        return _blank(50_000, 10_000, (3, 32, 32), classes=100)

    def load(self) -> Dataset:
        """Read `train`, `test` and `meta`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, corrupt, or holds other counts than it should.
        """
        folder = _folder(self.path, "cifar-100-python", "meta")
        classes = len(_entry(_unpickle(folder / "meta"), b"fine_label_names", list, folder / "meta"))
        train, test = (_cifar(folder / name, b"fine_labels", classes) for name in ("train", "test"))
        return _images(*train, *test, classes=classes, augment=True)


@dataclass(frozen=True)
class TinyImageNet:
    """Tiny-ImageNet from its folder of JPEG files: 110,000 colour 64x64 images, 200 classes.

    Args:
        path: the folder `tiny-imagenet-200`, or the one it lies in. Its validation images are the test set.
    """

    path: str

    @staticmethod
    def blank() -> Dataset:
        """Black images in the published numbers and shapes, for planning where the files are not."""
        return _blank(100_000, 10_000, (3, 64, 64), classes=200)

    def load(self) -> Dataset:
        """Read `wnids.txt`, `train/<wnid>/images/*.JPEG`, `val/images` and `val/val_annotations.txt`.

        Raises:
            FileNotFoundError: a file or an image that is listed is missing.
            ValueError: an image is corrupt or not 64x64, or classes have different numbers of training images.
        """
        folder = _folder(self.path, "tiny-imagenet-200", "wnids.txt")
        classes = {wnid: c for c, wnid in enumerate(sorted((folder / "wnids.txt").read_text().split()))}
        train: list[tuple[Path, int]] = []
        for wnid, c in classes.items():
            train += [(file, c) for file in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))]
        # The set is balanced, so a class with fewer images than others means a copy that was cut short.
        found = Counter(c for _, c in train)
        expected = max(found.values(), default=500)
        for wnid, c in classes.items():
            if found[c] < expected:
                error = ValueError if found[c] else FileNotFoundError
                where = folder / "train" / wnid / "images"
                raise error(f"{where}: expected {expected} JPEG images, as for every class, found {found[c]}")
        annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
        test: list[tuple[Path, int]] = []
        for number, line in enumerate(_require(annotations).read_text().splitlines(), 1):
            name, *rest = line.split("\t")
            if not rest or rest[0] not in classes:
                raise ValueError(f"{annotations}, line {number}: expected a file name and a wnid, found {line!r}")
            test.append((images / name, classes[rest[0]]))
        if len(test) != (count := len(list(images.glob("*.JPEG")))) or not test:
            raise ValueError(f"{annotations}: expected one line for each of {count} images, found {len(test)}")
        return _images(*_decode(train), *_decode(test), classes=len(classes), augment=True)


def _images(
    train: np.ndarray,
    train_targets: np.ndarray,
    test: np.ndarray,
    test_targets: np.ndarray,
    *,
    classes: int,
    augment: bool = False,
) -> Dataset:
    """An image dataset with the channel statistics of its training images."""
    counts = np.zeros((train.shape[1], 256), np.int64)
    for at in range(0, len(train), 1024):
        for channel, count in enumerate(counts):
            count += np.bincount(train[at : at + 1024, channel].ravel(), minlength=256)
    shares, level = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ level
    std = np.sqrt((shares * (level - mean[:, None]) ** 2).sum(1))
    # A constant channel has no scale: leave it as it is rather than divide by zero.
    std = np.where(counts.max(1) < counts.sum(1), std, 1.0)
    targets = torch.from_numpy(train_targets)
    return Dataset(
        kind="image",
        train_inputs=torch.from_numpy(train),
        train_targets=targets,
        test_inputs=torch.from_numpy(test),
        test_targets=torch.from_numpy(test_targets),
        classes=classes,
        labels=targets,
        groups=None,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        augment=augment,
    )


def _blank(train: int, test: int, shape: tuple[int, ...], *, classes: int) -> Dataset:
    """A balanced dataset of zeros, which take no memory until they are written to."""
    targets, test_targets = torch.arange(train) % classes, torch.arange(test) % classes
    pixels, test_pixels = (torch.zeros(n, *shape, dtype=torch.uint8) for n in (train, test))
    ones = (1.0,) * shape[0]
    return Dataset(
        "image", pixels, targets, test_pixels, test_targets, classes, targets, None, ones, ones, augment=True
    )


def _folder(path: str, name: str, marker: str) -> Path:
    """`path` itself or the folder `name` in it, whichever has the file `marker`."""
    for folder in (Path(path), Path(path) / name):
        if (folder / marker).is_file():
            return folder
    raise FileNotFoundError(f"{path}: expected the folder {name}, or one that contains it, with the file {marker}")


def _require(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected this file of the dataset, found none")
    return file


def _encode_latin1(text: str, codec: str) -> bytes:
    return text.encode("latin1")


def _plain_dtype(name: bytes | str, *_: object) -> np.dtype[Any]:
    return np.dtype(name.decode() if isinstance(name, bytes) else name)


# What a pickled array of numbers refers to, and nothing else: a pickle can otherwise call any function.
_SAFE: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _plain_dtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, and only plain arrays are allowed")
        return _SAFE[module, name]


def _unpickle(file: Path) -> dict[Any, Any]:
    """The dictionary in a Python 2 pickle, with byte strings for keys."""
    with _require(file).open("rb") as stream:
        try:
            content = _ArrayUnpickler(stream, encoding="bytes").load()
        except Exception as error:  # A damaged pickle can raise nearly anything.
            raise ValueError(f"{file}: truncated or corrupt pickle of {file.stat().st_size} bytes: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a pickled dictionary, found {type(content).__name__}")
    return content


def _entry(content: dict[Any, Any], key: bytes, kind: type, file: Path) -> Any:
    if not isinstance(content.get(key), kind):
        found = ", ".join(map(repr, content))
        raise ValueError(f"{file}: expected a {kind.__name__} under {key!r}; the keys are {found or 'none'}")
    return content[key]


def _cifar(file: Path, label_key: bytes, classes: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n, 3, 32, 32]` and labels int64 `[n]` of one batch file."""
    content = _unpickle(file)
    data, labels = _entry(content, b"data", np.ndarray, file), _entry(content, label_key, list, file)
    rows = len(labels) if rows is None else rows
    if data.dtype != np.uint8 or data.shape != (rows, 3072):
        raise ValueError(f"{file}: expected uint8 images of shape ({rows}, 3072), found {data.dtype} {data.shape}")
    if len(labels) != rows:
        raise ValueError(f"{file}: expected {rows} labels, one per image, found {len(labels)}")
    if wrong := [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]:
        raise ValueError(f"{file}: expected labels from 0 to {classes - 1}, found {wrong[0]!r}")
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _decode(listed: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n, 3, 64, 64]` and labels int64 `[n]` of image files."""
    from PIL import Image

    images = np.empty((len(listed), 3, 64, 64), np.uint8)

    def read(i: int) -> None:
        file = _require(listed[i][0])
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file}: truncated or corrupt image of {file.stat().st_size} bytes: {error}") from error
        if pixels.shape != (64, 64, 3):
            raise ValueError(f"{file}: expected 64x64 pixels, found {pixels.shape[1]}x{pixels.shape[0]}")
        images[i] = pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(listed))):
            pass
    return images, np.array([c for _, c in listed], np.int64)
