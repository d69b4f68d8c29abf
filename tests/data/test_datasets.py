"""Datasets: the bundled ones against their sources, the file formats against tiny files written byte by byte."""

from __future__ import annotations

import pickle
import struct
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fedkernels.data import DATASETS, PARTITIONS
from fedkernels.data.datasets import Cifar10, Cifar100, Dataset, Digits, Synthetic, TinyImageNet
from fedkernels.data.text import Glue, Topics

RNG = np.random.default_rng(0)


def check(data: Dataset, classes: int) -> None:
    """What every consumer relies on."""
    assert data.train_inputs.dtype == data.test_inputs.dtype == torch.uint8
    assert len(data.train_inputs) == len(data.train_targets) == len(data.labels)
    assert len(data.test_inputs) == len(data.test_targets) > 0
    assert data.classes == classes
    assert data.labels.dtype == torch.int64
    assert data.input_shape == tuple(data.test_inputs.shape[1:])
    for targets in (data.train_targets, data.test_targets):
        assert targets.dtype == (torch.uint8 if data.kind == "language" else torch.int64)
        assert int(targets.min()) >= 0
        assert int(targets.max()) < classes
    if data.kind == "image":
        pixels = data.train_inputs.numpy().astype(np.float64) / 255
        np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-9, atol=0)
        np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-9, atol=0)
    else:
        assert data.mean == data.std == ()


def test_tables_have_a_one_line_description_for_every_name() -> None:
    for table, method in ((DATASETS, "load"), (PARTITIONS, "split")):
        for kind in table.values():
            assert callable(getattr(kind, method))
            assert kind.__doc__.splitlines()[0].endswith(".")


# Bundled and generated data


def test_digits_are_those_of_scikit_learn() -> None:
    data = Digits().load()
    check(data, 10)
    assert data.input_shape == (1, 8, 8)
    assert int(data.train_inputs.max()) == 255
    assert data.groups is None
    bunch = load_digits()

    def bag(images: np.ndarray, targets: np.ndarray) -> Counter[tuple[float, ...]]:
        return Counter(map(tuple, np.column_stack([images.reshape(len(images), -1), targets])))

    sixteenths = torch.cat([data.train_inputs, data.test_inputs]).numpy() * (16 / 255)
    ours = bag(sixteenths.round(), torch.cat([data.train_targets, data.test_targets]).numpy())
    assert ours == bag(bunch.images, bunch.target)
    held_out = np.bincount(data.test_targets) / np.bincount(bunch.target)
    np.testing.assert_allclose(held_out, 0.2, atol=0.004)
    assert torch.equal(Digits().load().test_inputs, data.test_inputs)


def test_synthetic_images_can_be_learned_and_follow_the_seed() -> None:
    config = Synthetic(classes=4, samples=300, test_samples=101, channels=2, size=10, seed=1)
    data = config.load()
    check(data, 4)
    assert data.train_inputs.shape == (300, 2, 10, 10)
    assert len(data.test_inputs) == 101
    assert np.bincount(data.train_targets).tolist() == [75] * 4
    model = LogisticRegression(C=1e-4, max_iter=2000).fit(data.train_inputs.flatten(1).numpy(), data.train_targets)
    assert model.score(data.test_inputs.flatten(1).numpy(), data.test_targets) > 0.8
    assert torch.equal(config.load().train_inputs, data.train_inputs)
    other = Synthetic(classes=4, samples=300, test_samples=101, channels=2, size=10, seed=2).load()
    assert not torch.equal(other.train_inputs, data.train_inputs)


