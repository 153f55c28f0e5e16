"""The arguments of each `mmrm` command; the docstrings are what `mmrm COMMAND --help` prints."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmrm_jax.config import AblateConfig, MatrixConfig, TrainConfig
from mmrm_jax.serve.settings import Limits


@dataclasses.dataclass(frozen=True)
class MatrixRun(TrainConfig):
    """Settings of every run, but for what the matrix itself says: what is compared, and when a run is tested."""

    objective: Annotated[str, tyro.conf.Suppress] = TrainConfig.objective
    eval_every: Annotated[int | None, tyro.conf.Suppress] = None


@dataclasses.dataclass(frozen=True)
class QuickstartRun(MatrixRun):
    """Settings of every run, but for what the matrix itself says, and `--steps`."""

    steps: Annotated[int | None, tyro.conf.Suppress] = None


@dataclasses.dataclass(frozen=True)
class QuickstartArgs:
    """Train text-only, standard and shortcut-aware reward models on the shapes world, and compare them.

    Needs no download and no accelerator: the data set is rendered here, the tiny pretrained model is in the package.
    The text-only model is the proxy of shortcut-aware training: it shares one global-norm clip with the primary, as in
    the paper's recipe, so its training is text-only up to clipping.

    Attributes:
        config: Settings; the defaults are those of the numbers in the README.
        steps: Optimiser steps per run; fewer for a look, at the price of a weaker effect. None trains for
            `train.epochs` passes over the data.
        comparisons: Training comparisons of each environment; its test set has an eighth of them.
        data: Where the rendered data set is kept; None puts it into the run directory.
        json: Also write the results to this file.
    """

    config: Annotated[MatrixConfig, tyro.conf.arg(name="")]
    steps: int | None
    comparisons: int
    data: Path | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class MatrixArgs:
    """Train every objective in every environment and test each model on all of them.

    Begin with a configuration file, `mmrm matrix configs/grocery.py`, or name the environments here. The table shows
    what each objective does on its own distribution (i.i.d.) and on the others (o.o.d.). An interrupted matrix goes on
    where it stopped when the command is given again. Beside shortcut_aware, the text_only model is its proxy: it shares
    one global-norm clip with the primary, as in the paper's recipe, so its training is text-only up to clipping.

    Attributes:
        config: Settings.
        env: Environments as NAME=TRAIN,TEST (or NAME=,TEST for a test set alone), in place of the configuration's. NAME
            is what tables call its sets.
        json: Also write the results to this file.
    """

    config: Annotated[MatrixConfig, tyro.conf.arg(name="")]
    env: tuple[str, ...] = ()
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class AblateArgs:
    """Compare objectives with standard training over a grid of settings: which helps, when, and at what cost.

    Begin with a configuration file, `mmrm ablate configs/ablate_objectives.py`. At every point of the grid each
    objective is trained in each environment and seed, and tested on all environments; what is finished is not run again
    when the command is given again. The table has accuracies, differences from standard training with 95 % intervals
    (paired over seeds and images), Holm's correction for their number, forward passes and time; it is written as
    Markdown, LaTeX, CSV and report.html.

    Attributes:
        config: Settings.
        env: Environments as NAME=TRAIN,TEST (or NAME=,TEST for a test set alone), in place of the configuration's.
        json: Also write the results to this file.
    """

    config: Annotated[AblateConfig, tyro.conf.arg(name="")]
    env: tuple[str, ...] = ()
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train one reward model on one preference file or prepared data set.

    The first argument may be a Python file that defines `config`, a TrainConfig; options override its fields.

    Attributes:
        spec: A preference file (FILE@FORMAT where its format is not to be told from its rows), or DIRECTORY:SPLIT of a
            prepared data set.
        out: Run directory: config.json, metrics.jsonl, TensorBoard events, checkpoints. A run that was interrupted
            goes on from its last checkpoint when the command is given again. SIGTERM and Ctrl-C save first; the exit
            status is then 75 or 130. Several processes need a directory that all of them see.
        config: Settings.
        model: Checkpoint folder, in InternVL's own layout or in that of transformers' InternVLForConditionalGeneration;
            None takes the tiny model in the package.
        image_root: Folder that image paths are relative to; None takes the data file's.
        resume: Go on from the last checkpoint in `out`, where there is one; without it a run of the same configuration
            begins again and replaces what is there.
        profile: Also say where the time goes: a trace of a few steps, padding, compilations, time spent waiting for
            data, utilisation. Steps are waited for one by one.
        json: Also write the results to this file.
    """

    spec: Annotated[str, tyro.conf.arg(name="data")]
    out: Path
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    model: Path | None = None
    image_root: Path | None = None
    resume: bool = True
    profile: bool = False
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a trained run on a preference file: accuracy, rewards, margins; for shortcut_aware also SFD and SFC.

    What could not be used is written to quarantine-NAME.jsonl in the run directory.

    Attributes:
        run: Run directory of `mmrm train`, or a cell of `mmrm matrix` or `mmrm quickstart`: OUT/cells/NAME.
        data: A preference file (FILE@FORMAT where its format is not to be told from its rows), or DIRECTORY:SPLIT of a
            prepared data set.
        image_root: Folder that image paths are relative to; None takes the data file's.
        json: Also write the results to this file.
        step: Of the checkpoint to evaluate; None takes the last.
    """

    run: Path
    data: str
    image_root: Path | None = None
    json: Path | None = None
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
    """Validate preference files and write them as one data set (TFDS, ArrayRecord), one split a file.

    Every image is decoded once. Rows that cannot be used go to quarantine.jsonl with file, row and reason; rows whose
    image an earlier split shows, too, are said, and listed in duplicates.jsonl.

    Attributes:
        files: Preference files: JSONL, a JSON list or Parquet, in any of the formats of the README. A split is named
            after its file; SPLIT=FILE gives it another name, FILE@FORMAT says what format its rows are in.
        out: Directory of the data set; read a split of it as DIRECTORY:SPLIT.
        image_root: Folder that image paths are relative to; None takes each file's own.
        strict: Stop at the first bad row.
        json: Also write the results to this file.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    out: Path
    image_root: Path | None = None
    strict: bool = False
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class AuditArgs:
    """Say how far preference data can be solved without its images: no model is needed, nothing is trained but words.

    For each data set: the accuracy of text-only baselines (length, a bag of words) on held-out comparisons, the share
    of comparisons that text explains, the most telling words and styles, duplicates, conflicting labels, and a verdict
    in plain words. Between them: whether what words say in one holds in another, and what they share. Images are told
    apart by their bytes and not decoded: a damaged one is met by `mmrm prepare`.

    Attributes:
        data: Preference files, or DIRECTORY:SPLIT of a prepared data set. Each is called after its file or split;
            NAME=DATA gives it another name.
        out: Directory of report.html and quarantine.jsonl.
        image_root: Folder that image paths are relative to; None takes each file's own.
        json: Also write the results to this file.
    """

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    out: Path = Path("runs/audit")
    image_root: Path | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class BenchArgs:
    """Score a public reward benchmark from its own file, with its own metrics and baselines beside the model.

    VL-RewardBench (vl-rewardbench), Multimodal RewardBench (multimodal-rewardbench) and MM-RLHF-RewardBench
    (mm-rlhf-rewardbench), as Parquet or JSON lines, told from their fields. Nothing is downloaded. Beside the model
    stand the longer answer and, of a folder that `mmrm export --proxy` wrote, text alone.

    Attributes:
        data: The benchmark's file.
        model: Checkpoint folder of a reward model.
        name: Which benchmark it is, where its fields do not say so.
        trained_on: Preference files that the model was trained on: how much of the benchmark they hold.
        out: Directory of pairs.jsonl, each pair's margins, and quarantine.jsonl.
        image_root: Folder that image paths are relative to; None takes the data file's.
        dtype: Of activations and matrix products; the head and the rewards are float32.
        batch_size: Pairs a step; rounded up to a multiple of the devices.
        json: Also write metrics and overlap to this file.
    """

    data: Annotated[Path, tyro.conf.Positional]
    model: Path
    name: str | None = None
    trained_on: tuple[str, ...] = ()
    out: Path = Path("runs/bench")
    image_root: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class InspectArgs:
    """Say what a checkpoint folder is: family, sizes, parameters, tokenizer, preprocessing, and what is missing.

    Where something keeps the folder from being used, the exit status is 2.

    Attributes:
        path: Checkpoint folder: InternVL's own layout, or that of transformers' InternVLForConditionalGeneration.
        json: Also write the description to this file.
    """

    path: Annotated[Path, tyro.conf.Positional]
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class ScoreArgs:
    """Score every response in a file with a reward model: one JSON line a response, in the order of the rows.

    Every response of a row is scored, whatever is compared. One that cannot be scored has its line in place all the
    same, with id, prompt, img_path and response as far as they are known, and "error" instead of "score". A row whose
    responses cannot be told, such as broken JSON, gives one line with "file", "row" and "error". Where nothing at all
    could be scored the exit status is 2. Given again after it was stopped, the command goes on from the parts in
    OUT.parts, and the file is the same, bit for bit; several processes (MMRM_COORDINATOR, see README.md) share the
    parts out. A run of `mmrm train` is scored once `mmrm export` has made a checkpoint
    folder of it.

    Attributes:
        model: Checkpoint folder of a reward model; its own tokenizer and preprocessing are used.
        data: {"prompt", "img_path", "responses"} or preference rows, in a FILE or as FILE@FORMAT, or DIRECTORY:SPLIT of
            a prepared data set.
        out: File of {"id", "prompt", "img_path", "response", "score"} lines, or with "error" in place of "score";
            columns of these names where it is called *.parquet.
        image_root: Folder that image paths are relative to; None takes the data file's.
        dtype: Of activations and matrix products; the head and the rewards are float32.
        batch_size: Rows a step; rounded up to a multiple of the devices.
        buckets: Most shapes that batches are padded to, and so compilations of a step; more of them waste less.
        draw_score: For a checkpoint without a score head: the seed that a random one is drawn from.
        json: Also write a summary to this file.
    """

    model: Path
    data: str
    out: Path
    image_root: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    buckets: int = 4
    draw_score: int | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class BestOfNArgs:
    """Pick the best-scored responses to each prompt, and show what best-of-n costs and is worth.

    For n = 1, 2, 4, ... it prints the expected score of the best of n responses, the KL divergence of best-of-n from
    the policy that wrote them, ln n - (n - 1) / n, and, where gold scores are known, their expected value: where that
    falls while the score still rises, the score is over-optimised.

    Attributes:
        scores: What mmrm score wrote. Lines that follow one another with the same id, image and prompt are responses to
            one prompt; those with an error are left out.
        out: File for the picks: lines of `scores` with "rank" from 1 and "of", the number of responses.
        top: Picks a prompt, best first.
        gold: Field of the lines that holds a gold score: a human's, a checker's.
        gold_scores: Another file of mmrm score on the same responses, by a better model, in place of such a field.
        plot: Also draw the curves to this PNG file.
        json: Also write curves and counts to this file.
    """

    scores: Annotated[Path, tyro.conf.Positional]
    out: Path
    top: int = 1
    gold: str | None = None
    gold_scores: Path | None = None
    plot: Path | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class ServeArgs:
    """Serve a reward model over HTTP, for RL trainers, rerankers and people (extra `serve`).

    POST /v1/score takes a prompt, images as data URLs, and responses; /v1/score/upload images as files; /get_reward is
    OpenRLHF's remote reward model, /classify, /pooling and /v1/rerank are vLLM's. The page at / is for trying, /docs
    has all of it, /metrics is for Prometheus, /ready is 200 once common shapes are compiled. Nothing is fetched, and no
    file of the server is read on a client's word. SIGTERM answers what is under way, and ends.

    Attributes:
        model: Checkpoint folder of a reward model; with a proxy in it (mmrm export --proxy) that is served, too.
        name: What answers call the model; None takes the folder's name.
        host: Address to listen on; 0.0.0.0 is every one of this machine.
        port: Port to listen on.
        token_file: File with a token that clients must send, as Authorization: Bearer TOKEN.
        dtype: Of activations and matrix products; the head and the rewards are float32.
        batch_size: Most groups of up to 64 responses that run together; rounded up to a multiple of the devices.
        prefix_cache_mib: MiB of main memory for what images and prompts became in the decoder, so that the next
            responses to them run through it alone; 0 keeps nothing.
        empty_reward: Reward of an empty response, which policies give now and then; no model is asked for it. None
            refuses the request.
        limits: What a request may hold and how long it may take.
    """

    model: Path
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    prefix_cache_mib: int = 1024
    empty_reward: float | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write a trained run as a checkpoint folder: safetensors, config.json, tokenizer and preprocessing.

    The LM head of the base is kept, unless it is tied to the embedding, which is trained: such a model no longer writes
    text as its base did. A run that is unfinished is written as it is, and said so.

    Attributes:
        run: Run directory of `mmrm train`, or a cell of `mmrm matrix` or `mmrm quickstart`: OUT/cells/NAME.
        out: New folder.
        layout: same as that of the checkpoint the run started from; chat is InternVL's own, which the paper's code
            loads; native is that of transformers' InternVLForConditionalGeneration.
        dtype: Of the weights.
        proxy: Write the text-only proxy too, as the paper's code does.
        json: Also write a summary to this file.
        step: Of the checkpoint to write; None takes the last.
    """

    run: Path
    out: Path
    layout: Literal["same", "chat", "native"] = "same"
    dtype: Literal["float32", "bfloat16"] = "float32"
    proxy: bool = False
    json: Path | None = None
    step: int | None = None


def list_options(cls: type, prefix: str = "--") -> list[str]:
    """The options of a command's arguments that take several values, as they are spelled."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        option = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found += list_options(hint, prefix if name == "config" else option + ".")  # type: ignore[arg-type]
        elif typing.get_origin(hint) is tuple:
            found.append(option)
    return found


def check_result_file(path: Path | None) -> None:
    """Raises ValueError where `--json FILE` would overwrite what no command wrote: a result begins with a brace alone
    on its line, rows of data do not."""
    if path is None or not path.is_file():
        return
    with path.open("rb") as file:
        begins = file.read(2)
    if begins not in (b"", b"{\n"):
        raise ValueError(f"--json {path} would overwrite a file that is no result of mmrm's; name another")
