"""The same in torch, as it is usually written: transformers' InternVL, whole conversations, each with its image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Example
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import InternVLForConditionalGeneration
from transformers.utils import logging

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-7

torch.set_num_threads(os.cpu_count() or 1)
logging.set_verbosity_error()
logging.disable_progress_bar()


class RewardModel(nn.Module):
    """InternVL without its LM head, and a linear score of the last token's hidden state."""

    def __init__(self, folder: Path):
        super().__init__()
        whole = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.trunk = whole.model
        self.trunk.vision_tower.requires_grad_(False)
        self.score = nn.Parameter(load_file(folder / "model.safetensors")["score.weight"][0])

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor | None) -> Tensor:
        hidden = self.trunk(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids)), mask.sum(1) - 1] @ self.score


def normalised(tiles: np.ndarray) -> Tensor:
    """[T, 3, S, S], as an image processor returns it."""
    scaled = (tiles.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return torch.tensor(scaled.transpose(0, 3, 1, 2)).contiguous()


def padded(conversations: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """(ids, mask) of whole conversations, padded on the right to the longest."""
    whole = [torch.tensor(np.concatenate(parts)) for parts in conversations]
    ids = nn.utils.rnn.pad_sequence(whole, batch_first=True)
    lengths = torch.tensor([len(w) for w in whole])
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()


Input = tuple[Tensor, Tensor, Tensor | None]


def text(examples: Sequence[Example], responses: Sequence[int], proxy: bool = False) -> tuple[Tensor, Tensor]:
    """A padded batch of one response of each example."""
    return padded([(e.proxy if proxy else e.prefix, e.responses[n]) for e, n in zip(examples, responses)])


class Training:
    """Shortcut-aware training on pairs: four forwards for every `batch` comparisons, one update for all of them."""

    def __init__(self, folder: Path, examples: Sequence[Example], proxy: str, batch: int):
        self.examples, self.view, self.images = examples, proxy, {}
        self.primary, self.proxy = RewardModel(folder), RewardModel(folder)
        pairs = [(e, *c) for e in examples for c in e.comparisons]
        self.count = len(pairs)
        self.batches = [self._sides(pairs[i : i + batch]) for i in range(0, len(pairs), batch)]
        parameters = [*self.primary.parameters(), *self.proxy.parameters()]
        self.trained = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def _sides(self, pairs: Sequence[tuple[Example, int, int]]) -> tuple[Input, Input, Input, Input]:
        """Chosen and rejected for the one branch and for the other; both sides of a pair have the same image."""
        examples, winners, losers = (list(x) for x in zip(*pairs))
        image, no_image = self._pixels(examples), self._pixels(examples, self.view)
        return (
            (*text(examples, winners), image),
            (*text(examples, losers), image),
            (*text(examples, winners, proxy=True), no_image),
            (*text(examples, losers, proxy=True), no_image),
        )

    def _pixels(self, examples: Sequence[Example], view: str = "multimodal") -> Tensor | None:
        if view == "absent":
            return None
        key = (view, *map(id, examples))
        if key not in self.images:
            tiles = [np.full_like(e.tiles[:1], 255) if view == "blank" else e.tiles for e in examples]
            self.images[key] = normalised(np.concatenate(tiles))
        return self.images[key]

    @torch.no_grad()
    def rewards(self) -> dict[str, np.ndarray]:
        every = [(e, n) for e in self.examples for n in range(len(e.responses))]
        primary = [self.primary(*text([e], [n]), self._pixels([e])).numpy() for e, n in every]
        proxy = [self.proxy(*text([e], [n], proxy=True), self._pixels([e], self.view)).numpy() for e, n in every]
        return {"primary": np.concatenate(primary), "proxy": np.concatenate(proxy)}

    def step(self) -> dict[str, Any]:
        self.optimizer.zero_grad()
        total = 0.0
        for chosen, rejected, proxy_chosen, proxy_rejected in self.batches:
            loss = softplus(self.primary(*rejected) - self.primary(*chosen))
            proxy_loss = softplus(self.proxy(*proxy_rejected) - self.proxy(*proxy_chosen))
            sfc = (EPSILON / 2 + proxy_loss / (EPSILON + proxy_loss + loss)).detach()
            mean = (sfc * loss + proxy_loss).sum() / self.count
            mean.backward()
            total += mean.item()
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return {"loss": total, "grad_norm": norm.item()}


class Scoring:
    """Rewards of every response of one example, `batch` whole conversations at a time, each with the image."""

    def __init__(self, folder: Path, example: Example, batch: int):
        self.model = RewardModel(folder).eval()
        count = len(example.responses)
        self.pixels = normalised(example.tiles)
        parts = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        self.batches = [text([example] * len(part), part) for part in parts]

    @torch.inference_mode()
    def rewards(self) -> dict[str, np.ndarray]:
        found = [self.model(ids, mask, self.pixels.repeat(len(ids), 1, 1, 1)) for ids, mask in self.batches]
        return {"primary": torch.cat(found).numpy()}

    step = rewards
