"""The `mmrm` command. Each subcommand is a few lines: arguments, one call, one result."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from mmrm_jax import __version__
from mmrm_jax.cli_args import (
    AblateArgs,
    AuditArgs,
    BenchArgs,
    BestOfNArgs,
    EvaluateArgs,
    ExportArgs,
    InspectArgs,
    MatrixArgs,
    MatrixRun,
    PrepareArgs,
    QuickstartArgs,
    QuickstartRun,
    ScoreArgs,
    ServeArgs,
    TrainArgs,
    check_result_file,
    list_options,
)
from mmrm_jax.config import AblateConfig, Environment, MatrixConfig, TrainConfig
from mmrm_jax.signals import INTERRUPTED, PREEMPTED, heard, leave

C = TypeVar("C")


def quickstart(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See QuickstartArgs."""
    from mmrm_jax.eval import quickstart as shapes
    from mmrm_jax.eval.matrix import check_matrix, run_matrix
    from mmrm_jax.eval.publish import publish

    default = QuickstartArgs(_with_runs(shapes.CONFIG, QuickstartRun), shapes.CONFIG.train.steps, shapes.COMPARISONS)
    args = _parse("quickstart", QuickstartArgs, argv, default)
    config = _with_runs(args.config, TrainConfig, steps=args.steps)
    if config.root != shapes.CONFIG.root or config.image_root is not None or config.environments:
        raise ValueError(
            "mmrm quickstart renders its own data: --root, --image-root and environments are mmrm matrix's"
        )
    check_matrix(config)
    console.print("rendering the shapes world ...")
    config = shapes.with_shapes_world(config, args.data or config.out / "data", args.comparisons)
    return _written(args.json, publish(run_matrix(config, console), console, _command("quickstart", argv)))