@pytest.mark.parametrize("length", [64, 1000])
def test_topics_are_the_text_of_pydoc(length: int) -> None:
    data = Topics(length=length).load()
    check(data, 256)
    assert data.kind == "language"
    assert data.input_shape == (length,)
    assert data.groups is not None
    assert torch.equal(data.train_inputs[:, 1:], data.train_targets[:, :-1])
    text = b"".join(topics[name].encode() for name in sorted(topics))

    def sequences(inputs: torch.Tensor, targets: torch.Tensor) -> list[bytes]:
        return [bytes(row) for row in torch.cat([inputs, targets[:, -1:]], dim=1).tolist()]

    train = sequences(data.train_inputs, data.train_targets)
    test = sequences(data.test_inputs, data.test_targets)
    assert all(row in text for row in train + test)
    # Train and test rows are disjoint pieces: in corpus order they tile it, apart from the topics' last bytes.
    groups = data.groups.tolist()
    assert groups == sorted(groups)
    assert set(groups) == set(range(groups[-1] + 1))
    assert len(text) - sum(map(len, train + test)) < (groups[-1] + 1) * (length + 1)
    if length == 64:  # every topic is longer than one sequence: group g is the g-th topic
        assert groups[-1] + 1 == len(topics)
    else:  # groups without a topic to themselves hold whole topics still
        assert groups[-1] + 1 < len(topics)
    at = 0
    for row in train:
        at = text.index(row, at) + len(row)  # in order, without overlap


def test_topics_hold_out_the_end_of_each_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = {"b": "B" * 31, "a": "A" * 5, "d": "de", "c": "0123456789abcdefghijklmnopqrstuvwxyz....CDE"}
    monkeypatch.setattr("pydoc_data.topics.topics", corpus)
    data = Topics(length=3, test_fraction=0.2).load()
    assert data.groups is not None
    groups = [1] * 6 + [2] * 9  # sequences of 4 bytes: a has 1, b 7 (one held out), c with d 11 (two held out)
    assert data.groups.tolist() == [0, *groups]
    assert torch.equal(data.labels, data.groups)
    assert [bytes(row) for row in data.test_inputs.tolist()] == [b"BBB", b"...", b"CDE"]
    assert [bytes(row) for row in data.test_targets.tolist()] == [b"BBB", b"...", b"DEd"]
    with pytest.raises(ValueError, match=r"length = 40 .* hold out no sequence"):
        Topics(length=40).load()


# CIFAR: Python 2 pickles, whose strings and arrays are written with opcodes that Python 3 never emits


