"""From the authors' JSONL and PNG files to their token ids, tiles, rewards and losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from goldens import fixtures

from mmrm_jax.config import BranchInput, DataConfig, TrainConfig
from mmrm_jax.data.images import image_size, load_image, tile_count, tile_image
from mmrm_jax.data.pipeline import EncodedSource, ListPlan, MakeBatch, batches, buckets_for, index_source
from mmrm_jax.data.processor import Processor
from mmrm_jax.data.records import read_groups
from mmrm_jax.data.sources import MemorySource
from mmrm_jax.data.text import encode_texts
from mmrm_jax.eval.evaluate import Evaluation, evaluate
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.train.setup import Checkpoint, initial_params, open_checkpoint
from mmrm_jax.train.state import TrainState
from mmrm_jax.types import Group

pytestmark = pytest.mark.usefixtures("one_device")

FILES = ("config.json", "model.safetensors", "proxy.safetensors", "expected.json", "token_ids.npz", "outputs.npz")
every_set = pytest.mark.parametrize("folder", fixtures("e2e", *FILES))
TOLERANCE = 1e-5

# What the authors' three ways to feed a model are called here.
VIEWS: dict[str, BranchInput] = {"normal": "multimodal", "text_only": "blank", "image_only": "image_only"}


def checkpoint_folder(folder: Path, out: Path, weights: str = "model.safetensors") -> Path:
    """The set keeps its tokenizer in a folder of its own; a checkpoint has it beside the weights."""
    out.mkdir()
    for file in [folder / "config.json", *(folder / "tokenizer").iterdir()]:
        (out / file.name).symlink_to(file)
    (out / "model.safetensors").symlink_to(folder / weights)
    return out


def expected_of(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


def processor_of(folder: Path, out: Path) -> Processor:
    return Processor.from_pretrained(checkpoint_folder(folder, out), expected_of(folder)["num_image_token"])


def pairs_of(groups: list[Group]) -> list[tuple[Group, int, int]]:
    return [(g, c.winner, c.loser) for g in groups for c in g.comparisons]


def described(group: Group, folder: Path) -> dict:
    return {"prompt": group.prompt, "img_path": str(Path(group.image).relative_to(folder))}


# --- text and images -----------------------------------------------------------------------------------------------


@every_set
@pytest.mark.parametrize("name", ["vlfeedback", "pairs"])
def test_pairs_and_tiles(folder: Path, name: str, tmp_path: Path) -> None:
    expected, processor = expected_of(folder), processor_of(folder, tmp_path / "model")
    groups, quarantined = read_groups(folder / f"{name}.jsonl")
    got = pairs_of(groups)
    assert [
        described(g, folder) | {"chosen": g.responses[w], "rejected": g.responses[lo]} for g, w, lo in got
    ] == expected[f"{name}.pairs"]
    assert all(q.reason for q in quarantined)
    assert processor.preprocessing.image_size == expected["image_size"]
    assert processor.preprocessing.max_tiles == expected["max_dynamic_patch"]
    tiles = [tile_count(*image_size(g.image), processor.preprocessing) for g, _, _ in got]
    assert tiles == expected[f"{name}.tiles"] == expected[f"{name}.image_only.tiles"]
    assert [len(tile_image(load_image(g.image), processor.preprocessing)) for g, _, _ in got] == tiles


@every_set
def test_token_ids_of_every_item(folder: Path, tmp_path: Path) -> None:
    expected, wanted = expected_of(folder), dict(np.load(folder / "token_ids.npz"))
    chat = processor_of(folder, tmp_path / "model").chat
    seen = 0
    for key, ids in wanted.items():
        name, *mode, index, side = key.split(".")
        mode = mode[0] if mode else "normal"
        if name == "infer":
            item, tiles = expected[f"infer.{mode}"][int(index)], expected[f"infer.{mode}.tiles"][int(index)]
            response, view = item["response"], VIEWS[mode]
        else:
            item, tiles = expected[f"{name}.pairs"][int(index)], expected[f"{name}.tiles"][int(index)]
            side = side.removeprefix("input_ids_")
            view = "blank" if side.endswith("_fake") else VIEWS[mode]
            response = item[side.removesuffix("_fake")]
        got = chat.conversation(item["prompt"], response, tiles, view)
        assert got.tokens.tolist() == ids.tolist(), key
        context = chat.special_id("<IMG_CONTEXT>")
        assert (got.visual >= 0).tolist() == (ids == context).tolist()
        assert got.visual.max() + 1 == (1 if view == "blank" else tiles) * expected["num_image_token"]
        seen += 1
    assert seen >= 10
    for name in ("vlfeedback", "pairs"):
        for i, lengths in enumerate(expected[f"{name}.lengths"]):
            sides = ("chosen", "rejected", "chosen_fake", "rejected_fake")
            assert [len(wanted[f"{name}.{i}.input_ids_{side}"]) for side in sides] == lengths


@every_set
def test_groups_share_prefixes_of_the_same_ids(folder: Path, tmp_path: Path) -> None:
    """Prefix and responses of a group, put together, are the ids of the authors' one string each."""
    expected, wanted = expected_of(folder), dict(np.load(folder / "token_ids.npz"))
    chat = processor_of(folder, tmp_path / "model").chat
    views: dict[str, BranchInput] = {"": "multimodal", "_fake": "blank"}
    for name in ("vlfeedback", "pairs"):
        for i, (pair, tiles) in enumerate(zip(expected[f"{name}.pairs"], expected[f"{name}.tiles"])):
            group = encode_texts(chat, pair["prompt"], [pair["chosen"], pair["rejected"]], tiles, views, 4096)
            for branch in views:
                for side, rest in zip(("chosen", "rejected"), group.responses):
                    whole = np.concatenate([group.prefixes[branch].tokens, rest])
                    assert whole.tolist() == wanted[f"{name}.{i}.input_ids_{side}{branch}"].tolist()


