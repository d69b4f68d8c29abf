"""The papers' claims, measured again: every method tuned alike, several seeds, standard errors, and a verdict.

`--tune` tries the learning rates of a grid for every method, on a seed that the tables do not use; what it finds best
stands in the configurations. Without it the configurations run as they are.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import yaml
from claims import CLAIMS, Claim, Finding, Outcome, Row, mean_se
from common import Table, arguments, markdown, report
from matplotlib.figure import Figure

from fedkernels.config import Config, load
from fedkernels.diagnostics.loss import SampleLoss
from fedkernels.diagnostics.sharpness import sam_sharpness
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine, NonFiniteUpdateError
from fedkernels.train import build

Overrides = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 1000
# Half a decade apart; SGD's rates are those of gradients, the others those of unit-sized directions.
GRIDS = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0), "unit": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
CLIPS = (0.1, 0.3, 1.0)
RADIUS = 0.05  # of the ball in which sharpness is taken
UNIT_SIZED = ("adamw", "muon", "soap", "sophia", "shampoo", "fedpac", "fedlada")


def grid(name: str) -> list[Overrides]:
    """What is tried for a configuration: five learning rates and, where updates are clipped, three bounds."""
    rates = GRIDS["unit" if any(part in name for part in UNIT_SIZED) else "sgd"]
    if not name.startswith("dp_"):
        return [{"lr": lr} for lr in rates]
    return [{"lr": lr, "privacy.clip": clip} for clip in CLIPS for lr in rates]


def configuration(suite: str, name: str, overrides: Overrides) -> Config:
    """`configs/<suite>/<name>.yaml`, or the suite's federation with the method of the digits configuration."""
    path = ROOT / "configs" / suite / f"{name}.yaml"
    if not path.exists():
        digits = yaml.safe_load((ROOT / "configs" / "digits" / f"{name}.yaml").read_text())
        keys = ("algorithm", "privacy", "sampling", "on_nonfinite", "lr")
        method = {key: digits[key] for key in keys if key in digits}
        path, overrides = path.with_name("fedavg.yaml"), method | overrides
    return load(path, overrides)


def best_of(tried: Sequence[tuple[Overrides, float]]) -> Overrides:
    """The most accurate of what was tried."""
    return max(tried, key=lambda one: one[1])[0]


def tuned(file: Path) -> dict[str, Overrides]:
    """What `--tune` found best for every method."""
    return {name: best_of(tried) for name, tried in json.loads(file.read_text())["details"]["tried"].items()}


def run(suite: str, name: str, overrides: Overrides, sharpness: bool) -> tuple[list[Row], float | None]:
    """One training: its metrics rows and, where asked for, the sharpness of the final model."""
    config = configuration(suite, name, overrides)
    engine, _, _ = build(config, Collectives())
    rows, time_s = [], 0.0
    for left in range(config.rounds, 0, -1):
        start = time.perf_counter()
        try:
            row = engine.run_round()
        except NonFiniteUpdateError:  # a learning rate too large: nothing comes of it any more
            lost = {"test_accuracy": 0.0, "test_loss": math.inf, "protocol_up_bytes": 0, "time_s": time_s}
            return [*rows, *[lost] * left], math.inf if sharpness else None
        time_s += time.perf_counter() - start
        rows.append(row | engine.evaluate() | {"time_s": time_s})
    return rows, final_sharpness(engine) if sharpness else None


def final_sharpness(engine: Engine) -> float:
    """The largest rise of the mean training loss that ten ascent steps find around the final model."""
    loss = SampleLoss(engine.objective, engine.layout, engine.batches.partition.indices)
    x = engine.server.x
    return sam_sharpness(loss, x, RADIUS, 10, lambda: torch.ones_like(x)).ascent