def _py2(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_py2(key) + _py2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_py2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    dtype = b"cnumpy\ndtype\n" + _py2(b"u1") + b"K\x00K\x01\x87R(K\x03" + _py2(b"|") + b"NNNJ\xff\xff\xff\xff"
    shape = b"(" + b"".join(map(_py2, value.shape)) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _py2(b"b") + b"\x87R(K\x01" + shape
    return array + dtype + b"J\xff\xff\xff\xffK\x00tb\x89" + _py2(value.tobytes()) + b"tb"


def write_py2(file: Path, value: object) -> None:
    file.write_bytes(b"\x80\x02" + _py2(value) + b".")


@pytest.fixture
def cifar10(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = RNG.integers(0, 256, (24, 3072), np.uint8)
    labels = RNG.integers(0, 3, 24)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = slice(4 * i, 4 * i + 4)
        batch = {b"batch_label": b"x", b"labels": labels[rows].tolist(), b"data": images[rows], b"filenames": [b"a"]}
        write_py2(folder / name, batch)
    meta = {b"num_cases_per_batch": 4, b"label_names": [b"cat", b"dog", b"ship"], b"num_vis": 3072}
    write_py2(folder / "batches.meta", meta)
    return folder, images, labels


def test_cifar10_reads_the_python_2_pickles(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, images, labels = cifar10
    for path in (folder, folder.parent):
        data = Cifar10(str(path)).load()
        check(data, 3)
        assert data.augment
        assert data.input_shape == (3, 32, 32)
        assert data.train_inputs.flatten(1).numpy().tolist() == images[:20].tolist()
        assert data.test_inputs.flatten(1).numpy().tolist() == images[20:].tolist()
        assert data.train_targets.tolist() == labels[:20].tolist()
        assert data.test_targets.tolist() == labels[20:].tolist()
    # A row is the red plane, then green, then blue, each row by row.
    assert int(data.train_inputs[7, 1, 2, 5]) == images[7, 1024 + 2 * 32 + 5]


def test_cifar100_reads_fine_labels(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (9, 3072), np.uint8)
    for name, rows in (("train", slice(0, 6)), ("test", slice(6, 9))):
        fine = [*range(9)][rows]
        write_py2(tmp_path / name, {b"data": images[rows], b"fine_labels": fine, b"coarse_labels": [0] * len(fine)})
    write_py2(tmp_path / "meta", {b"fine_label_names": [b"x"] * 9, b"coarse_label_names": [b"y"]})
    data = Cifar100(str(tmp_path)).load()
    check(data, 9)
    assert data.augment
    assert data.train_targets.tolist() == [*range(6)]
    assert data.test_targets.tolist() == [6, 7, 8]
    assert data.test_inputs.flatten(1).numpy().tolist() == images[6:].tolist()


def test_cifar_names_missing_and_damaged_files(cifar10: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, images, _ = cifar10
    batch = folder / "data_batch_3"
    whole = batch.read_bytes()

    def fails(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            Cifar10(str(folder)).load()

    for size in (0, 1, 100, len(whole) - 1):
        batch.write_bytes(whole[:size])
        fails(rf"data_batch_3: truncated or corrupt pickle of {size} bytes")
    write_py2(batch, {b"data": images[:3], b"labels": [0, 1, 2]})
    fails(r"data_batch_3: expected uint8 images of shape \(4, 3072\), found uint8 \(3, 3072\)")
    write_py2(batch, {b"data": images[:4], b"labels": [0, 1, 2]})
    fails("data_batch_3: expected 4 labels, one per image, found 3")
    write_py2(batch, {b"data": images[:4], b"labels": [0, 1, 2, 3]})
    fails("data_batch_3: expected labels from 0 to 2, found 3")
    write_py2(batch, {b"data": images[:4], b"fine_labels": [0]})
    fails("data_batch_3: expected a list under b'labels'; the keys are b'data', b'fine_labels'")
    write_py2(batch, [1, 2])
    fails("data_batch_3: expected a pickled dictionary, found list")
    batch.unlink()
    fails("data_batch_3", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="nowhere: expected the folder cifar-10-batches-py"):
        Cifar10(str(tmp_path / "nowhere")).load()


def test_cifar_pickles_cannot_run_code(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = cifar10
    target = folder / "made_by_the_pickle"
    (folder / "test_batch").write_bytes(b"cos\nmkdir\n(V" + str(target).encode() + b"\ntR.")
    with pytest.raises(ValueError, match=r"test_batch.*refers to os.mkdir"):
        Cifar10(str(folder)).load()
    assert not target.exists()
    pickle.loads((folder / "test_batch").read_bytes())
    assert target.exists()  # the same bytes do run where nothing stops them


# Tiny-ImageNet: JPEG files in folders


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]  # the file is not sorted, class numbers are
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(2):
            color = (int(wnid[1:]) * 60, 200 - 100 * i, 30)
            Image.new("RGB", (64, 64), color).save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", quality=95)
    gradient = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[:, None], 64, axis=1)  # grey, darker at the top
    Image.fromarray(gradient).save(folder / "val" / "images" / "val_0.JPEG", quality=95)
    Image.new("RGB", (64, 64), (10, 20, 250)).save(folder / "val" / "images" / "val_1.JPEG", quality=95)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    return folder


def test_tiny_imagenet_reads_colour_and_grey_images(tiny: Path) -> None:
    for path in (tiny, tiny.parent):
        data = TinyImageNet(str(path)).load()
        check(data, 3)
        assert data.augment
        assert data.input_shape == (3, 64, 64)
    assert data.train_targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test_targets.tolist() == [1, 0]
    center = data.train_inputs[:, :, 32, 32].numpy().astype(int)
    expected = [[60 * n, 200 - 100 * i, 30] for n in (1, 2, 3) for i in (0, 1)]
    np.testing.assert_allclose(center, expected, atol=4)
    for channel in data.test_inputs[0].numpy().astype(int):
        np.testing.assert_allclose(channel[:, 5], np.arange(0, 256, 4), atol=6)


def test_tiny_imagenet_names_missing_and_damaged_files(tiny: Path) -> None:
    def fails(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            TinyImageNet(str(tiny)).load()

    image = tiny / "train" / "n02" / "images" / "n02_1.JPEG"
    whole = image.read_bytes()
    for size in (0, 30, len(whole) // 2):
        image.write_bytes(whole[:size])
        fails(f"n02_1.JPEG: truncated or corrupt image of {size} bytes")
    Image.new("RGB", (60, 64)).save(image)
    fails("n02_1.JPEG: expected 64x64 pixels, found 60x64")
    image.unlink()
    fails("n02/images: expected 2 JPEG images, as for every class, found 1")
    (image.parent / "n02_0.JPEG").unlink()
    fails("n02/images: expected 2 JPEG images, as for every class, found 0", FileNotFoundError)
    for i in range(2):
        (image.parent / f"n02_{i}.JPEG").write_bytes(whole)
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn02\n")
    fails("val_annotations.txt: expected one line for each of 2 images, found 1")
    annotations.write_text("val_0.JPEG\tn02\nval_1.JPEG\tn0")
    fails("val_annotations.txt, line 2: expected a file name and a wnid, found 'val_1.JPEG.tn0'".replace(".t", ".*t"))
    annotations.write_text("val_0.JPEG\tn02\nval_7.JPEG\tn01\n")
    fails("val_7.JPEG: expected this file", FileNotFoundError)
    annotations.unlink()
    fails("val_annotations.txt", FileNotFoundError)


# GLUE


def glue(folder: Path, train: str, dev: str, suffix: str = "tsv", dev_name: str = "dev") -> str:
    (folder / f"train.{suffix}").write_bytes(train.encode())
    (folder / f"{dev_name}.{suffix}").write_bytes(dev.encode())
    return str(folder)


def sentences(tokens: torch.Tensor) -> list[list[str]]:
    """What a reader of the scheme gets back: padding off, parts at the separator."""
    return [[part.decode() for part in bytes(row).rstrip(b"\0").split(b"\1")] for row in tokens.tolist()]


TASKS = {  # header and rows in the tasks' own files, and what they say
    "sst2": ("sentence\tlabel\n", "a fine film \t1\n", "all\rdull\t0\n", [["a fine film "], ["all\rdull"]]),
    "cola": ("", "gj04\t1\t\tWe won't.\n", "gj04\t0\t*\tThe the.\n", [["We won't."], ["The the."]]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n",
        '1\t70\t71\tHe said, "no.\tShe left.\r\n',
        "0\t72\t73\tA\tB\r\n",
        [['He said, "no.', "She left."], ["A", "B"]],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n",
        '0\tWho "wrote it?\tHe did.\tnot_entailment\n',
        '1\t"Where?\tHere".\tentailment\n',
        [['Who "wrote it?', "He did."], ['"Where?', 'Here".']],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
        "1\t2\t3\tWhy?\tHow come?\t1\n",
        "4\t5\t6\tWhy\u2028so?\tWhén?\t0\n",
        [["Why?", "How come?"], ["Why\u2028so?", "Whén?"]],
    ),
    "mnli": (
        "index\tsentence1_binary_parse\tsentence1\tsentence2\tlabel1\tgold_label\n",
        "0\t( x )\tA dog.\tAn animal.\tneutral\tneutral\n",
        "1\t( y )\tA cat.\tA dog.\tneutral\tcontradiction\n",
        [["A dog.", "An animal."], ["A cat.", "A dog."]],
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_glue_reads_the_files_of_the_tasks(task: str, tmp_path: Path) -> None:
    header, one, two, texts = TASKS[task]
    dev_name = "dev_matched" if task == "mnli" else "dev"
    path = glue(tmp_path, header + one + two + one, header + two, dev_name=dev_name)
    data = Glue(path, length=40).load()
    check(data, 2)
    assert data.kind == "text"
    assert data.input_shape == (40,)
    assert data.groups is None
    assert sentences(data.train_inputs) == [texts[0], texts[1], texts[0]]
    assert sentences(data.test_inputs) == [texts[1]]
    # In every task above the second row's label sorts first.
    assert data.train_targets.tolist() == [1, 0, 1]
    assert data.test_targets.tolist() == [0]


def test_glue_reads_csv_with_quotes_and_named_columns(tmp_path: Path) -> None:
    train = 'premise,hypothesis,label,idx\n"It rains, ""they"" say.","Wet\nstreets",2,0\nSun,Dry,10,1\n'
    path = glue(tmp_path, train, "premise,hypothesis,label,idx\nSnow,Cold,10,0\n", suffix="csv")
    data = Glue(path, length=64).load()
    assert sentences(data.train_inputs) == [['It rains, "they" say.', "Wet\nstreets"], ["Sun", "Dry"]]
    assert data.train_targets.tolist() == [0, 1]
    assert data.test_targets.tolist() == [1]
    data = Glue(path, columns=("hypothesis",), label="label", length=8).load()
    assert sentences(data.train_inputs) == [["Wet\nstre"], ["Dry"]]


def test_glue_tokens_cut_the_longest_and_keep_reserved_bytes_free(tmp_path: Path) -> None:
    rows = "sentence1\tsentence2\tlabel\nab\tcdefghijk\t0\ncdefghijk\tab\t0\nabcdefgh\tijklmnop\t1\na\0b\tc\1d\t1\n"
    data = Glue(glue(tmp_path, rows, rows), length=8).load()
    assert [bytes(row) for row in data.train_inputs.tolist()] == [
        b"ab\1cdefg",
        b"cdefg\1ab",
        b"abc\1ijkl",
        b"a b\1c d\0",
    ]


def test_glue_names_missing_and_damaged_files(tmp_path: Path) -> None:
    good = "sentence\tlabel\nfine\t1\nbad\t0\n"

    def fails(message: str, train: str = good, dev: str = good, suffix: str = "tsv", **fields: object) -> None:
        folder = tmp_path / suffix
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            Glue(glue(folder, train, dev, suffix), **fields).load()  # type: ignore[arg-type]

    expected = r"line 3: expected 2 columns and a label in column 2 \(label\), found"
    fails(f"train.tsv, {expected} 1 columns", train=good[:-3])
    fails(f"dev.tsv, {expected} no label", dev=good[:-2] + "\n")
    fails("train.tsv: expected a header and at least one row, found 1 lines", train="sentence\tlabel\n")
    fails("train.tsv: expected the text columns sentence1 . sentence2 or", train="")
    fails("train.tsv: expected the label column label or .*, found sentence, score", train="sentence\tscore\nx\t2.5\n")
    fails("train.tsv: expected the text columns abstract, found sentence, label", columns=("abstract",))
    fails("dev.tsv: label 'x' is not one of train.tsv's: 0, 1", dev="sentence\tlabel\nfine\tx\n")
    fails("length = 1: expected at least 2 for 1 text columns", length=1)
    fails("train.csv: truncated or corrupt file of 24 bytes", 'sentence,label\n"half a s', suffix="csv")
    (tmp_path / "tsv" / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(ValueError, match=r"train.tsv: truncated or corrupt file of 20 bytes.*utf-8"):
        Glue(str(tmp_path / "tsv")).load()
    (tmp_path / "tsv" / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"tsv: expected the file dev.tsv or dev.csv"):
        Glue(str(tmp_path / "tsv")).load()


def test_glue_leaves_malformed_rows_out_on_request(tmp_path: Path) -> None:
    rows = "sentence\tlabel\nfine\t1\nbroken\n\tstray\t0\nbad\t0\n"
    data = Glue(glue(tmp_path, rows, rows), drop_malformed=True).load()
    assert sentences(data.train_inputs) == [["fine"], ["bad"]]
    assert data.train_targets.tolist() == [1, 0]
