"""Configuration: YAML and `--key.sub value` overrides to one typed, frozen tree of dataclasses.

`algorithm`, `model`, `data`, `partition` and local optimizers are choices by name: a plain name, or a mapping with
`name` and that choice's own keys. `privacy` is a section: a mapping of its keys, or null. This is the only place where
names become objects.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from .algorithms import ALGORITHMS
from .contract import Algorithm, LocalOptimizer
from .data import DATASETS, PARTITIONS
from .data.datasets import Dataset
from .data.partition import Partition
from .data.tokens import Tokens
from .federated.behind import Overlap
from .federated.closing import DropSlowest
from .federated.codecs import CODECS
from .federated.evaluators import EvaluatorName
from .federated.hierarchy import AllReduce
from .federated.objective import Precision
from .federated.parallel import DeepSpeedSettings, Sharding
from .federated.schedule import LrSchedule
from .kernels.dispatch import KernelsName
from .layout import Role
from .models import MODELS
from .optim import OPTIMIZERS
from .privacy.mechanism import Privacy
from .wire import Codec


class ModelChoice(Protocol):
    def build(
        self,
        kind: Literal["image", "language", "text"],
        input_shape: tuple[int, ...],
        classes: int,
        tokens: Tokens = ...,
    ) -> nn.Module: ...

    def roles(self, module: nn.Module) -> dict[str, Role]: ...


class DataChoice(Protocol):
    def load(self) -> Dataset: ...


class PartitionChoice(Protocol):
    def split(self, labels: np.ndarray, groups: np.ndarray | None, clients: int, seed: int) -> Partition: ...


CHOICES: dict[Any, Mapping[str, type]] = {
    Algorithm: ALGORITHMS,
    LocalOptimizer: OPTIMIZERS,
    ModelChoice: MODELS,
    DataChoice: DATASETS,
    PartitionChoice: PARTITIONS,
    Codec: CODECS,
}

T = typing.TypeVar("T")
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A key or value that the configuration does not accept."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, resolved.

    Args:
        algorithm: the federated algorithm and its own keys.
        model: the model and its own keys.
        data: the dataset and its own keys.
        partition: how samples are split over clients.
        run_dir: folder of the run.
        seed: of everything random: initial model, partition, cohorts, batches.
        rounds: communication rounds.
        clients: the population.
        cohort: clients per round (expected, under Poisson sampling).
        local_steps: most local steps per round.
        local_epochs: most passes over a client's samples per round; with local_steps the smaller counts.
        batch_size: samples per local step.
        lr: client learning rate.
        schedule: of the learning rate over rounds.
        sampling: of the cohort.
        weighting: of clients in the mean.
        clip_norm: l2 norm each mini-batch gradient is clipped to; .inf for none.
        codec: packs what clients send of vectors the size of the model; null sends floats.
        precision: bf16 computes under autocast, vectors stay float32.
        evaluator: how gradients are computed; auto measures loop and batched, compiled has to be asked for.
        clients_per_batch: clients a rank trains at once; null lets the evaluator decide.
        microbatch_size: samples of a mini-batch that go forward and backward at once, to save memory; null for all.
        placement: balance ranks by estimated work, or also by measured speed.
        drop_slowest: sample more clients than the cohort, and leave out those that report last; null waits for all.
        overlap: take in what clients send while the next ones train; auto where the node has a core to spare.
        reduce_dtype: of sums over clients; float64 hides rank count and order, float32 halves link bytes.
        reduction: exact sums over clients are the same bits on any number of ranks, at twice the link bytes of float64.
        all_reduce: hierarchical sums over the ranks of every node, then across nodes, where gloo's flat one is a ring
            over all ranks; NCCL does so by itself. The nodes must have as many ranks each.
        on_nonfinite: what a client that sends NaN or infinity does to the run.
        kernels: what optimizer steps and the other ops run on; auto takes the fastest backend that can run each.
        device: where clients train.
        threads: torch threads per rank; parallelism comes from ranks.
        eval_every: rounds between evaluations; the last round always is one.
        checkpoint_every: rounds between checkpoints; the last round always is one.
        keep_checkpoints: newest checkpoints that stay on disk.
        store_memory_bytes: per-client state held in memory per rank before it is mapped from files.
        timeout_s: longest a rank waits for the others, at the start and in every collective.
        sharding: how the ranks of a client group share its model: ddp splits mini-batches, fsdp2 and deepspeed (ZeRO-3)
            the model too, with every vector of the algorithm; none trains a client on one rank.
        shard_size: ranks of a client group.
        deepspeed: what sharding by deepspeed leaves to choose; null for its defaults.
        privacy: client-level differential privacy of algorithms that ask for it.
    """

    algorithm: Algorithm
    model: ModelChoice
    data: DataChoice
    partition: PartitionChoice
    run_dir: Path
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: Count
    clients: Count
    cohort: Count
    local_steps: Count | None = None
    local_epochs: Count | None = None
    batch_size: Count
    lr: Annotated[float, Field(gt=0, lt=math.inf)]
    schedule: LrSchedule = "cosine"
    sampling: Literal["uniform", "poisson"] = "uniform"
    weighting: Literal["uniform", "samples"] = "uniform"
    clip_norm: Positive = 10.0
    codec: Codec | None = None
    precision: Precision = "fp32"
    evaluator: EvaluatorName = "auto"
    clients_per_batch: Count | None = None
    microbatch_size: Count | None = None
    placement: Literal["estimated", "measured"] = "estimated"
    drop_slowest: DropSlowest | None = None
    overlap: Overlap = "auto"
    reduce_dtype: Literal["float64", "float32"] = "float64"
    reduction: Literal["exact", "fast"] = "fast"
    all_reduce: AllReduce = "flat"
    on_nonfinite: Literal["error", "drop_client"] = "error"
    kernels: KernelsName = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    eval_every: Count = 1
    checkpoint_every: Count = 10
    keep_checkpoints: Count = 2
    store_memory_bytes: Annotated[float, Field(ge=0, lt=math.inf)] = 2.0**30
    timeout_s: Annotated[float, Field(ge=1, le=86400)] = 600.0
    sharding: Sharding = "none"
    shard_size: Count = 1
    deepspeed: DeepSpeedSettings | None = None
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        if self.cohort > self.clients:
            raise ConfigError(f"cohort: {self.cohort} is more than the number of clients, {self.clients}")
        if self.drop_slowest is not None:
            if (sampled := self.drop_slowest.sampled(self.cohort)) > self.clients:
                raise ConfigError(
                    f"drop_slowest.over_sampling: {self.drop_slowest.over_sampling:g} samples {sampled} clients for a "
                    f"cohort of {self.cohort}, more than the number of clients, {self.clients}"
                )
            if self.sampling == "poisson":
                raise ConfigError("drop_slowest: a Poisson cohort has no size to fill; use sampling: uniform")
        if self.local_steps is None and self.local_epochs is None:
            raise ConfigError("local_steps: missing; set local_steps, local_epochs or both")
        if self.reduction == "exact" and self.reduce_dtype != "float64":
            raise ConfigError(f"reduce_dtype: {self.reduce_dtype}, expected float64 with reduction: exact")
        if self.sharding == "none" and self.shard_size > 1:
            raise ConfigError(
                f"shard_size: {self.shard_size} ranks to a client need sharding: ddp, fsdp2 or deepspeed, not none"
            )
        if self.sharding != "none" and self.shard_size == 1:
            raise ConfigError(f"shard_size: 1, but sharding: {self.sharding} needs groups of 2 ranks or more")
        if self.deepspeed is not None and self.sharding != "deepspeed":
            raise ConfigError(f"deepspeed: has no effect with sharding: {self.sharding}; leave it null")