@every_set
def test_the_collated_pixels(folder: Path, tmp_path: Path) -> None:
    """The authors' normalised tiles, from ours and the mean and std of the checkpoint."""
    processor = processor_of(folder, tmp_path / "model")
    groups, _ = read_groups(folder / "vlfeedback.jsonl")
    p = processor.preprocessing
    tiles = np.concatenate([tile_image(load_image(g.image), p) for g, _, _ in pairs_of(groups)])
    values = (tiles.astype(np.float32) / 255 - np.float32(p.mean)) / np.float32(p.std)
    wanted = np.load(folder / "batch_vlfeedback.npz")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-6)


# --- rewards and losses --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Opened:
    folder: Path
    checkpoint: Checkpoint
    branches: dict[str, nnx.State]

    def run(self, objective: str, name: str) -> tuple[Program, TrainState, list[Group], EncodedSource]:
        """Program, state, groups and encoded groups: what `objective` makes of one of the set's files."""
        config = TrainConfig(objective=objective, proxy_input="blank", freeze=())
        program = build_program(self.checkpoint.config, config, 1)
        state = program.init(self.branches["primary"], config)
        if len(state.params) > 1:  # the proxy has weights of its own; the single objectives ask for the primary's
            own = program.init(self.branches["proxy"], config).params["proxy"]
            state = dataclasses.replace(state, params=state.params | {"proxy": own})
        groups, _ = read_groups(self.folder / f"{name}.jsonl")
        views = program.views
        data, quarantined = index_source(MemorySource(tuple(groups)), self.checkpoint.processor, views, cache=True)
        assert quarantined == []
        return program, state, groups, data


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory) -> Opened:
    folder = request.param
    root = tmp_path_factory.mktemp("checkpoint")
    branches = {}
    for branch, weights in (("proxy", "proxy.safetensors"), ("primary", "model.safetensors")):
        checkpoint = open_checkpoint(checkpoint_folder(folder, root / branch, weights), DataConfig())
        branches[branch], drawn = initial_params(checkpoint, 0)
        assert drawn == []
    return Opened(folder, checkpoint, branches)


every_model = pytest.mark.parametrize("opened", fixtures("e2e", *FILES), indirect=True)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, np.asarray(x, np.float64))


def margins(opened: Opened, objective: str, name: str) -> Evaluation:
    program, state, _, data = opened.run(objective, name)
    return evaluate(program, state, data, buckets_for([data], 2), batch_size=8)


@every_model
@pytest.mark.parametrize("name", ["vlfeedback", "pairs"])
def test_losses_are_the_authors(opened: Opened, name: str) -> None:
    outputs, expected = np.load(opened.folder / "outputs.npz"), expected_of(opened.folder)
    both = margins(opened, "shortcut_aware", name)
    for branch, theirs in (("primary", "main"), ("proxy", "bias")):
        chosen, rejected = (outputs[f"{name}.rewards_{side}_{theirs}"][:, 0] for side in ("chosen", "rejected"))
        np.testing.assert_allclose(both.margins[branch], chosen - rejected, rtol=0, atol=TOLERANCE)
    d, b = both.margins["primary"], both.margins["proxy"]
    assert np.mean(both.sfc * softplus(-d) + softplus(-b)) == pytest.approx(
        expected[f"{name}.loss_robust"], abs=TOLERANCE
    )
    assert np.mean(softplus(-d)) == pytest.approx(expected[f"{name}.loss_standard"], abs=TOLERANCE)
    for objective, branch in (("text_only", "proxy"), ("image_only", "image")):
        alone = margins(opened, objective, name).margins[branch]
        wanted = expected[f"{name}.{objective}.loss_standard"]
        assert np.mean(softplus(-alone)) == pytest.approx(wanted, abs=TOLERANCE), objective


@every_model
@pytest.mark.parametrize(
    ("mode", "objective", "branch"),
    [("normal", "standard", "primary"), ("text_only", "text_only", "proxy"), ("image_only", "image_only", "image")],
)
def test_scores_are_the_authors(opened: Opened, mode: str, objective: str, branch: str) -> None:
    outputs, items = np.load(opened.folder / "outputs.npz"), expected_of(opened.folder)[f"infer.{mode}"]
    program, state, groups, data = opened.run(objective, "infer")
    asked = [described(g, opened.folder) | {"response": r} for g in groups for r in g.responses]
    assert asked == [{k: v for k, v in item.items() if k != "score"} for item in items]
    scores = []
    make = MakeBatch(data, buckets_for([data], 2), 8)
    for stacked in batches(ListPlan(range(len(data)), 8), make):
        batch = jax.tree.map(lambda x: x[0], stacked)
        out = program.eval_step(state.params, state.frozen, program.put(batch, micro=False))
        scores += np.asarray(out[f"{branch}/rewards"])[batch.responses.last >= 0].tolist()
    np.testing.assert_allclose(scores, outputs[f"infer.{mode}.scores"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores, outputs[f"infer.{mode}.scores_batch1"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores, [item["score"] for item in items], rtol=0, atol=TOLERANCE)