def run_all(
    suite: str, jobs: int, wanted: Sequence[tuple[str, Overrides]], sharp: set[str]
) -> list[tuple[list[Row], float | None]]:
    """Many runs, `jobs` at a time, in the order asked for."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(run, suite, name, overrides, name in sharp) for name, overrides in wanted]
        for (name, overrides), future in zip(wanted, futures, strict=True):
            outcome = Outcome(name, 0.0, [future.result()[0]])
            print(f"{name} {overrides}: {outcome.accuracy[0]:.2f} %", flush=True)
        return [future.result() for future in futures]


def tune(suite: str, names: Sequence[str], jobs: int, options: Overrides) -> tuple[Table, dict[str, Any]]:
    """Final accuracy of every method at every point of its grid."""
    wanted = [(name, point) for name in names for point in grid(name)]
    runs = [(name, {"seed": TUNING_SEED} | point | options) for name, point in wanted]
    tried: dict[str, list[tuple[Overrides, float]]] = {name: [] for name in names}
    for (name, point), (rows, _) in zip(wanted, run_all(suite, jobs, runs, set()), strict=True):
        tried[name].append((point, Outcome(name, point["lr"], [rows]).accuracy[0]))
    lines = []
    for name, points in tried.items():
        best, rates = best_of(points), [point["lr"] for point, _ in points]
        edge = " (edge of the grid)" if best["lr"] in (min(rates), max(rates)) else ""
        accuracy = ", ".join(f"{shown(point)}: {value:.1f}" for point, value in points)
        lines.append([name, accuracy, shown(best) + edge])
    columns = ["method", "learning rate (and clipping bound): accuracy, %", "best"]
    return {"columns": columns, "rows": lines}, {"seed": TUNING_SEED, "tried": tried, "options": options}


def shown(point: Overrides) -> str:
    return "/".join(f"{value:g}" for value in point.values())


def measure(
    suite: str, claims: Sequence[Claim], seeds: int, jobs: int, options: Overrides, best: dict[str, Overrides]
) -> dict[str, Outcome]:
    """The runs of every configuration that a claim needs, each once.

    Args:
        best: what replaces the configurations' own values, by name.
    """
    names = list(dict.fromkeys(name for claim in claims for name in claim.names))
    sharp = {name for claim in claims if claim.sharpness for name in claim.names}
    own = {name: best.get(name, {}) | options for name in names}
    wanted = [(name, {"seed": seed} | own[name]) for name in names for seed in range(seeds)]
    results = run_all(suite, jobs, wanted, sharp)
    outcomes = {}
    for index, name in enumerate(names):
        mine = results[index * seeds : (index + 1) * seeds]
        lr = configuration(suite, name, own[name]).lr
        sharpness = [value for _, value in mine if value is not None]
        outcomes[name] = Outcome(name, lr, [rows for rows, _ in mine], sharpness)
    return outcomes


def table_of(claim: Claim, outcomes: dict[str, Outcome]) -> Table:
    """What was measured for a claim, a line for every configuration."""
    mine = [outcomes[name] for name in claim.names]
    private = all("epsilon" in outcome.runs[0][-1] for outcome in mine)
    columns = ["method", "lr", "rounds", "accuracy at half, %", "final accuracy, %", "uplink, MB", "time, s"]
    columns += ["sharpness"] * claim.sharpness + ["ε"] * private
    lines = []
    for outcome in mine:
        rounds, seeds = len(outcome.runs[0]), range(len(outcome.runs))
        up_mb = statistics.mean(outcome.spent(seed, "protocol_up_bytes")[-1] / 1e6 for seed in seeds)
        time_s = statistics.mean(rows[-1]["time_s"] for rows in outcome.runs)
        half = [outcome.smoothed_accuracy(seed)[rounds // 2 - 1] for seed in seeds]
        line = [outcome.name, f"{outcome.lr:g}", rounds, mean_se(half), mean_se(outcome.accuracy)]
        line += [f"{up_mb:.1f}", f"{time_s:.1f}"]
        line += [mean_se(outcome.sharpness, 4)] if claim.sharpness else []
        line += [f"{outcome.runs[0][-1]['epsilon']:.2f}"] if private else []
        lines.append(line)
    return {"columns": columns, "rows": lines}


def figure_of(claim: Claim, outcomes: dict[str, Outcome], path: Path) -> None:
    """Accuracy against rounds, uplink bytes and time, mean over seeds with a band of one standard error."""
    axes_of = {
        "round": lambda outcome, seed: list(range(1, 1 + len(outcome.runs[seed]))),
        "uplink of all clients, MB": lambda outcome, seed: [b / 1e6 for b in outcome.spent(seed, "protocol_up_bytes")],
        "training time, s": lambda outcome, seed: [row["time_s"] for row in outcome.runs[seed]],
    }
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for panel, (label, values) in zip(panels, axes_of.items(), strict=True):
            for number, name in enumerate(claim.names):
                outcome = outcomes[name]
                curves = torch.tensor([outcome.smoothed_accuracy(seed) for seed in range(len(outcome.runs))])
                x = torch.tensor([values(outcome, seed) for seed in range(len(outcome.runs))]).double().mean(0)
                mean = curves.mean(0)
                se = curves.std(0) / len(curves) ** 0.5 if len(curves) > 1 else torch.zeros_like(mean)
                style = {"color": f"C{number}", "linestyle": "-" if number < 10 else "--"}
                panel.plot(x, mean, label=name, linewidth=1.4, **style)
                panel.fill_between(x, mean - se, mean + se, color=style["color"], alpha=0.15, linewidth=0)
            panel.set_xlabel(label)
            panel.grid(linewidth=0.4, alpha=0.6)
        panels[0].set_ylabel("test accuracy, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def numbers_of(outcome: Outcome) -> dict[str, Any]:
    """What is kept of the runs of a configuration."""
    kept = ("test_accuracy", "test_loss", "protocol_up_bytes", "time_s", "epsilon")
    runs = [{key: [row[key] for row in rows] for key in kept if key in rows[0]} for rows in outcome.runs]
    return {"lr": outcome.lr, "sharpness": outcome.sharpness, "runs": runs}


def verdict(findings: Sequence[Finding]) -> str:
    return "holds" if all(finding.holds for finding in findings) else "does not hold here"


def write_page(
    suite: str, claims: Sequence[Claim], outcomes: dict[str, Outcome], facts: dict[str, Any], out: Path
) -> None:
    """The reproduction as a page: a summary, then every claim with its table, figure and findings."""
    judged = {claim.key: claim.judge(outcomes) for claim in claims}
    seeds = len(next(iter(outcomes.values())).runs)
    lines = [f"# Reproduction: {suite}", "", INTRODUCTION.format(suite=suite, seeds=seeds, **facts), ""]
    summary = [[claim.paper, claim.sentence, verdict(judged[claim.key])] for claim in claims]
    lines += [markdown({"columns": ["paper", "claim", "verdict"], "rows": summary}), ""]
    for claim in claims:
        findings = judged[claim.key]
        lines += [f"## {claim.paper}", "", f"*{claim.sentence}* {claim.experiment}", ""]
        lines += [markdown(table_of(claim, outcomes)), ""]
        lines += [f"![Accuracy against rounds, bytes and time]({figure_path(suite, claim)})", ""]
        lines += [f"**{verdict(findings)[0].upper()}{verdict(findings)[1:]}.**", ""]
        lines += [f"* {finding.text}: {'yes' if finding.holds else 'no'}" for finding in findings] + [""]
    (out / f"reproduction-{suite}.md").write_text("\n".join(lines))


INTRODUCTION = """Written by `python benchmarks/reproduce.py --suite {suite} --seeds {seeds}` on {date}: {cpu}, \
{cores} cores, torch {torch}, {seeds} seeds, which also change the partition and the initial model. Every method has \
the learning rate that was best for it among five half a decade apart, and a private one the best of three clipping \
bounds, on a seed not used here (`--tune`). Accuracy is \
the mean of the last five evaluations; ± is the standard error over seeds. A comparison is of runs with the same seed: \
"more" means that the mean difference exceeds its standard error, "at least" that it falls short by at most one. A \
verdict speaks of this suite, not of the paper's setting."""


