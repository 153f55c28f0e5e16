"""A trained run as a checkpoint folder in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mmrm_jax.data.folder import read_object, write_object
from mmrm_jax.data.templates import IMAGE_CONTEXT
from mmrm_jax.eval.companions import COMPANIONS, companion_files, missing_code
from mmrm_jax.eval.saved_run import read_run
from mmrm_jax.eval.scorer import PROXY_INPUT
from mmrm_jax.models.hf.config import config_to_hf, config_to_native
from mmrm_jax.models.hf.names import PROXY_PREFIX, CheckpointLayout, checkpoint_layout
from mmrm_jax.models.hf.tensors import open_tensors
from mmrm_jax.models.hf.weights import save_params, unused_tensors
from mmrm_jax.models.lora import fold_adapters
from mmrm_jax.train.setup import Checkpoint
from mmrm_jax.train.state import merge_branch

# What another layout keeps of the language model's section, beside what our configuration holds.
CARRIED = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def export_run(
    run: Path,
    out: Path,
    *,
    layout: Literal["same", "chat", "native"],
    dtype: Literal["float32", "bfloat16"],
    proxy: bool,
    console: Console,
    chosen: int | None = None,
) -> dict[str, Any]:
    """Write the model of a run's last checkpoint, or of step `chosen`, with all that a checkpoint folder has.

    `layout` "same" is that of the checkpoint the run started from, "chat" InternVL's own, "native" that of
    transformers' InternVLForConditionalGeneration. With `proxy` the text-only proxy is written too, as the paper's code
    does. The LM head, which is not trained, is carried over; adapters are added to the weights beside them.
    Raises ValueError where `out` holds a checkpoint already, where there is no proxy, or where the run's model does not
    see prompt, image and response, as every reader of a checkpoint has it; CheckpointError where `run` holds no
    checkpoint of a run, or the folder it started from has changed.
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a checkpoint already; name another directory, or delete this one")
    saved = read_run(run)
    objective, checkpoint = saved.program.objective, saved.checkpoint
    if objective.branches[objective.scores] != "multimodal":
        raise ValueError(
            f"{run} was trained with {objective.name}, whose model does not see prompt, image and response together; "
            "no checkpoint format says so, and others would score it with all of them: use mmrm evaluate on the run"
        )
    if proxy and "proxy" not in objective.branches:
        raise ValueError(f"{run} was trained with {objective.name}, which has no proxy: leave out --proxy")
    state, step = saved.restore(console, chosen)
    before = checkpoint_layout(open_tensors(checkpoint.path))
    after: CheckpointLayout = before if layout == "same" else layout
    head = unused_tensors(checkpoint.path)
    hf = _configuration(checkpoint, before, after, tied=not head)
    files = companion_files(checkpoint, hf, same=after == before, layout=after)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.processor.save(out)
    for name in set(COMPANIONS) - set(files):  # of an export that was broken off
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    save_params(
        out,
        checkpoint.config,
        fold_adapters(merge_branch(state.params[objective.scores], state.frozen)),
        proxy=fold_adapters(merge_branch(state.params["proxy"], state.frozen)) if proxy else None,
        unused=head | ({PROXY_PREFIX + name: tensor for name, tensor in head.items()} if proxy else {}),
        layout=after,
        dtype=dtype,
    )
    if proxy:
        hf[PROXY_INPUT] = saved.config.proxy_input
    # Last: a folder without it is no checkpoint.
    write_object(out / "config.json", _with_dtype(hf, dtype))
    for name in missing_code(out, hf):
        console.print(f"auto_map names {name}, which {checkpoint.path} lacks: transformers will not find it")
    console.print(f"step {step} of {run} ({objective.name}) is in {out}, {after} layout, {dtype}")
    found = {"out": str(out), "step": step, "steps": saved.steps, "finished": step >= saved.steps}
    return found | {"objective": objective.name, "layout": after, "dtype": dtype, "proxy": proxy}


def _configuration(
    checkpoint: Checkpoint, before: CheckpointLayout, after: CheckpointLayout, *, tied: bool
) -> dict[str, Any]:
    """`config.json`: as it was but for the tiling, or made anew in another layout."""
    chat, images = checkpoint.processor.chat, checkpoint.processor.preprocessing
    source = read_object(checkpoint.path / "config.json")
    if before == after == "native":
        return source
    if before == after:
        tiling = {"min_dynamic_patch": images.min_tiles, "max_dynamic_patch": images.max_tiles}
        return source | tiling | {"dynamic_image_size": images.dynamic, "use_thumbnail": images.use_thumbnail}
    if after == "native":
        hf, section = config_to_native(checkpoint.config, image_token_id=chat.special_id(IMAGE_CONTEXT)), "text_config"
        hf["tie_word_embeddings"] = tied
    else:
        section = "llm_config"
        hf = config_to_hf(
            checkpoint.config,
            template=chat.template.name,
            min_tiles=images.min_tiles,
            max_tiles=images.max_tiles,
            use_thumbnail=images.use_thumbnail,
            dynamic=images.dynamic,
        )
    text = source["text_config" if before == "native" else "llm_config"]
    hf[section] |= {k: text[k] for k in CARRIED if k in text} | {"tie_word_embeddings": tied}
    return hf


def _with_dtype(hf: dict[str, Any], dtype: str) -> dict[str, Any]:
    """With the dtype by both of its names, transformers 5's and the one before, and in each section that has one."""
    names = ("dtype", "torch_dtype")
    sections = {
        k: section | {name: dtype for name in names if name in section}
        for k, section in hf.items()
        if isinstance(section, dict)
    }
    return hf | sections | dict.fromkeys(names, dtype)
