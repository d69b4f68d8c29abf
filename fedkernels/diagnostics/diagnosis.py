"""A run's state to `diagnosis.json`: every number with how it was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint
from ..config import Config, load
from ..federated.collectives import Collectives
from ..federated.engine import Engine
from ..metrics import strict
from ..rng import Purpose, stream
from ..run_folder import fingerprint
from ..runs import Run
from ..train import build
from .cohort import TrainedCohort, train_cohort
from .loss import SampleLoss
from .settings import DiagnosisSettings
from .sharpness import sam_sharpness
from .slices import centred, filter_normalised, slice_1d, slice_2d
from .spectrum import hutchinson, lanczos
from .updates import Drift, agreement, aligned_wires, by_layer, drift

DIAGNOSIS_FILE = "diagnosis.json"
# Columns of `metrics.jsonl` that private runs have, taken over with their last value and mean.
RECORDED = ("clipped_fraction", "noise_to_signal", "update_norm_p50")
# What is drawn, below one purpose; the place follows: 0 for the server, client id + 1 for a client.
_SUBSAMPLE, _KRYLOV, _PROBES, _ASCENT, _DIRECTIONS = range(5)

METHODS = {
    "loss": "mean cross-entropy over the samples, without augmentation and dropout",
    "gradient_norm": "l2 norm of the gradient of that loss",
    "lambda_max": "largest Ritz value of Lanczos with full reorthogonalisation on Hessian-vector products (double "
    "backward); an eigenvalue lies within `residual`, `tolerance` is relative",
    "trace": "Hutchinson: mean of zᵀHz over Rademacher probes, with its standard error",
    "sharpness_one_step": "f(x + ρ∇f(x)/‖∇f(x)‖) − f(x)",
    "sharpness_ascent": "f(x+ε) − f(x) after projected gradient ascent in ‖ε‖ ≤ ρ from the one step on, with steps of "
    "length ρ that are halved where they do not rise",
}


def diagnose(engine: Engine, settings: DiagnosisSettings) -> dict[str, Any]:
    """Measure the server's model and one cohort's training from it; the engine stays as it is.

    The global loss f is the mean over the training samples of all clients, measured at the server's x. A client's f_i
    is the mean over its own, measured at y_i, where a round of local training from x ends.

    Raises:
        ValueError: a loss is not finite, or the cohort is empty.
        NonFiniteUpdateError: a client's training ends at NaN or infinity.
    """
    x, partition = engine.server.x, engine.batches.partition
    lr = engine.settings.lr if settings.lr is None else settings.lr
    f = _loss(engine, partition.indices, settings, 0)
    here = _measure(f, x, settings, 0, "the server's model")
    cohort = train_cohort(engine, lr)
    local = []
    for client, y in zip(cohort.clients, cohort.y, strict=True):
        f_i = _loss(engine, partition[client], settings, client + 1)
        local.append({"client": client, **_measure(f_i, y, settings, client + 1, f"client {client}'s model")})
    found = {
        "algorithm": type(engine.algorithm).__name__,
        "round": engine.round,
        "parameters": engine.layout.d,
        "population": engine.population,
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": x.device.type,
        "settings": dataclasses.asdict(settings) | {"lr": lr},
        "global_samples": f.samples,
        "measures": {name: _record(name, here, local, settings) for name in METHODS},
        "slices": _slices(f, engine, settings),
        "updates": _updates(engine, cohort),
        "gradients": _gradients(cohort, engine.settings.clip_norm),
        "preconditioner_drift": _drifts(engine, cohort),
    }
    plain: dict[str, Any] = strict(found)
    return plain


def diagnose_run(
    run_dir: Path, settings: DiagnosisSettings, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The diagnosis of a run folder's newest checkpoint, and remarks about the checkpoint.

    The engine is rebuilt on this process alone. It computes in float32 even where the run used bf16, whose rounding
    would drown the Hessian.

    Args:
        overrides: keys that do not change what the run is, such as `device`.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        CheckpointError: its checkpoints are damaged.
        ConfigError, ValueError: a configuration that does not load, or what `diagnose` raises.
    """
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has no config.yaml")
    run = Run.read(run_dir)
    config: Config = load(run_dir / "config.yaml", {"run_dir": str(run_dir), **(overrides or {})})
    alone = dataclasses.replace(config, precision="fp32", sharding="none", shard_size=1, deepspeed=None)
    engine, _, _ = build(alone, Collectives())
    restored = checkpoint.restore(run_dir / "checkpoints", engine, fingerprint(config))
    if restored is None:
        raise FileNotFoundError(f"{run_dir} has no checkpoint: there is no state to diagnose")
    diagnosis = diagnose(engine, settings)
    recorded = {}
    for column in RECORDED:
        if values := list(run.values(column).values()):
            recorded[column] = {"last": values[-1], "mean": float(np.mean(values)), "rounds": len(values)}
    return diagnosis | {"algorithm": run.config["algorithm"]["name"], "recorded": recorded}, restored[1]


