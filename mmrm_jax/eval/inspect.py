"""What a checkpoint folder is: family, sizes, parameters, preprocessing, and what keeps it from being used."""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from mmrm_jax.config import DecoderConfig, ModelConfig, VisionConfig
from mmrm_jax.data.processor import Processor
from mmrm_jax.data.tokenizer import TOKENIZER_FILES
from mmrm_jax.models.hf.names import PROXY_PREFIX, checkpoint_layout
from mmrm_jax.models.hf.tensors import open_tensors, value_head_bias, weight_files
from mmrm_jax.models.hf.weights import checkpoint_problems, unused_tensors
from mmrm_jax.models.sizes import INTERNVL2
from mmrm_jax.train.setup import processor_problems, read_model
from mmrm_jax.train.state import abstract_model


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """A description in JSON values; only headers of the weights are read.

    "problems" lists whatever keeps `mmrm train` or `mmrm score` from using the folder. Raises ValueError where `path`
    is no checkpoint folder at all: without a configuration that can be read nothing else can be said.
    """
    config = read_model(path)
    return {
        "path": str(path),
        "decoder": config.decoder.family,
        "published_size": _published(config),
        "model": dataclasses.asdict(config),
        "visual_tokens_per_tile": config.visual_tokens_per_tile,
        "parameters": _parameters(config),
        **_weights(path, config, problems := []),
        **_processing(path, config, problems),
        "problems": problems,
    }


def _published(config: ModelConfig) -> str | None:
    """The InternVL2 of the same shapes, if any."""

    def shapes(c: ModelConfig) -> tuple[VisionConfig, DecoderConfig]:
        vision = dataclasses.replace(c.vision, mean=(0.0,) * 3, std=(1.0,) * 3, drop_path_rate=0.0)
        return vision, dataclasses.replace(c.decoder, rope_scaling=None)

    return next((f"InternVL2-{name}" for name, c in INTERNVL2.items() if shapes(c) == shapes(config)), None)


def _parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part of a reward model; the LM head is not one."""
    parts = {part: _size(params) for part, params in abstract_model(config)[1].items()}
    return parts | {"total": sum(parts.values())}


def _size(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _weights(path: Path, config: ModelConfig, problems: list[str]) -> dict[str, Any]:
    try:
        tensors, files = open_tensors(path), [f for f in weight_files(path) if f.suffix == ".safetensors"]
        like = abstract_model(config)[1]
        scored, with_proxy = "score.weight" in tensors, any(name.startswith(PROXY_PREFIX) for name in tensors)
        wanted = like if scored else nnx.State({k: v for k, v in like.items() if k != "score"})
        problems += checkpoint_problems(path, config, wanted)
        if with_proxy:
            problems += [f"proxy: {problem}" for problem in checkpoint_problems(path, config, like, branch="proxy")]
    except ValueError as error:
        problems.append(str(error))
        return {}
    return {
        "layout": checkpoint_layout(tensors),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "dtypes": dict(collections.Counter(t.dtype for t in tensors.values())),
        "score_head": scored,
        "value_head_bias": value_head_bias(path),
        "proxy": with_proxy,
        "lm_head": bool(unused_tensors(path)),
    }


def _processing(path: Path, config: ModelConfig, problems: list[str]) -> dict[str, Any]:
    try:
        processor = Processor.from_pretrained(path, config.visual_tokens_per_tile)
    except ValueError as error:
        problems.append(str(error))
        return {}
    problems += processor_problems(processor, config)
    return {
        "tokenizer": next(name for name in TOKENIZER_FILES if (path / name).exists()),
        "vocabulary": processor.chat.tokenizer.get_vocab_size(),
        "template": processor.chat.template.name,
        "preprocessing": dataclasses.asdict(processor.preprocessing),
        "max_length": processor.max_length,
    }


def print_description(found: dict[str, Any], console: Console) -> None:
    """The description as a table, and the problems."""
    vision, decoder = found["model"]["vision"], found["model"]["decoder"]
    parts = {part: count for part, count in found["parameters"].items() if part != "total"}
    rows = {
        "size": found["published_size"] or "none of the published ones",
        "vision": f"{vision['num_layers']} layers of {vision['width']}, {vision['norm']}, {vision['image_size']} px, "
        f"{found['visual_tokens_per_tile']} tokens a tile",
        "decoder": f"{found['decoder']}, {decoder['num_layers']} layers of {decoder['width']}, "
        f"{decoder['num_heads']} heads, {decoder['num_kv_heads']} for keys and values",
        "parameters": f"{found['parameters']['total']:,}: " + ", ".join(f"{k} {v:,}" for k, v in parts.items()),
    }
    if "layout" in found:
        dtypes = ", ".join(f"{count} tensors {dtype}" for dtype, count in found["dtypes"].items())
        missing = "" if found["score_head"] else "; no score head: no reward model yet, training draws one"
        extra = [name for name, there in (("its proxy", found["proxy"]), ("an LM head", found["lm_head"])) if there]
        rows["weights"] = f"{found['layout']} layout, {found['files']} file(s), {found['bytes']:,} bytes, {dtypes}"
        rows["holds"] = " and ".join(["a reward model" if found["score_head"] else "a base model", *extra]) + missing
        if found["value_head_bias"] is not None:
            rows["value head"] = f"without its bias: every reward here is {found['value_head_bias']:.6g} less"
    if "template" in found:
        images = found["preprocessing"]
        tiles = f"{images['min_tiles']} to {images['max_tiles']} tiles" if images["dynamic"] else "one tile"
        thumbnail = " and a thumbnail" if images["dynamic"] and images["use_thumbnail"] else ""
        rows["text"] = f"{found['tokenizer']}, {found['vocabulary']:,} tokens, template {found['template']}"
        rows["images"] = f"{tiles} of {images['image_size']} px{thumbnail}"
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    for problem in found["problems"]:
        console.print(f"problem: {problem}", style="red")
    if not found["problems"]:
        console.print("nothing is missing" if found["score_head"] else "nothing but the score head is missing")
