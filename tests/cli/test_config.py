"""Configurations: what is accepted, what is refused and in which words, overrides, and the way back to YAML."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.small_runs import CONFIG

from fedkernels.algorithms import FedAvg, FedBcgd, LocalMuon
from fedkernels.algorithms.fedmuon import FedMuon
from fedkernels.config import CHOICES, Config, ConfigError, describe, load, parse_overrides, resolved
from fedkernels.data import PARTITIONS
from fedkernels.federated.codecs import Int8, TopK
from fedkernels.models.vision import Mlp
from fedkernels.optim import AdamW, Muon, Sgd
from fedkernels.privacy.mechanism import Privacy

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
BASE = CONFIG | {"run_dir": "runs/small"}
# The key of a configuration where the names of each table go.
WHERE = dict(
    zip(("algorithm", "algorithm.local", "model", "data", "partition", "codec"), CHOICES.values(), strict=True)
)
NAMES = [(key, name) for key, table in WHERE.items() for name in table]
# A value that fits keys without a default.
REQUIRED = {name: {"path": "x"} for name in ("cifar10", "cifar100", "tiny_imagenet", "pretrained")}


def accept(**keys: Any) -> Config:
    return load(None, BASE | keys)


def refuse(**keys: Any) -> str:
    with pytest.raises(ConfigError) as refusal:
        accept(**keys)
    return str(refusal.value)


def with_choice(key: str, name: str, **keys: Any) -> dict[str, Any]:
    choice = {"name": name} | REQUIRED.get(name, {}) | keys
    return {"algorithm": {"name": "fedavg", "local": choice}} if key == "algorithm.local" else {key: choice}


def test_values_arrive_with_their_types() -> None:
    config = accept(lr="1e-3", clip_norm=math.inf, algorithm={"name": "fedmuon", "alpha": 1}, local_epochs=None)
    assert config.lr == 1e-3
    assert config.clip_norm == math.inf
    assert config.run_dir == Path("runs/small")
    assert config.algorithm == FedMuon(alpha=1.0)
    assert config.model == Mlp(hidden=(8,))
    assert config.local_epochs is None


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Config)])
def test_a_wrong_type_names_key_value_and_expectation(key: str) -> None:
    wrong: Any = {"no": "such"}
    # A mapping has the type of a section, and keys that are not its own.
    if key in ("privacy", "deepspeed", "drop_slowest"):
        assert refuse(**{key: wrong}).startswith(f"{key}.no: unknown key; ")
        wrong = 3
    message = refuse(**{key: wrong})
    assert message.startswith(f"{key}: {wrong}, expected ")
    if key not in WHERE:
        assert {name: kind for name, kind, _ in describe(Config)}[key] in message


@pytest.mark.parametrize(("key", "name"), NAMES)
def test_a_wrong_type_below_a_choice_names_the_whole_key(key: str, name: str) -> None:
    for field in dataclasses.fields(WHERE[key][name]):
        message = refuse(**with_choice(key, name, **{field.name: {"no": "such"}}))
        # Keys without a name belong to the choice that is the default, or are a section's own.
        below = ".no: unknown key" if field.name in ("local", "lora") else ": {'no': 'such'}, expected "
        assert message.startswith(f"{key}.{field.name}{below}")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", -1, "int >= 0"),
        ("rounds", 0, "int >= 1"),
        ("clients", 0, "int >= 1"),
        ("cohort", 0, "int >= 1"),
        ("local_steps", 0, "int >= 1 | null"),
        ("local_epochs", 0, "int >= 1 | null"),
        ("batch_size", 0, "int >= 1"),
        ("batch_size", 2.5, "int >= 1"),
        ("batch_size", True, "int >= 1"),
        ("lr", 0, "float > 0 and < inf"),
        ("lr", math.inf, "float > 0 and < inf"),
        ("lr", math.nan, "float > 0 and < inf"),
        ("lr", "fast", "float > 0 and < inf"),
        ("schedule", "linear", "constant | cosine | exponential"),
        ("sampling", "all", "uniform | poisson"),
        ("weighting", "size", "uniform | samples"),
        ("clip_norm", 0, "float > 0"),
        ("precision", "fp16", "fp32 | bf16"),
        ("evaluator", "fast", "auto | loop | batched | compiled"),
        ("kernels", "cuda", "auto | reference | cpp | triton"),
        ("clients_per_batch", 0, "int >= 1 | null"),
        ("placement", "random", "estimated | measured"),
        ("reduce_dtype", "bf16", "float64 | float32"),
        ("on_nonfinite", "ignore", "error | drop_client"),
        ("device", "tpu", "auto | cpu | cuda"),
        ("threads", 0, "int >= 1 and <= 1024"),
        ("eval_every", 0, "int >= 1"),
        ("checkpoint_every", 0, "int >= 1"),
        ("keep_checkpoints", 0, "int >= 1"),
        ("store_memory_bytes", -1, "float >= 0 and < inf"),
        ("store_memory_bytes", math.inf, "float >= 0 and < inf"),
    ],
)
def test_a_value_out_of_range_names_key_value_and_expectation(key: str, value: object, expected: str) -> None:
    assert refuse(**{key: value}).partition(" (")[0] == f"{key}: {value!r}, expected {expected}"


SHARE, POSITIVE, NOT_NEGATIVE = "float >= 0 and < 1", "float > 0", "float >= 0"
FRACTION, PART, ALPHA = "float > 0 and < 1", "float > 0 and <= 1", "float > 0 and < inf"


@pytest.mark.parametrize(
    ("key", "name", "below", "value", "expected"),
    [
        ("algorithm", "fedmuon", "alpha", 1.5, "float >= 0 and <= 1"),
        ("algorithm", "fedmuon", "beta", 1, SHARE),
        ("algorithm", "fedmuon", "share_momentum", "perhaps", "bool"),
        ("algorithm", "fedmuon", "route", "none", "hidden | all_matrices"),
        ("algorithm", "fedbcgd", "blocks", 0, "int >= 1 | tuple[tuple[str, ...], ...]"),
        ("algorithm", "fedbcgd_plus", "rho_c", 0, "float > 0 and <= 1"),
        ("algorithm", "fedmuon", "momentum_rank", 0, f"{PART} | null"),
        ("algorithm", "fedmuon", "momentum_rank", 1.5, f"{PART} | null"),
        ("algorithm", "fedmuon", "orthogonalization", "svd", "newton_schulz | polar_express"),
        ("algorithm", "scaffold", "server_lr", 0, POSITIVE),
        ("algorithm.local", "sgd", "momentum", 5, SHARE),
        ("algorithm.local", "sgd", "weight_decay", -0.1, NOT_NEGATIVE),
        ("algorithm.local", "adamw", "beta1", 1.0, SHARE),
        ("algorithm.local", "adamw", "beta2", -0.1, SHARE),
        ("algorithm.local", "adamw", "eps", 0, POSITIVE),
        ("algorithm.local", "adamw", "weight_decay", math.nan, NOT_NEGATIVE),
        ("algorithm.local", "muon", "momentum", 1, SHARE),
        ("algorithm.local", "muon", "weight_decay", -1, NOT_NEGATIVE),
        ("algorithm.local", "muon", "lr_multiplier", 0, POSITIVE),
        ("algorithm.local", "muon", "ns_steps", 0, "int >= 1"),
        ("algorithm.local", "muon", "adamw_beta1", 1, SHARE),
        ("algorithm.local", "muon", "adamw_beta2", 1, SHARE),
        ("algorithm.local", "muon", "adamw_eps", 0, POSITIVE),
        *(("algorithm.local", "soap", n, 1, SHARE) for n in ("beta1", "beta2", "shampoo_beta")),
        ("algorithm.local", "soap", "refresh_every", 0, "int >= 1"),
        ("algorithm.local", "soap", "route", "none", "hidden | all_matrices"),
        ("algorithm.local", "sophia", "rho", 0, POSITIVE),
        ("algorithm.local", "sophia", "hessian_every", 0, "int >= 1"),
        ("algorithm.local", "shampoo", "root", 3, "2 | 4"),
        ("algorithm.local", "shampoo", "eps", 0, POSITIVE),
        ("algorithm", "fedpac", "beta", 1.5, "float >= 0 and <= 1"),
        ("data", "digits", "test_fraction", 0, FRACTION),
        ("data", "digits", "test_fraction", 1, FRACTION),
        *(("data", "synthetic", n, 0, "int >= 1") for n in ("classes", "samples", "test_samples", "channels", "size")),
        ("data", "synthetic", "seed", -1, "int >= 0"),
        ("data", "topics", "length", 0, "int >= 1"),
        ("data", "topics", "test_fraction", 1, FRACTION),
        ("data", "glue", "length", 0, "int >= 1"),
        ("partition", "dirichlet", "alpha", 0, ALPHA),
        ("partition", "dirichlet", "alpha", math.inf, ALPHA),
        ("partition", "dirichlet", "min_samples", -1, "int >= 0"),
        ("partition", "paper", "alpha", -1, ALPHA),
        ("partition", "shards", "shards_per_client", 0, "int >= 1"),
        ("codec", "int8", "chunk", 0, "int >= 1 and < 2147483648"),
        *(("codec", name, "fraction", value, PART) for name in ("topk", "lowrank") for value in (0, -0.1, 1.1)),
    ],
)
def test_a_range_below_a_choice_is_told_alike(key: str, name: str, below: str, value: object, expected: str) -> None:
    message = refuse(**with_choice(key, name, **{below: value}))
    assert message.startswith(f"{key}.{below}: {value!r}, expected {expected} (")


@pytest.mark.parametrize(("key", "name"), NAMES)
def test_no_number_below_a_choice_may_be_negative(key: str, name: str) -> None:
    for below, kind, _ in describe(WHERE[key][name]):
        if kind.startswith(("int", "float")):
            assert refuse(**with_choice(key, name, **{below: -1})).startswith(f"{key}.{below}: -1, expected {kind} (")


@pytest.mark.parametrize(
    ("codec", "expected"), [(None, None), ("int8", Int8()), ({"name": "topk", "fraction": 1}, TopK(fraction=1.0))]
)
def test_a_choice_may_be_none(codec: Any, expected: Any) -> None:
    config = accept(codec=codec)
    assert config.codec == expected
    assert load(None, resolved(config)) == config
    assert accept().codec is load(None, resolved(config) | {"codec": None}).codec is None


def test_a_key_below_a_choice_that_is_none_needs_a_name() -> None:
    assert refuse(**{"codec.chunk": 8}).startswith("codec: {'chunk': 8}, expected a name or a mapping with 'name'; ")
    assert refuse(**{"codec.chunk": 8, "codec": "topk"}) == "codec.chunk: unknown key; expected one of " + ", ".join(
        ("error_feedback", "fraction")
    )


def test_a_momentum_rank_needs_a_momentum_that_is_sent() -> None:
    with pytest.raises(ValueError, match=r"momentum_rank is 0\.5, but without share_momentum no momentum is sent"):
        accept(algorithm={"name": "fedmuon", "momentum_rank": 0.5, "share_momentum": False})


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    assert refuse(clients=5, cohort=6) == "cohort: 6 is more than the number of clients, 5"
    assert accept(clients=5, cohort=5).cohort == 5


def test_one_of_steps_and_epochs_is_needed() -> None:
    assert refuse(local_steps=None) == "local_steps: missing; set local_steps, local_epochs or both"
    assert accept(local_steps=None, local_epochs=2).local_epochs == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cohrt": 3}, "cohrt: unknown key; did you mean 'cohort'?"),
        ({"algorithm.alpa": 0.5, "algorithm": "fedmuon"}, "algorithm.alpa: unknown key; did you mean 'alpha'?"),
        ({"model.hiden": [8]}, "model.hiden: unknown key; did you mean 'hidden'?"),
        (
            {"algorithm": {"name": "fedavg", "local": {"name": "sgd", "momentun": 0}}},
            "algorithm.local.momentun: unknown key; did you mean 'momentum'?",
        ),
    ],
)
def test_an_unknown_key_suggests_the_nearest(keys: dict[str, Any], message: str) -> None:
    assert refuse(**keys) == message


@pytest.mark.parametrize(("key", "name"), NAMES)
def test_an_unknown_name_suggests_the_nearest(key: str, name: str) -> None:
    misspelt = f"{name}_"
    assert refuse(**with_choice(key, misspelt)) == f"{key}: unknown name {misspelt!r}; did you mean {name!r}?"


def test_a_name_like_no_other_gets_the_list() -> None:
    expected = ", ".join(sorted(PARTITIONS))
    assert refuse(partition="qqqq") == f"partition: unknown name 'qqqq'; expected one of {expected}"


@pytest.mark.parametrize(
    "key", [field.name for field in dataclasses.fields(Config) if field.default is dataclasses.MISSING]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: missing; expected "):
        load(None, {name: value for name, value in BASE.items() if name != key})


def test_a_missing_key_of_a_choice_is_named() -> None:
    assert refuse(data="cifar10") == "data.path: missing; expected str"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_files_of_the_repository_load_and_resolve(file: Path) -> None:
    config = load(file, {})
    assert load(None, yaml.safe_load(yaml.safe_dump(resolved(config)))) == config


def test_the_files_of_the_repository_name_different_run_folders() -> None:
    assert len({yaml.safe_load(file.read_text())["run_dir"] for file in FILES}) == len(FILES) > 5


@pytest.mark.parametrize(("key", "name"), NAMES)
def test_resolved_reads_back_to_an_equal_configuration(key: str, name: str, tmp_path: Path) -> None:
    config = accept(clip_norm=math.inf, **with_choice(key, name))
    plain = resolved(config)
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert load(file, {}) == config
    assert list(plain) == [field.name for field in dataclasses.fields(Config)]
    choice = plain["algorithm"]["local"] if key == "algorithm.local" else plain[key]
    assert choice["name"] == name
    assert set(choice) == {"name"} | {field.name for field in dataclasses.fields(WHERE[key][name])}


def test_nested_lists_stay_lists() -> None:
    """What a checkpoint keeps as JSON equals what the configuration resolves to."""
    config = accept(algorithm={"name": "fedbcgd", "blocks": [["layers.0.*", "*.bias"], ["*"]], "shared": []})
    assert config.algorithm == FedBcgd(blocks=(("layers.0.*", "*.bias"), ("*",)), shared=())
    plain = resolved(config)
    assert json.loads(json.dumps(plain)) == plain
    assert load(None, plain) == config


@pytest.mark.parametrize("blocks", [True, "two", ["a", "b"], [["a"], 1], 2.5, {"a": 1}])
def test_blocks_are_a_number_or_lists_of_patterns(blocks: Any) -> None:
    message = refuse(algorithm={"name": "fedbcgd", "blocks": blocks})
    assert message.startswith(f"algorithm.blocks: {blocks!r}, expected int >= 1 | tuple[tuple[str, ...], ...]")


# Overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "0.5", 0.5),
        ("lr", "-3", -3),
        ("algorithm.alpha", "0.25", 0.25),
        ("local_steps", "null", None),
        ("clip_norm", ".inf", math.inf),
        ("model", "{name: mlp, hidden: [4, 4]}", {"name": "mlp", "hidden": [4, 4]}),
        ("algorithm.share_momentum", "false", False),
        ("run_dir", "runs/a=b", "runs/a=b"),
        ("data.path", "[unbalanced", "[unbalanced"),
    ],
)
def test_both_forms_of_an_override_say_the_same(key: str, text: str, value: object) -> None:
    assert parse_overrides([f"--{key}", text]) == parse_overrides([f"--{key}={text}"]) == {key: value}


def test_keys_below_a_choice_mean_its_default_where_no_name_is_given() -> None:
    config = accept(**{"algorithm": "fedavg", "algorithm.local.momentum": 0.5})
    assert config.algorithm == FedAvg(local=Sgd(momentum=0.5))


def test_keys_below_a_default_keep_its_other_keys() -> None:
    config = accept(**{"algorithm": "local_muon", "algorithm.local.lr_multiplier": 10})
    assert config.algorithm == LocalMuon(local=Muon(momentum=0.98, lr_multiplier=10.0))
    config = accept(algorithm={"name": "local_muon", "local": {"name": "muon", "lr_multiplier": 10}})
    assert config.algorithm == LocalMuon(local=Muon(lr_multiplier=10.0))


@pytest.mark.parametrize("name", ["7", "2026-01-01"])
def test_a_folder_may_be_called_like_a_number_or_a_date(name: str) -> None:
    assert load(None, CONFIG | parse_overrides(["--run_dir", name])).run_dir == Path(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr"], "--lr: expected a value after it"),
        (["--lr", "--rounds", "3"], "--lr: expected a value after it"),
        (["lr", "3"], "'lr': expected --key value or --key=value"),
        (["-lr", "3"], "'-lr': expected --key value or --key=value"),
        (["--=3"], "'--=3': expected --key value or --key=value"),
    ],
)
def test_what_is_no_override_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_overrides(arguments)
    assert str(refusal.value) == message


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(BASE | {"algorithm": "fedmuon"}))
    config = load(file, {"lr": 0.5, "algorithm.alpha": 0.25, "model.hidden": [4, 4]})
    assert (config.lr, config.algorithm, config.model) == (0.5, FedMuon(alpha=0.25), Mlp(hidden=(4, 4)))
    assert config.seed == BASE["seed"]


def test_overrides_are_left_as_they_were() -> None:
    overrides = BASE | {"model": {"name": "mlp"}, "model.hidden": [4]}
    assert load(None, overrides).model == Mlp(hidden=(4,))
    assert overrides["model"] == {"name": "mlp"}


def test_a_name_replaces_a_choice_whole() -> None:
    assert accept(algorithm={"name": "fedmuon", "alpha": 0.1}).algorithm == FedMuon(alpha=0.1)
    before = BASE | {"algorithm": {"name": "fedavg", "local": "adamw"}}
    assert load(None, before | {"algorithm": "fedmuon"}).algorithm == FedMuon()


def test_keys_below_a_choice_hold_whatever_their_order() -> None:
    keys = {"algorithm": "fedavg", "algorithm.local": "adamw", "algorithm.local.beta1": 0.5}
    for order in (list(keys), list(reversed(keys))):
        config = load(None, BASE | {key: keys[key] for key in order})
        assert config.algorithm.local == AdamW(beta1=0.5)  # type: ignore[attr-defined]
    assert accept(algorithm="fedavg").algorithm.local == Sgd()  # type: ignore[attr-defined]


PRIVACY = {"privacy.noise_multiplier": 1, "privacy.clip": "1e-1", "privacy.delta": 0.01}


def test_a_section_is_read_and_resolved_and_may_be_missing() -> None:
    config = accept(**PRIVACY)
    assert config.privacy == Privacy(noise_multiplier=1.0, clip=0.1, delta=0.01)
    assert resolved(config)["privacy"]["noise_seed"] is None
    assert load(None, resolved(config)) == config
    assert accept(privacy=None) == accept()
    assert resolved(accept())["privacy"] is None
    assert accept(privacy={"noise_multiplier": 2, "clip": 3, "delta": 0.01}, **PRIVACY) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"privacy.clip": None}, "privacy.clip: None, expected float > 0 and < inf ("),
        ({"privacy.clip": 0}, "privacy.clip: 0, expected float > 0 and < inf ("),
        ({"privacy.clip": True}, "privacy.clip: True, expected float > 0 and < inf"),
        (
            {"privacy.clip": "median"},
            "privacy.clip: 'median', expected float > 0 and < inf "
            "(Value error, C is one fixed public number: no ε covers a norm taken from clients' data)",
        ),
        ({"privacy.noise_multiplier": 0}, "privacy.noise_multiplier: 0, expected float > 0 and < 1000000 ("),
        ({"privacy.delta": 1}, "privacy.delta: 1, expected float > 0 and < 1 ("),
        ({"privacy.target_epsilon": 0}, "privacy.target_epsilon: 0, expected float > 0 and < inf | null ("),
        ({"privacy.accountant": "moments"}, "privacy.accountant: 'moments', expected pld | rdp ("),
        ({"privacy.noise": "none"}, "privacy.noise: 'none', expected seeded | secure ("),
        ({"privacy.noise_seed": -1}, "privacy.noise_seed: -1, expected int >= 0 | null ("),
        ({"privacy.clp": 1}, "privacy.clp: unknown key; did you mean 'clip'?"),
        ({"privacy": "yes"}, "privacy: 'yes', expected keys noise_multiplier, clip, delta, target_epsilon, acc"),
    ],
)
def test_a_section_names_key_value_and_expectation(keys: dict[str, Any], message: str) -> None:
    assert refuse(**(keys if "privacy" in keys else PRIVACY | keys)).startswith(message)


def test_a_missing_key_of_a_section_is_named() -> None:
    assert refuse(**{"privacy.clip": 1}) == "privacy.noise_multiplier: missing; expected float > 0 and < 1000000"


def test_a_key_below_a_plain_value_is_refused() -> None:
    assert refuse(**{"lr.warmup": 3}) == "lr.warmup: lr is 0.1, which has no keys below it"


# Files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"lr: [1\nrounds: {", "not valid YAML"),
        (b"lr: \xff\xfe", "not valid YAML"),
        (b"\x00lr: 1", "not valid YAML"),
        (b"- lr\n- rounds\n", "expected a mapping of keys, found list"),
        (b"lr", "expected a mapping of keys, found str"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        load(file, {})
    assert str(refusal.value).startswith(f"{file}: {said}")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml", {})