def write_diagnosis(diagnosis: Mapping[str, Any], out: Path) -> None:
    """Write a diagnosis as JSON, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    temporary.write_text(json.dumps(diagnosis, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, out)


def _loss(engine: Engine, indices: np.ndarray, settings: DiagnosisSettings, place: int) -> SampleLoss:
    if len(indices) > settings.samples:
        rng = stream(settings.seed, Purpose.DIAGNOSTICS, _SUBSAMPLE, place)
        indices = indices[np.sort(rng.choice(len(indices), settings.samples, replace=False))]
    return SampleLoss(engine.objective, engine.layout, indices)


def _gaussian(x: Tensor, seed: int, what: int, place: int) -> Callable[[], Tensor]:
    rng = stream(seed, Purpose.DIAGNOSTICS, what, place)
    return lambda: torch.from_numpy(rng.standard_normal(x.numel())).to(x.device, x.dtype)


def _rademacher(x: Tensor, seed: int, what: int, place: int) -> Callable[[], Tensor]:
    rng = stream(seed, Purpose.DIAGNOSTICS, what, place)
    return lambda: torch.from_numpy(2.0 * rng.integers(0, 2, x.numel()) - 1).to(x.device, x.dtype)


def _measure(f: SampleLoss, x: Tensor, settings: DiagnosisSettings, place: int, whose: str) -> dict[str, Any]:
    """Every measure of f at x, by name."""
    seed, loss = settings.seed, f(x)
    if not math.isfinite(loss):
        raise ValueError(f"the loss at {whose} is {loss}: a model that has diverged cannot be measured")

    def product(v: Tensor) -> Tensor:
        return f.hvp(x, v)

    ritz = lanczos(product, _gaussian(x, seed, _KRYLOV, place), settings.iterations, settings.tolerance)
    top, residual = float(ritz.values[-1]), float(ritz.residuals[-1])
    trace = hutchinson(product, _rademacher(x, seed, _PROBES, place), settings.probes)
    draw = _gaussian(x, seed, _ASCENT, place)
    sharpness = sam_sharpness(f, x, settings.rho, settings.ascent_steps, draw)
    found: dict[str, dict[str, Any]] = {
        "loss": {"value": loss},
        "gradient_norm": {"value": float(torch.linalg.vector_norm(f.gradient(x)))},
        "lambda_max": {"value": top, "residual": residual, "iterations": len(ritz.values)}
        | {"settled": residual <= settings.tolerance * abs(top)},
        "trace": {"value": trace.value, "standard_error": trace.standard_error},
        "sharpness_one_step": {"value": sharpness.one_step},
        "sharpness_ascent": {"value": sharpness.ascent},
    }
    return {name: number | {"samples": f.samples} for name, number in found.items()}


def _record(
    name: str, here: Mapping[str, Any], local: Sequence[Mapping[str, Any]], settings: DiagnosisSettings
) -> dict[str, Any]:
    """One measure: how, at x, at every y_i, and how the two differ."""
    knobs = {
        "lambda_max": ("iterations", "tolerance"),
        "trace": ("probes",),
        "sharpness_one_step": ("rho",),
        "sharpness_ascent": ("rho", "ascent_steps"),
    }.get(name, ())
    values = np.array([client[name]["value"] for client in local])
    at_x = here[name]["value"]
    return {
        "method": METHODS[name],
        "seed": settings.seed,
        **{knob: getattr(settings, knob) for knob in knobs},
        "global": here[name],
        "local": [{"client": client["client"], **client[name]} for client in local],
        "discrepancy": {
            "local_mean": values.mean(),
            "local_min": values.min(),
            "local_max": values.max(),
            "difference": values.mean() - at_x,
            "ratio": values.mean() / at_x if at_x else None,
        },
    }


def _slices(f: SampleLoss, engine: Engine, settings: DiagnosisSettings) -> dict[str, Any]:
    x, draw = engine.server.x, _gaussian(engine.server.x, settings.seed, _DIRECTIONS, 0)
    u, v = (filter_normalised(draw(), x, engine.layout) for _ in range(2))
    line, square = centred(settings.span, settings.points), centred(settings.span, settings.grid)
    return {
        "method": "global loss at x + a·u and x + a·u + b·v along Gaussian directions, each filter scaled to the norm "
        "of the model's (Li et al. 2018); biases and norms stay",
        "seed": settings.seed,
        "samples": f.samples,
        "line": {"offsets": line, "loss": slice_1d(f, x, u, line)},
        "square": {"offsets": square, "loss": slice_2d(f, x, u, v, square)},
    }


def _updates(engine: Engine, cohort: TrainedCohort) -> dict[str, Any]:
    found = agreement(cohort.y - engine.server.x)
    off_diagonal = found.cosine[~torch.eye(len(cohort.clients), dtype=torch.bool, device=found.cosine.device)]
    return {
        "method": "y_i − x after one round of local training, in float64",
        "clients": cohort.clients,
        "samples": engine.sizes[cohort.clients],
        "steps": engine.batches.steps(cohort.clients),
        "norm": found.norms,
        "norm_of_mean": found.mean_norm,
        "cosine": found.cosine,
        "mean_pairwise_cosine": float(off_diagonal.mean()) if len(off_diagonal) else None,
        "cosine_to_mean": found.to_mean,
    }


def _gradients(cohort: TrainedCohort, clip_norm: float) -> dict[str, Any]:
    norms = cohort.gradient_norms.double()
    return {
        "method": "l2 norms of the mini-batch gradients of that round, before clipping",
        "clip_norm": clip_norm,
        "count": norms.numel(),
        "norm_p50": float(norms.quantile(0.5)),
        "norm_max": float(norms.max()),
        "clipped_fraction": float((norms > clip_norm).double().mean()),
    }


def _drifts(engine: Engine, cohort: TrainedCohort) -> dict[str, Any]:
    def plain(found: Drift) -> dict[str, Any]:
        return {"value": found.absolute, "relative": found.relative}

    drifts = {}
    for name in aligned_wires(engine.wires):
        layers = by_layer(cohort.up[name], engine.wires[name], engine.layout)
        drifts[name] = {
            "method": "(1/S) Σ‖Θ_i − Θ̄‖² of the states clients send; relative to ‖Θ̄‖²",
            **plain(drift(cohort.up[name])),
            "by_layer": {layer: plain(drift(part)) for layer, part in layers.items()},
        }
    return drifts
