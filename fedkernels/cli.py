"""The command line, `fedkernels COMMAND`, also as `python -m fedkernels COMMAND`."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .checkpoint import CheckpointError
from .config import CHOICES, Config, ConfigError, describe, load, make, nearest, parse_overrides, parse_value
from .diagnostics.settings import DiagnosisSettings
from .federated import attempt
from .federated.aggregate import ExactSumError
from .federated.engine import DeadlineError, NonFiniteUpdateError
from .federated.watch import LostRankError
from .formats import format_epsilon
from .kernels.dispatch import BackendError
from .planning.network import Network

TABLES = dict(
    zip(("algorithms", "optimizers", "models", "datasets", "partitions", "codecs"), CHOICES.values(), strict=True)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 2 bad input, 1 failed, 128 + n stopped by signal n."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if rest and not options.overridable:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        status: int = options.run(options, rest)
        sys.stdout.flush()
        return status
    except (ConfigError, FileNotFoundError, ValueError) as error:
        return _fail(error, 2)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (BackendError, CheckpointError, DeadlineError, ExactSumError, NonFiniteUpdateError, OSError) as error:
        return _fail(error, 1)
    except LostRankError as error:
        if error.first:
            print(f"fedkernels: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # to leave the process group in order takes all ranks
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            # gloo's threads abort the process if they are still there when the interpreter exits.
            dist.destroy_process_group()


def _fail(error: Exception, status: int) -> int:
    text = " ".join(str(error).split())
    if _first_to_fail(text):
        print(f"fedkernels: error: {text}", file=sys.stderr, flush=True)
    return status


def _first_to_fail(text: str) -> bool:
    """Whether no other rank of the attempt has reported an error: ranks mostly fail alike, and one message is enough.

    Before ranks have met, their agents' counts of restarts are all that tells attempts apart, and those may differ from
    each other: then only the same words are not said again.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = attempt.current() or f"{restarts}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2))  # type: ignore[attr-defined]
        return store.add(f"fedkernels/failures/{name}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # no other rank within reach
        return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedkernels", description="Federated training on torch.distributed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="run a configuration",
        description="Run a configuration; under torchrun every rank trains its share of each cohort.",
        epilog=_keys_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("--config", type=Path, help="YAML file; with --resume it defaults to the run's own")
    train.add_argument("--resume", action="store_true", help="continue the run in run_dir from its newest checkpoint")
    train.set_defaults(run=_train, overridable=True)

    names = commands.add_parser("list", help="algorithms, local optimizers, models, datasets, partitions, codecs")
    names.add_argument("what", nargs="?", metavar="NAME", help="a table, or one name to see its keys")
    names.add_argument("--names", choices=list(TABLES), help="print bare names of one table, a line each")
    names.set_defaults(run=_list, overridable=False)

    partition = commands.add_parser("partition", help="draw how a configuration splits its data over clients")
    partition.add_argument("--config", type=Path, required=True)
    partition.add_argument("--out", type=Path, default=Path("partition.png"), help="picture to write (png, svg or pdf)")
    partition.set_defaults(run=_partition, overridable=True)

    plan = commands.add_parser(
        "plan",
        help="predict round time, bytes and memory on many ranks",
        description="Time a few rounds of a configuration here, on one process, and predict it on many ranks.",
        allow_abbrev=False,
    )
    plan.add_argument("--config", type=Path, required=True)
    plan.add_argument("--ranks", type=int, required=True, help="predict 1, 2, 4, ... and this many")
    plan.add_argument(
        "--clients_per_rank", type=int, help="let the cohort grow with the ranks instead of staying as it is"
    )
    for key, kind, default in describe(Network):
        plan.add_argument(f"--{key}", metavar="VALUE", help=f"{kind}; default {default}")
    plan.add_argument(
        "--measured", type=Path, help="costs to use, from an earlier --out, instead of timing rounds here"
    )
    plan.add_argument("--out", type=Path, help="JSON file to write")
    plan.set_defaults(run=_plan, overridable=True)

    diagnose = commands.add_parser(
        "diagnose",
        help="measure curvature, sharpness and client updates at a run's model",
        description="Measure a run's newest checkpoint on one process, and add what was found to its report.",
        allow_abbrev=False,
    )
    diagnose.add_argument("diagnosed", type=Path, metavar="RUN", help="run folder")
    diagnose.add_argument("--out", type=Path, help="file to write; default diagnosis.json in the run folder")
    for key, kind, default in describe(DiagnosisSettings):
        diagnose.add_argument(f"--{key}", metavar="VALUE", help=f"{kind}; default {default}")
    diagnose.add_argument("--device", help="where to compute: auto, cpu or cuda; default the run's own")
    diagnose.add_argument("--threads", help="torch threads; default the run's own")
    diagnose.set_defaults(run=_diagnose, overridable=False)

    privacy = commands.add_parser("privacy", help="ε of a noise multiplier, or the noise multiplier for an ε")
    either = privacy.add_mutually_exclusive_group(required=True)
    either.add_argument("--sigma", type=float, help="noise multiplier: standard deviation of the noise over the clip")
    either.add_argument("--target_epsilon", type=float, help="print the noise multiplier that keeps to this ε")
    privacy.add_argument("--sampling_rate", type=float, required=True, help="expected share of clients in a round")
    privacy.add_argument("--rounds", type=int, required=True)
    privacy.add_argument("--delta", type=float, required=True, help="below one over the number of clients")
    privacy.set_defaults(run=_privacy, overridable=False)

    report = commands.add_parser("report", help="compare runs in a table and a self-contained page")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    report.add_argument("--out", type=Path, help="page to write; default report.html in the first run's parent folder")
    report.set_defaults(run=_report, overridable=False)

    export = commands.add_parser(
        "export",
        help="write a run's final model as a directory that transformers or peft load",
        description="Write a run's final model as save_pretrained does: config, weights and tokenizer, or adapters.",
        allow_abbrev=False,
    )
    export.add_argument("--run_dir", type=Path, required=True, help="folder of a finished run")
    export.add_argument("--to", type=Path, required=True, help="directory to make")
    export.add_argument("--merge", action="store_true", help="add LoRA adapters into the base")
    export.set_defaults(run=_export, overridable=False)

    kernels = commands.add_parser("kernels", help="which backend runs each kernel here, and why the others do not")
    kernels.set_defaults(run=_kernels, overridable=False)
    return parser


def _keys_help() -> str:
    lines = ["keys, as --key VALUE or --key.sub VALUE, where sub is a key of the named choice:"]
    for key, kind, default in describe(Config):
        lines.append(f"  --{key:<20} {kind}" + (" (required)" if default == "required" else f"; default {default}"))
    return "\n".join(lines)


def _train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    overrides = parse_overrides(rest)
    path = options.config
    if path is None and options.resume and "run_dir" in overrides:
        path = Path(str(overrides["run_dir"])) / "config.yaml"
    if path is None and not overrides:
        raise ConfigError("config: missing; give --config FILE, or --resume --run_dir RUN")
    config = load(path, overrides)
    from .train import train  # after the configuration is known to be good: the imports behind it cost seconds

    outcome = train(config, resume=options.resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"report: {outcome.run_dir / 'report.html'}", flush=True)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def _list(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.names:
        print("\n".join(TABLES[options.names]))
        return 0
    everything = {name: cls for table in TABLES.values() for name, cls in table.items()}
    if options.what in everything:
        cls = everything[options.what]
        print(inspect.cleandoc(cls.__doc__ or ""))
        for key, kind, default in describe(cls):
            print(f"  {key:<20} {kind}; default {default}")
        return 0
    if options.what is not None and options.what not in TABLES:
        raise ConfigError(f"{options.what}: unknown name{nearest(options.what, [*everything, *TABLES])}")
    for title, table in TABLES.items():
        if options.what in (None, title):
            print(f"{title}:")
            for name, cls in table.items():
                print(f"  {name:<14} {inspect.cleandoc(cls.__doc__ or '').splitlines()[0]}")
    return 0


def _partition(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from .data.plot import partition_figure, partition_summary
    from .train import load_data, split

    config = load(options.config, parse_overrides(rest))
    data = load_data(config)
    labels = data.labels.numpy()
    partition = split(config, data)
    classes = int(labels.max()) + 1
    for name, value in partition_summary(partition, labels, classes).items():
        print(f"{name:<28} {value:g}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partition_figure(partition, labels, classes, title=options.config.stem).savefig(options.out, dpi=150)
    print(f"picture: {options.out}")
    return 0


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from .planning.table import plan

    keys = [key for key, _, _ in describe(Network)]
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    network = make(Network, {key: parse_value(value) for key, value in given.items()})
    config = load(options.config, parse_overrides(rest))
    print(plan(config, network, options.ranks, options.clients_per_rank, options.measured, options.out))
    return 0


def _diagnose(options: argparse.Namespace, rest: Sequence[str]) -> int:
    given = {key: value for key, value in vars(options).items() if value is not None}
    keys = [key for key, _, _ in describe(DiagnosisSettings)]
    settings = make(DiagnosisSettings, {key: parse_value(given[key]) for key in keys if key in given})
    overrides: dict[str, Any] = {key: parse_value(given[key]) for key in ("device", "threads") if key in given}
    from .diagnostics.diagnosis import DIAGNOSIS_FILE, diagnose_run, write_diagnosis
    from .diagnostics.table import diagnosis_table

    run: Path = options.diagnosed
    diagnosis, notes = diagnose_run(run, settings, overrides)
    out = options.out or run / DIAGNOSIS_FILE
    write_diagnosis(diagnosis, out)
    print("\n".join([*notes, diagnosis_table(diagnosis), f"diagnosis: {out}"]))
    if options.out is None:
        from .report import write_report

        print(f"report: {write_report([run], run / 'report.html')}")
    return 0


def _privacy(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from .privacy.accountant import METHODS, Accountant, OutOfReachError, noise_for

    rate, rounds, delta = options.sampling_rate, options.rounds, options.delta
    if options.sigma is not None:
        accountant = Accountant(options.sigma, rate, delta)
        for method in METHODS:
            print(f"epsilon by {method.upper()}  {format_epsilon(accountant.epsilon(rounds, method), digits=6)}")
        return 0
    found, failures = {}, []
    for method in METHODS:
        try:
            found[method] = f"{noise_for(options.target_epsilon, rate, rounds, delta, method):.4f}"
        except OutOfReachError as error:
            failures.append(error)
    if not found:
        raise failures[0]
    for method in METHODS:
        print(f"sigma by {method.upper()}  {found.get(method, 'out of reach')}")
    return 0


def _report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from .comparison import comparison_table
    from .report import write_report

    print(comparison_table(options.runs))
    out = options.out or options.runs[0].resolve().parent / "report.html"
    print(f"report: {write_report(options.runs, out)}")
    return 0


def _export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from .export import export

    loader = export(options.run_dir, options.to, merge=options.merge)
    print(f"model: {options.to}, for {loader}.from_pretrained")
    return 0


def _kernels(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from .kernels.overview import overview

    print(overview())
    return 0
