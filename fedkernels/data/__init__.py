"""Datasets and partitions, by the names that configurations use."""

from __future__ import annotations

from .datasets import Cifar10, Cifar100, Digits, Synthetic, TinyImageNet
from .partition import Dirichlet, Iid, Natural, Paper, Shards
from .text import Glue, Topics

DATASETS: dict[str, type] = {
    "digits": Digits,
    "synthetic": Synthetic,
    "topics": Topics,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "tiny_imagenet": TinyImageNet,
    "glue": Glue,
}

PARTITIONS: dict[str, type] = {
    "dirichlet": Dirichlet,
    "paper": Paper,
    "iid": Iid,
    "shards": Shards,
    "natural": Natural,
}