def load(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """A configuration file with overrides, checked and resolved.

    Args:
        path: a YAML file, or None for overrides alone.
        overrides: dotted keys such as `algorithm.alpha` to values.

    Raises:
        ConfigError: unknown key or name (with the nearest one), wrong type or range, missing key.
        FileNotFoundError: no such file.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    # A choice first, then the keys below it, in whatever order they were given.
    for dotted in sorted(overrides, key=lambda dotted: dotted.count(".")):
        _set(tree, dotted, copy.deepcopy(overrides[dotted]))
    return make(Config, tree)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--lr", "0.1", "--algorithm.alpha=0.5"]` to `{"lr": 0.1, "algorithm.alpha": 0.5}`; values are YAML."""
    overrides: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        key, equals, text = argument[2:].partition("=")
        if not argument.startswith("--") or not key:
            raise ConfigError(f"{argument!r}: expected --key value or --key=value")
        if not equals:
            following = next(rest, "--")
            if following.startswith("--"):
                raise ConfigError(f"--{key}: expected a value after it")
            text = following
        overrides[key] = parse_value(text)
    return overrides


def parse_value(text: str) -> Any:
    """What a value on the command line means: YAML, or the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def resolved(config: Any) -> dict[str, Any]:
    """The configuration as plain nested values, every default written out; `load` reads it back to an equal one."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    plain = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        table = _table(hints[field.name])
        if table is not None and value is not None:
            value = {"name": _name_of(value, table), **resolved(value)}
        elif _section(hints[field.name]) is not None:
            value = None if value is None else resolved(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = _as_lists(value)
        plain[field.name] = value
    return plain


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the known word closest to a misspelt one, else the list of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(sorted(known))}"


def describe(cls: type) -> list[tuple[str, str, str]]:
    """`(key, type, default)` of every key of a configuration class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = []
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else field.default
        table = _table(hints[field.name])
        if table is not None and default not in ("required", None):
            default = _name_of(default, table)
        rows.append((field.name, _type_text(hints[field.name]), str(default)))
    return rows


def _table(hint: Any) -> Mapping[str, type] | None:
    """The choices that a hint stands for, where it is a choice, or a choice or null."""
    either = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((CHOICES[item] for item in either if item in CHOICES), None)


def _name_of(chosen: Any, table: Mapping[str, type]) -> str:
    return next(name for name, cls in table.items() if cls is type(chosen))


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, leaf = dotted.split(".")
    node = tree
    for key in path:
        below = node.get(key)
        if isinstance(below, str):
            below = {"name": below}
        node[key] = below = {} if below is None else below
        if not isinstance(below, dict):
            raise ConfigError(f"{dotted}: {key} is {below!r}, which has no keys below it")
        node = below
    # A bare name replaces a choice whole: the keys of the old choice would not fit the new one.
    node[leaf] = value


def make(cls: type[T], tree: Mapping[Any, Any]) -> T:
    """A configuration class from a mapping of its keys.

    Raises:
        ConfigError: an unknown or missing key, or a value that its key does not take.
    """
    made: T = _make(cls, tree, "")
    return made


def _make(cls: Any, tree: Mapping[Any, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{where}{key}: unknown key{nearest(str(key), list(fields))}")
    values = {}
    for name, field in fields.items():
        if name in tree:
            value, table = tree[name], _table(hints[name])
            default = field.default
            if table and isinstance(value, dict) and "name" not in value and default not in (dataclasses.MISSING, None):
                # The default's own keys too: it may differ from what its name alone stands for.
                value = {"name": _name_of(default, table), **resolved(default), **value}
            values[name] = _value(hints[name], value, f"{where}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name}: missing; expected {_type_text(hints[name])}")
    return cls(**values)


def _section(hint: Any) -> Any:
    """The dataclass of a key that is a mapping of keys or null; None where it is something else."""
    for item in typing.get_args(hint):
        if isinstance(item, type) and dataclasses.is_dataclass(item):
            return item
    return None


def _value(hint: Any, value: Any, where: str) -> Any:
    table = _table(hint)
    if table is not None:
        return None if value is None and hint not in CHOICES else choice(table, value, where)
    if (section := _section(hint)) is not None and isinstance(value, Mapping):
        return _make(section, value, f"{where}.")
    if isinstance(value, bool) and "bool" not in _type_text(hint):
        raise ConfigError(f"{where}: {value!r}, expected {_type_text(hint)}")
    if hint is Path and isinstance(value, (int, datetime.date)):
        value = str(value)  # YAML reads a folder named 7 as a number
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = sorted({item["msg"] for item in error.errors()})
        raise ConfigError(f"{where}: {value!r}, expected {_type_text(hint)} ({'; '.join(reasons)})") from None


def choice(table: Mapping[str, type], value: Any, where: str) -> Any:
    """The object that a name, or a mapping with `name` and its own keys, stands for in a table.

    Raises:
        ConfigError: an unknown name or key, or a value that the key does not take; `where` is the key it stands at.
    """
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ConfigError(f"{where}: {value!r}, expected a name or a mapping with 'name'; names: {', '.join(table)}")
    name = options["name"]
    if name not in table:
        raise ConfigError(f"{where}: unknown name {name!r}{nearest(name, list(table))}")
    return _make(table[name], {key: below for key, below in options.items() if key != "name"}, f"{where}.")


def _type_text(hint: Any) -> str:
    if hint in CHOICES:
        return "a name of " + ", ".join(CHOICES[hint])
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *rules = typing.get_args(hint)
        text = _type_text(base)
        signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
        limits = []
        for limit in (limit for rule in rules for limit in getattr(rule, "metadata", ())):
            kind = type(limit).__name__
            limits.append(f"{signs[kind]} {getattr(limit, kind.lower())}")
        return f"{text} {' and '.join(limits)}".strip()
    if origin is Literal:
        return " | ".join(str(item) for item in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_text(item) for item in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"keys {', '.join(field.name for field in dataclasses.fields(hint))}"
    return str(getattr(hint, "__name__", hint)) if origin is None else str(hint)
