"""A trained run as a checkpoint folder in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mmrm_jax.data.templates import IMAGE_CONTEXT
from mmrm_jax.eval.saved_run import read_run
from mmrm_jax.models.hf.config import config_to_hf, config_to_native
from mmrm_jax.models.hf.names import PROXY_PREFIX, CheckpointLayout, checkpoint_layout
from mmrm_jax.models.hf.tensors import open_tensors
from mmrm_jax.models.hf.weights import save_params, unused_tensors
from mmrm_jax.train.setup import Checkpoint
from mmrm_jax.train.state import merge_branch

# What a folder holds beside weights, configuration, tokenizer and `mmrm_processor.json`, and other software reads.
COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def export_run(
    run: Path,
    out: Path,
    *,
    layout: Literal["same", "chat", "native"],
    dtype: Literal["float32", "bfloat16"],
    proxy: bool,
    console: Console,
) -> dict[str, Any]:
    """Write the model of a run's last checkpoint: weights, config.json, tokenizer and preprocessing.

    `layout` "same" is that of the checkpoint the run started from, "chat" InternVL's own, "native" that of
    transformers' InternVLForConditionalGeneration. With `proxy` the text-only proxy is written too, as the paper's code
    does. The LM head, which is not trained, is carried over. Raises ValueError where `out` holds a checkpoint already,
    or where there is no proxy, and CheckpointError where `run` holds no checkpoint
    of a run, or the folder it started from has changed.
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a checkpoint already; name another directory, or delete this one")
    saved = read_run(run)
    objective, checkpoint = saved.program.objective, saved.checkpoint
    if proxy and "proxy" not in objective.branches:
        raise ValueError(f"{run} was trained with {objective.name}, which has no proxy: leave out --proxy")
    state, step = saved.restore(console)
    before = checkpoint_layout(open_tensors(checkpoint.path))
    after: CheckpointLayout = before if layout == "same" else layout
    head = unused_tensors(checkpoint.path)
    hf = _with_dtype(_configuration(checkpoint, before, after, tied=not head), dtype) | {"torch_dtype": dtype}
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.processor.save(out)
    if after == before:
        _copy_companions(checkpoint.path, out)
    save_params(
        out,
        checkpoint.config,
        merge_branch(state.params[objective.scores], state.frozen),
        proxy=merge_branch(state.params["proxy"], state.frozen) if proxy else None,
        unused=head | ({PROXY_PREFIX + name: tensor for name, tensor in head.items()} if proxy else {}),
        layout=after,
        dtype=dtype,
    )
    # Last: a folder without it is no checkpoint.
    (out / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    console.print(f"step {step} of {run} ({objective.name}) is in {out}, {after} layout, {dtype}")
    found = {"out": str(out), "step": step, "steps": saved.steps, "finished": step >= saved.steps}
    return found | {"objective": objective.name, "layout": after, "dtype": dtype, "proxy": proxy}


def _configuration(
    checkpoint: Checkpoint, before: CheckpointLayout, after: CheckpointLayout, *, tied: bool
) -> dict[str, Any]:
    """`config.json`: as it was, so that nothing is lost that other software reads, or made anew in another layout."""
    if before == after:
        return json.loads((checkpoint.path / "config.json").read_text())
    chat, images = checkpoint.processor.chat, checkpoint.processor.preprocessing
    if after == "native":
        hf = config_to_native(checkpoint.config, image_token_id=chat.special_id(IMAGE_CONTEXT))
        hf["text_config"]["tie_word_embeddings"] = tied
        return hf | {"tie_word_embeddings": tied}
    hf = config_to_hf(
        checkpoint.config,
        template=chat.template.name,
        max_tiles=images.max_tiles,
        use_thumbnail=images.use_thumbnail,
    )
    hf["llm_config"]["tie_word_embeddings"] = tied
    return hf


def _with_dtype(section: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The section and those inside it, naming this type wherever they name one: "dtype" since transformers 5."""
    inner = {name: _with_dtype(x, dtype) if isinstance(x, dict) else x for name, x in section.items()}
    return inner | {name: dtype for name in ("dtype", "torch_dtype") if name in inner}


def _copy_companions(source: Path, out: Path) -> None:
    for name in COMPANIONS:
        if (source / name).exists():
            (out / name).write_bytes((source / name).read_bytes())
