"""mmrm_jax's side of the comparisons: its own programs on its own batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import SIZES, Example, Size
from flax import nnx

from mmrm_jax.config import DecoderConfig, MeshConfig, ModelConfig, TrainConfig, VisionConfig
from mmrm_jax.data.batching import EncodedGroup, collate
from mmrm_jax.data.buckets import fit_buckets
from mmrm_jax.data.text import Conversation
from mmrm_jax.eval.scorer import VIEWS, make_score_step
from mmrm_jax.models.hf.config import config_to_native, read_config
from mmrm_jax.models.hf.weights import load_params, save_params
from mmrm_jax.sharding import make_mesh, put_batch
from mmrm_jax.train.compiling import compiler_memory_released, release_freed_memory
from mmrm_jax.train.program import build_program
from mmrm_jax.train.state import abstract_model, init_params, place_abstract
from mmrm_jax.types import NUMBER, Batch, Comparison


def model_config(size: Size) -> ModelConfig:
    return ModelConfig(VisionConfig(**size.vision), DecoderConfig(**size.decoder))  # type: ignore[arg-type]


def save_model(size: Size, folder: Path) -> None:
    """A random model in the layout of transformers' InternVLForConditionalGeneration."""
    config = model_config(size)
    save_params(folder, config, init_params(config, 0), layout="native")
    (folder / "config.json").write_text(json.dumps(config_to_native(config, image_token_id=size.image_token)))


def load_model(folder: Path) -> tuple[ModelConfig, nnx.State]:
    config = read_config(folder)
    like = place_abstract(abstract_model(config)[1], make_mesh(MeshConfig()))
    return config, load_params(folder, config, like)[0]


def encoded(examples: Sequence[Example], views: Mapping[str, str], image_token: int) -> list[EncodedGroup]:
    """What the processor makes of a group."""

    def conversation(tokens: np.ndarray) -> Conversation:
        image = tokens == image_token
        return Conversation(tokens.astype(np.int32), np.where(image, np.cumsum(image) - 1, -1).astype(np.int32))

    ends = np.cumsum([len(e.comparisons) for e in examples])
    numbers = np.split(np.arange(ends[-1], dtype=np.float32), ends[:-1])
    return [
        EncodedGroup(
            i,
            {branch: conversation(e.proxy if branch == "proxy" else e.prefix) for branch in views},
            tuple(r.astype(np.int32) for r in e.responses),
            e.tiles,
            tuple(Comparison(*c) for c in e.comparisons),
            {NUMBER: numbers[i]},
        )
        for i, e in enumerate(examples)
    ]


def collated(
    examples: Sequence[Example], views: Mapping[str, str], config: ModelConfig, given: Sequence[str] = ()
) -> Batch:
    """The batch [1, ...] that the data pipeline makes of these groups."""
    groups = encoded(examples, views, config.decoder.vocab_size - 1)
    buckets = fit_buckets([g.shape for g in groups], 1, config.vision.image_size)
    return collate(groups, buckets, num_groups=len(groups), micro_batches=1, views=views, given=given)


def _by_response(rewards: jax.Array, batch: Batch) -> np.ndarray:
    return np.asarray(rewards)[np.asarray(batch.responses.last) >= 0]


class Training:
    """The train step of a configuration, from a host batch to updated parameters."""

    def __init__(self, folder: Path, examples: Sequence[Example], train: TrainConfig):
        config = read_config(folder)
        self.program = build_program(config, train, 1000, comparisons=sum(len(e.comparisons) for e in examples))
        given = [NUMBER] if self.program.objective.remembers else []
        self.batch = collated(examples, self.program.views, config, given)
        with compiler_memory_released():  # as every command does
            self.program.lower_train_step(self.program.abstract, self.program.put(self.batch)).compile()
        self.state = self.program.init(load_model(folder)[1], train)
        release_freed_memory()

    def rewards(self) -> dict[str, np.ndarray]:
        batch = self.program.put(jax.tree.map(lambda x: x[0], self.batch), micro=False)
        out = self.program.eval_step(self.state.params, self.state.frozen, batch)
        return {branch: _by_response(out[f"{branch}/rewards"], batch) for branch in self.program.views}

    def step(self) -> dict[str, Any]:
        self.state, metrics = self.program.train_step(self.state, self.program.put(self.batch))
        jax.block_until_ready(self.state)
        return {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}


class Scoring:
    """Rewards of every response, from a host batch to numbers."""

    def __init__(self, folder: Path, examples: Sequence[Example]):
        config, self.params = load_model(folder)
        self.mesh = make_mesh(MeshConfig())
        self.batch = jax.tree.map(lambda x: x[0], collated(examples, VIEWS, config))
        self.score = make_score_step(config, "float32")

    def rewards(self) -> dict[str, np.ndarray]:
        with jax.set_mesh(self.mesh), compiler_memory_released():
            rewards = self.score(self.params, put_batch(self.batch, self.mesh, micro=False))
        return {"primary": _by_response(rewards, self.batch)}

    step = rewards


if __name__ == "__main__":
    save_model(SIZES[sys.argv[1]], Path(sys.argv[2]))
