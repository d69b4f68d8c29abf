"""What the papers claim, as sentences with a rule that decides on the measured runs whether they hold."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

# A single evaluation of a few hundred test samples is noisy.
LAST_ROUNDS = 5


@dataclass(frozen=True)
class Outcome:
    """The runs of one configuration.

    Args:
        name: of the configuration file.
        lr: the learning rate it was tuned to.
        runs: metrics rows, a list for every seed.
        sharpness: of the global loss at the final model, per seed; empty where it was not measured.
    """

    name: str
    lr: float
    runs: list[list[Row]]
    sharpness: list[float] = field(default_factory=list)

    def smoothed_accuracy(self, seed: int) -> list[float]:
        """Test accuracy, %, after every round, as the mean over the last `LAST_ROUNDS` evaluations."""
        values = [100 * row["test_accuracy"] for row in self.runs[seed]]
        return [statistics.mean(values[max(0, r + 1 - LAST_ROUNDS) : r + 1]) for r in range(len(values))]

    @property
    def accuracy(self) -> list[float]:
        """Final test accuracy, %, per seed."""
        return [self.smoothed_accuracy(seed)[-1] for seed in range(len(self.runs))]

    def spent(self, seed: int, key: str) -> list[float]:
        """A quantity summed over rounds, after every round."""
        return list(itertools.accumulate(row[key] for row in self.runs[seed]))

    def up_bytes_to(self, seed: int, accuracy: float) -> float:
        """Uplink bytes of all clients until the smoothed accuracy is reached; infinity where it never is."""
        curve, spent = self.smoothed_accuracy(seed), self.spent(seed, "protocol_up_bytes")
        return next((b for a, b in zip(curve, spent, strict=True) if a >= accuracy), math.inf)


@dataclass(frozen=True)
class Finding:
    """One comparison that a claim rests on: whether it holds, and the numbers in words."""

    holds: bool
    text: str


Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Claim:
    """A paper's claim, the configurations that test it, and the rule.

    Args:
        key: short name, also of the figure.
        paper: name and arXiv number.
        sentence: the claim.
        experiment: what the configurations have in common, beyond the suite.
        names: configuration files, without suffix.
        judge: findings from the outcomes; the claim holds where all do.
        sharpness: whether the sharpness of the final models is needed.
    """

    key: str
    paper: str
    sentence: str
    experiment: str
    names: tuple[str, ...]
    judge: Callable[[Outcomes], list[Finding]]
    sharpness: bool = False


def mean_se(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard error of the mean."""
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {se:.{digits}f}"


def compared(better: Sequence[float], worse: Sequence[float], what: str, *, strictly: bool, digits: int = 1) -> Finding:
    """Whether the first is larger, in differences of the same seed.

    Args:
        strictly: the mean difference must exceed its standard error; otherwise it may fall short by at most one.
    """
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    mean = statistics.mean(differences)
    se = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Finding(mean > se if strictly else mean >= -se, f"{what}: {mean:+.{digits}f} ± {se:.{digits}f}")


def more_accurate(*chain: str, strictly: bool = True) -> Callable[[Outcomes], list[Finding]]:
    """Every configuration of the chain ends more accurate than the next."""

    def judge(outcomes: Outcomes) -> list[Finding]:
        return [
            compared(outcomes[a].accuracy, outcomes[b].accuracy, f"{a} − {b}, points", strictly=strictly)
            for a, b in itertools.pairwise(chain)
        ]

    return judge


def each_more_accurate(pairs: Sequence[tuple[str, str]]) -> Callable[[Outcomes], list[Finding]]:
    """The first of every pair ends at least as accurate as the second."""
    return lambda outcomes: [finding for pair in pairs for finding in more_accurate(*pair, strictly=False)(outcomes)]


def fewer_bytes(name: str, baseline: str, times: float) -> Callable[[Outcomes], list[Finding]]:
    """A configuration reaches the baseline's final accuracy with that many times fewer uplink bytes."""

    def judge(outcomes: Outcomes) -> list[Finding]:
        ratios = []
        for seed, target in enumerate(outcomes[baseline].accuracy):
            needed = outcomes[name].up_bytes_to(seed, target)
            ratios.append(outcomes[baseline].up_bytes_to(seed, target) / needed)
        text = f"{baseline} / {name}, uplink bytes to {baseline}'s final accuracy: {mean_se(ratios)}"
        if missed := ratios.count(0.0):
            text += f"; {missed} of {len(ratios)} seeds never reach it (counted as 0)"
        return [Finding(statistics.mean(ratios) >= times, text)]

    return judge


