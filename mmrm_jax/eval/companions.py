"""The files of an exported folder that other software reads: image preprocessing, chat template, code of the base."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmrm_jax.data.folder import read_object, read_optional
from mmrm_jax.data.images import Preprocessing
from mmrm_jax.data.templates import IMAGE_CONTEXT, IMAGE_PLACEHOLDER, Template, spell
from mmrm_jax.data.tokenizer import TOKENIZER_FILES
from mmrm_jax.models.hf.names import CheckpointLayout
from mmrm_jax.train.setup import Checkpoint

COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def companion_files(
    checkpoint: Checkpoint, hf: dict[str, Any], *, same: bool, layout: CheckpointLayout
) -> dict[str, bytes]:
    """Name -> content of all that belongs beside weights, `config.json` (to be `hf`), tokenizer and our own settings.

    In the `same` layout the base folder's own files, in another one made from the processor; so is, in the chat layout,
    what the base lacks. Raises ValueError where a file to copy, the tokenizer's among them, is a link out of the
    folder, and for what the layout has no form for.
    """
    folder, processor = checkpoint.path, checkpoint.processor
    names = [name for name in COMPANIONS if (folder / name).exists()] if same else []
    if "auto_map" in hf or "auto_map" in read_optional(folder / "tokenizer_config.json"):
        # Code names further code by its imports, so all there is. It is copied and never run.
        names += sorted(file.name for file in folder.glob("*.py"))
    _check_links(folder, [*names, "config.json", *(n for n in TOKENIZER_FILES if (folder / n).exists())])
    files = {name: (folder / name).read_bytes() for name in names}
    if layout == "chat":
        made = {"preprocessor_config.json": _bytes(_chat_images(processor.preprocessing))}
        if not any(_has_template(folder, name) for name in ("tokenizer_config.json", *names)):
            made["chat_template.jinja"] = chat_template(processor.chat.template, IMAGE_PLACEHOLDER).encode()
        return made | files
    if same:
        return files | _with_tiling(folder, names, processor.preprocessing)
    return files | {
        "preprocessor_config.json": _bytes(_native_images(processor.preprocessing)),
        "processor_config.json": _bytes(
            {"image_seq_length": checkpoint.config.visual_tokens_per_tile, "processor_class": "InternVLProcessor"}
        ),
        "chat_template.jinja": chat_template(processor.chat.template, IMAGE_CONTEXT).encode(),
    }


def _has_template(folder: Path, name: str) -> bool:
    """Whether a file of the folder's is or holds a chat template, where transformers looks for one."""
    return name == "chat_template.jinja" or (
        name in ("chat_template.json", "tokenizer_config.json") and "chat_template" in read_optional(folder / name)
    )


def missing_code(folder: Path, hf: dict[str, Any]) -> list[str]:
    """Files of the folder's own that `auto_map` names, and that are not there."""
    mapped = hf.get("auto_map")
    classes = [name for name in mapped.values() if isinstance(name, str)] if isinstance(mapped, dict) else []
    # "repository--module.Class" is code that lies elsewhere.
    files = {name.rpartition(".")[0] + ".py" for name in classes if "--" not in name}
    return sorted(file for file in files if not (folder / file).exists())


def chat_template(template: Template, image: str) -> str:
    """Jinja for turns of the user and the assistant, as transformers renders it; `image` stands for an image."""
    spelt = [spell(p) for p in (template.before_prompt, template.before_response, template.after_response)]
    following = spelt[0] if template.before_next is None else spell(template.before_next).removeprefix(spelt[2])
    before, between, after, later = (json.dumps(text, ensure_ascii=False) for text in (*spelt, following))
    trim = " | trim" if template.strip else ""
    content = (
        "{% if message['content'] is string %}{{ message['content']" + trim + " }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + image + "\\n' }}"
        "{% elif part['type'] == 'text' %}{{ part['text']" + trim + " }}{% endif %}{% endfor %}{% endif %}"
    )
    user = "{{ " + before + " if turn.first else " + later + " }}{% set turn.first = false %}" + content
    return (
        "{% set turn = namespace(first=true) %}{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + user + "{% elif message['role'] == 'assistant' %}"
        "{{ " + between + " }}" + content + "{{ " + after + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + between + " }}{% endif %}"
    )


def _check_links(folder: Path, names: Iterable[str]) -> None:
    """Hugging Face's cache keeps files as links to `blobs`, two folders up; no other link may lead out."""
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for name in names:
        target = (folder / name).resolve()
        if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
            raise ValueError(f"{folder / name} is a link to {target}, outside its folder: put the file itself there")


def _with_tiling(folder: Path, names: Iterable[str], images: Preprocessing) -> dict[str, bytes]:
    """The native layout's preprocessing files with the tiling that the run had, where they differ."""
    tiling, changed = {"min_patches": images.min_tiles, "max_patches": images.max_tiles}, {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        found = read_object(folder / name) if name in names else {}
        own = found if name == "preprocessor_config.json" else found.get("image_processor")
        if own and own | tiling != own:
            own |= tiling
            changed[name] = _bytes(found)
    return changed


def _chat_images(images: Preprocessing) -> dict[str, Any]:
    return {
        "crop_size": images.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        "resample": 3,
        "size": images.image_size,
    }


def _native_images(images: Preprocessing) -> dict[str, Any]:
    if images.dynamic and images.max_tiles > 1 and not images.use_thumbnail:
        raise ValueError("transformers' own InternVL layout always adds a thumbnail, this model has none: use chat")
    return {
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(images.mean),
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_std": list(images.std),
        "max_patches": images.max_tiles if images.dynamic else 1,
        "min_patches": images.min_tiles if images.dynamic else 1,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": images.image_size, "width": images.image_size},
    }


def _bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