def matrix(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See MatrixArgs."""
    from mmrm_jax.eval.matrix import run_matrix
    from mmrm_jax.eval.publish import publish

    default, rest = _config_file(argv, MatrixConfig)
    args = _parse("matrix", MatrixArgs, rest, MatrixArgs(_with_runs(default or MatrixConfig(), MatrixRun)))
    config = _with_environments(_with_runs(args.config, TrainConfig), args.env)
    if not config.environments:
        raise ValueError("no environments: begin with a configuration file (configs/grocery.py) or give --env")
    return _written(args.json, publish(run_matrix(config, console), console, _command("matrix", argv)))


def ablate(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See AblateArgs."""
    from mmrm_jax.ablate.run import run_ablation

    default, rest = _config_file(argv, AblateConfig)
    config = default or AblateConfig()
    config = dataclasses.replace(config, matrix=_with_runs(config.matrix, MatrixRun))
    args = _parse("ablate", AblateArgs, rest, AblateArgs(config))
    matrix = _with_environments(_with_runs(args.config.matrix, TrainConfig), args.env)
    config = dataclasses.replace(args.config, matrix=matrix)
    return _written(args.json, run_ablation(config, console, _command("ablate", argv)))


def train(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See TrainArgs."""
    from mmrm_jax.eval.single import train_run

    default, rest = _config_file(argv, TrainConfig)
    args = _parse("train", TrainArgs, rest, TrainArgs("", Path(), default or TrainConfig()), ("spec", "out"))
    return _written(
        args.json,
        train_run(
            args.config,
            args.spec,
            args.out,
            args.model,
            args.image_root,
            console,
            go_on=args.resume,
            profile=args.profile,
        ),
    )


def evaluate(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See EvaluateArgs."""
    from mmrm_jax.eval.single import evaluate_run

    args = _parse("evaluate", EvaluateArgs, argv)
    return _written(args.json, evaluate_run(args.run, args.data, args.image_root, console, args.step))


def prepare(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See PrepareArgs."""
    from mmrm_jax.data.overlap import describe_overlap
    from mmrm_jax.data.records import summarise_quarantine
    from mmrm_jax.data.tfds.preference_files import prepare as write

    args = _parse("prepare", PrepareArgs, argv)
    result = write(args.files, args.out, image_root=args.image_root, strict=args.strict)
    for r in result.reports:
        console.print(f"{r.split}: {r.groups} groups, {r.comparisons} comparisons, {r.quarantined} quarantined")
    if result.quarantined:
        console.print(summarise_quarantine(result.quarantined))
        console.print(f"all of them: {result.quarantine_file}")
    for overlap in result.overlaps:
        console.print(describe_overlap(overlap), style="yellow", highlight=False)
    if result.overlaps:
        console.print(f"all of them: {result.duplicates_file}", soft_wrap=True)
    for split in [r.split for r in result.reports if r.comparisons][:1]:
        train_on = ("mmrm", "train", "--data", f"{args.out}:{split}", "--out", f"runs/{split}")
        console.print(f"train on it: {shlex.join(train_on)}", soft_wrap=True, highlight=False)
    shared = [
        {"first": o.first, "second": o.second, "images": o.images, "groups": len(o.groups)} for o in result.overlaps
    ]
    splits = [dataclasses.asdict(r) for r in result.reports]
    return _written(args.json, {"directory": str(result.directory), "splits": splits, "overlaps": shared})


def audit(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See AuditArgs."""
    from mmrm_jax.audit.run import audit as run_audit

    args = _parse("audit", AuditArgs, argv)
    if not args.data:
        raise ValueError("no data: name one preference file or more, as in mmrm audit train.jsonl test.jsonl")
    return _written(args.json, run_audit(args.data, args.out, args.image_root, console, _command("audit", argv)))


def bench(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See BenchArgs."""
    from mmrm_jax.bench.run import bench as run_bench

    args = _parse("bench", BenchArgs, argv)
    found = run_bench(
        args.model,
        args.data,
        args.out,
        name=args.name,
        trained_on=args.trained_on,
        image_root=args.image_root,
        dtype=args.dtype,
        batch_size=args.batch_size,
        console=console,
    )
    return _written(args.json, found)


def inspect(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See InspectArgs."""
    from mmrm_jax.eval.inspect import inspect_checkpoint, print_description

    args = _parse("inspect", InspectArgs, argv)
    found = inspect_checkpoint(args.path)
    print_description(found, console)
    _written(args.json, found)
    if found["problems"]:
        raise ValueError(f"{args.path} cannot be used as it is: {len(found['problems'])} problem(s), listed above")
    return found


def score(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See ScoreArgs."""
    from mmrm_jax.eval.score import score_file

    args = _parse("score", ScoreArgs, argv)
    summary = score_file(
        args.model,
        args.data,
        args.out,
        image_root=args.image_root,
        dtype=args.dtype,
        batch_size=args.batch_size,
        buckets=args.buckets,
        draw_score=args.draw_score,
        console=console,
    )
    _written(args.json, summary)
    if not summary.get("scores", 1):
        raise ValueError(f"nothing in {args.data} could be scored; {args.out} says why, response by response")
    return summary


def best_of_n(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See BestOfNArgs."""
    from mmrm_jax.eval.select import best_of_n as select

    args = _parse("best-of-n", BestOfNArgs, argv)
    found = select(
        args.scores,
        args.out,
        top=args.top,
        gold=args.gold,
        gold_scores=args.gold_scores,
        plot=args.plot,
        console=console,
    )
    return _written(args.json, found)


def serve(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See ServeArgs."""
    args = _parse("serve", ServeArgs, argv)
    if importlib.util.find_spec("fastapi") is None:
        raise ValueError("mmrm serve needs FastAPI and uvicorn: pip install 'mmrm-jax[serve]'")
    from mmrm_jax.serve.run import serve as run_server

    run_server(
        args.model,
        name=args.name,
        host=args.host,
        port=args.port,
        token_file=args.token_file,
        dtype=args.dtype,
        batch_size=args.batch_size,
        prefix_cache_mib=args.prefix_cache_mib,
        empty_reward=args.empty_reward,
        limits=args.limits,
        console=console,
    )
    return {}


def export(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See ExportArgs."""
    from mmrm_jax.eval.export import export_run

    args = _parse("export", ExportArgs, argv)
    summary = export_run(
        args.run,
        args.out,
        layout=args.layout,
        dtype=args.dtype,
        proxy=args.proxy,
        console=console,
        chosen=args.step,
    )
    return _written(args.json, summary)


def plan(argv: Sequence[str], console: Console) -> dict[str, Any]:
    """See PlanArgs."""
    from mmrm_jax.plan.run import RECIPE, PlanArgs, run_plan

    default, rest = _config_file(argv, TrainConfig)
    args = _parse("plan", PlanArgs, rest, PlanArgs("", default or RECIPE), ("topology",))
    return _written(args.json, run_plan(args, console))


COMMANDS: dict[str, tuple[Callable[[Sequence[str], Console], dict[str, Any]], str]] = {
    "quickstart": (quickstart, "compare objectives on the shapes world; needs nothing but this machine"),
    "matrix": (matrix, "objective x environment on your own files: the cross-distribution matrix"),
    "ablate": (ablate, "objectives and settings against standard training: gains, costs, tables"),
    "train": (train, "train one reward model"),
    "evaluate": (evaluate, "evaluate a trained run on a preference file"),
    "audit": (audit, "how far preference data can be solved without its images"),
    "bench": (bench, "public reward benchmarks from local files, with their own metrics"),
    "inspect": (inspect, "what a checkpoint folder is, and what is missing"),
    "score": (score, "rewards of every response in a file"),
    "serve": (serve, "rewards over HTTP: native, OpenRLHF's and vLLM's shapes, and a page to try it"),
    "best-of-n": (best_of_n, "the favourites among scored responses, and what best-of-n costs and is worth"),
    "export": (export, "a trained run as a checkpoint folder in the Hugging Face layout"),
    "plan": (plan, "memory, FLOPs, collectives and step time on hardware that is not at hand"),
    "prepare": (prepare, "validate preference files and write them as a data set"),
}

SEVERAL = ("train", "evaluate", "score")  # commands that several processes can run together


def main() -> None:
    """Entry point: `mmrm COMMAND ...`. Errors that a user can mend are one message and exit status 2.

    Ctrl-C ends a command at once with 130. `mmrm train` saves first (see `train.preemption`), and exits with 75 after
    SIGTERM, also where there is nothing to save yet.
    """
    argv = sys.argv[1:]

    def stopped(number: signal.Signals) -> None:
        goes_on = argv[0] in ("train", "matrix", "ablate", "quickstart")
        what = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
        print(f"\nmmrm: {what}" + ("; give the same command again to go on" * goes_on), file=sys.stderr)
        leave(INTERRUPTED if number == signal.SIGINT else PREEMPTED)

    numbers = (signal.SIGINT, signal.SIGTERM) if argv[:1] == ["train"] else (signal.SIGINT,)
    with heard(numbers, stopped):
        try:
            run(argv)
        except SystemExit as stop:
            if stop.code in (PREEMPTED, INTERRUPTED):
                leave(stop.code)
            raise


def run(argv: Sequence[str]) -> None:
    """`main`, but for Ctrl-C: raises SystemExit where there is an error, or where a signal stopped it."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mmrm COMMAND [OPTIONS]\n\nMultimodal reward models that look at the image.\n\ncommands:")
        print("\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()))
        print("\nmmrm COMMAND --help explains its options; mmrm --version says which version this is.")
        print("MMRM_TRACEBACK=1 shows where an error came from.")
        return
    if argv[0] == "--version":
        print(f"mmrm {__version__}")
        return
    if argv[0] not in COMMANDS:
        _fail(f"there is no command {argv[0]!r}{_nearest(argv[0], list(COMMANDS))}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from mmrm_jax import distributed
    from mmrm_jax.train.compiling import compiler_memory_released
    from mmrm_jax.train.preemption import Preempted

    try:
        if argv[0] in SEVERAL and not {"-h", "--help"} & set(argv):
            distributed.initialize()
        # What is printed, names of files say, is text and no markup.
        console = Console(quiet=not distributed.is_main(), markup=False, emoji=False)
        with compiler_memory_released():
            COMMANDS[argv[0]][0](argv[1:], console)
        distributed.shutdown()
    except Preempted as stopped:
        distributed.shutdown()
        _fail(str(stopped), stopped.status)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("MMRM_TRACEBACK"):
            raise
        _fail(_message(error))


def _message(error: Exception) -> str:
    """What an error says, in plain words where it is the system's own: "runs/one: Permission denied"."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, status: int = 2) -> None:
    from mmrm_jax.distributed import abandon

    print(f"mmrm: {message}", file=sys.stderr, flush=True)
    abandon(status)
    raise SystemExit(status)


def _nearest(word: str, words: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(words)}"


def _parse(
    command: str, cls: type[C], argv: Sequence[str], default: C | None = None, required: tuple[str, ...] = ()
) -> C:
    for name in list_options(cls):
        if sum(word.partition("=")[0] == name for word in argv) > 1:
            raise ValueError(f"{name} is given twice, of which the last alone would count: one {name} takes all values")
    missing = {name: tyro.MISSING for name in required}
    given = {} if default is None else {"default": dataclasses.replace(default, **missing)}  # type: ignore[type-var]
    args = tyro.cli(cls, prog=f"mmrm {command}", args=list(argv), **given)
    check_result_file(getattr(args, "json", None))
    return args


def _with_runs(config: MatrixConfig, cls: type[TrainConfig], **changes: Any) -> MatrixConfig:
    """With the settings of its runs in a class that has the same fields, and hides some of them or none."""
    return dataclasses.replace(config, train=cls(**vars(config.train) | changes))


def _with_environments(config: MatrixConfig, env: Sequence[str]) -> MatrixConfig:
    return dataclasses.replace(config, environments=tuple(map(_environment, env))) if env else config


def _config_file(argv: Sequence[str], cls: type[C]) -> tuple[C | None, Sequence[str]]:
    """The `config` of a leading Python file, and the other arguments."""
    if not argv or not argv[0].endswith(".py"):
        return None, argv
    path = Path(argv[0])
    if not path.exists():
        raise ValueError(f"{path} does not exist: the first argument is a configuration file")
    spec = importlib.util.spec_from_file_location("mmrm_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}{_nearest_field(str(error))}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, cls):
        of = {TrainConfig: "train", MatrixConfig: "matrix", AblateConfig: "ablate"}.get(type(config))
        hint = f": for mmrm {of}" if of else ""
        raise ValueError(f"{path} must define `config` of {cls.__name__}; it is {type(config).__name__}{hint}")
    return config, argv[1:]


def _nearest_field(message: str) -> str:
    """A hint for "X.__init__() got an unexpected keyword argument 'y'": the nearest field of X, else nothing."""
    from mmrm_jax import config

    cls = getattr(config, message.partition(".")[0], None)
    if "unexpected keyword argument" not in message or not dataclasses.is_dataclass(cls):
        return ""
    return _nearest(message.rpartition("argument ")[2].strip("'"), sorted(f.name for f in dataclasses.fields(cls)))


def _environment(text: str) -> Environment:
    name, equals, files = text.partition("=")
    train_file, comma, test = files.partition(",")
    if not (name and equals and comma and test):
        raise ValueError(f"--env {text!r} must be NAME=TRAIN,TEST or NAME=,TEST")
    return Environment(name, train_file or None, test)


def _command(name: str, argv: Sequence[str]) -> str:
    return shlex.join(["mmrm", name, *argv])


def _written(path: Path | None, result: dict[str, Any]) -> dict[str, Any]:
    from mmrm_jax.distributed import is_main

    if path is not None and is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return result