def flatter(name: str, other: str) -> Callable[[Outcomes], list[Finding]]:
    """The final model of the first is less sharp."""

    def judge(outcomes: Outcomes) -> list[Finding]:
        what = f"sharpness, {other} − {name}"
        return [compared(outcomes[other].sharpness, outcomes[name].sharpness, what, strictly=True, digits=4)]

    return judge


def both(*judges: Callable[[Outcomes], list[Finding]]) -> Callable[[Outcomes], list[Finding]]:
    """All findings of several rules."""
    return lambda outcomes: [finding for judge in judges for finding in judge(outcomes)]


# Local optimizer to the configurations of FedPAC and of Local X.
PRECONDITIONED = {"soap": ("fedpac", "local_soap")}
PRECONDITIONED |= {x: (f"fedpac_{x}", f"local_{x}") for x in ("sophia", "muon", "shampoo", "adamw")}

CLAIMS = (
    Claim(
        "fedbcgd",
        "FedBCGD, arXiv 2603.05116",
        "Uploading one block of the model, FedBCGD reaches FedAvg's accuracy with at least three times fewer uplink "
        "bytes; FedBCGD+ does as well beside SCAFFOLD.",
        "Five blocks and the shared output head. Bytes are those of all clients until the mean accuracy of the last "
        "five rounds reaches the baseline's final one.",
        ("fedavg", "fedavgm", "scaffold", "fedbcgd", "fedbcgd_plus"),
        both(fewer_bytes("fedbcgd", "fedavg", 3), fewer_bytes("fedbcgd_plus", "scaffold", 3)),
    ),
    Claim(
        "fedadamw",
        "FedAdamW, arXiv 2510.27486",
        "FedAdamW ends more accurate than Local AdamW when labels are skewed.",
        "Every method at its own tuned learning rate.",
        ("fedavg", "local_adamw", "fedlada", "fedadam", "fedadamw"),
        more_accurate("fedadamw", "local_adamw"),
    ),
    Claim(
        "fedmuon",
        "FedMuon, arXiv 2510.27403",
        "FedMuon ends more accurate than Local Muon, and Local Muon than Local AdamW, when labels are skewed.",
        "Every method at its own tuned learning rate.",
        ("fedavg", "local_adamw", "local_muon", "fedmuon"),
        more_accurate("fedmuon", "local_muon", "local_adamw"),
    ),
    Claim(
        "fedpac",
        "FedPAC, arXiv 2602.19271",
        "Aligning and correcting the preconditioner of any local optimizer X is at least as accurate as Local X.",
        "Five local optimizers, each with and without FedPAC at its own tuned learning rate.",
        tuple(itertools.chain(*PRECONDITIONED.values())),
        each_more_accurate(list(PRECONDITIONED.values())),
    ),
    Claim(
        "fednsam",
        "FedNSAM, arXiv 2602.23827",
        "FedNSAM is at least as accurate as FedSAM, and its global model is flatter.",
        "Sharpness is the largest increase of the loss over all training samples that gradient ascent finds within a "
        "ball of radius 0.05 around the final model.",
        ("fedavg", "fedsam", "mofedsam", "fedgamma", "fedlesam", "fedsmoo", "fednsam", "fednsam_local"),
        both(more_accurate("fednsam", "fedsam", strictly=False), flatter("fednsam", "fedsam")),
        sharpness=True,
    ),
    Claim(
        "dp_fedpgn",
        "DP-FedPGN, arXiv 2510.27504",
        "At equal client-level privacy DP-FedPGN is at least as accurate as DP-FedAvg.",
        "Same noise multiplier, sampling rate and rounds, so the same ε, which the table gives; each method has its "
        "own clipping bound.",
        ("dp_fedavg", "dp_fedsam", "dp_fedadamw", "dp_fedpgn", "dp_fedpgn_penalty"),
        more_accurate("dp_fedpgn", "dp_fedavg", strictly=False),
    ),
)