def figure_path(suite: str, claim: Claim) -> str:
    return f"reproduction-{suite}/{claim.key}.png"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--suite", choices=("digits", "cifar100"), default="digits")
    parser.add_argument("--path", type=Path, help="folder of CIFAR-100's Python pickles, for its suite")
    parser.add_argument("--claims", nargs="+", choices=[claim.key for claim in CLAIMS], help="only these")
    parser.add_argument("--tune", action="store_true", help="try the learning rates instead")
    parser.add_argument("--tuned", type=Path, help="result file of --tune, to take what it found best")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="instead of the configurations' own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    chosen = parser.parse_args()
    if chosen.suite == "cifar100" and chosen.path is None:
        parser.error("--suite cifar100 needs --path, the folder with CIFAR-100's files train, test and meta")
    if chosen.seeds < 1:
        parser.error(f"--seeds is {chosen.seeds}, expected at least 1")
    options: Overrides = {"rounds": chosen.rounds} if chosen.rounds else {}
    if chosen.path is not None:
        options["data.path"] = str(chosen.path)
    claims = [claim for claim in CLAIMS if chosen.claims is None or claim.key in chosen.claims]
    if chosen.tune:
        names = list(dict.fromkeys(name for claim in claims for name in claim.names))
        table, details = tune(chosen.suite, names, chosen.jobs, options)
        report(f"reproduction-{chosen.suite}-tuning", table, details, chosen.out)
        return
    best = tuned(chosen.tuned) if chosen.tuned else {}
    outcomes = measure(chosen.suite, claims, chosen.seeds, chosen.jobs, options, best)
    rows = [[c.paper, c.sentence, verdict(f := c.judge(outcomes)), "; ".join(x.text for x in f)] for c in claims]
    details = {name: numbers_of(outcome) for name, outcome in outcomes.items()}
    table = {"columns": ["paper", "claim", "verdict", "findings"], "rows": rows}
    path = report(f"reproduction-{chosen.suite}", table, details, chosen.out)
    for claim in claims:
        figure_of(claim, outcomes, chosen.out / figure_path(chosen.suite, claim))
    written = json.loads(path.read_text())
    write_page(chosen.suite, claims, outcomes, written["environment"] | {"date": written["date"]}, chosen.out)


if __name__ == "__main__":
    main()
