"""A trained run out as a checkpoint folder, in again, inspected and scored."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import FAST, write_pairs
from commands import run as run_raw
from jinja2.sandbox import ImmutableSandboxedEnvironment
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmrm_jax.config import DataConfig
from mmrm_jax.data.images import Preprocessing
from mmrm_jax.data.pipeline import buckets_for, index_source
from mmrm_jax.data.templates import TEMPLATES, spell
from mmrm_jax.eval.companions import chat_template, companion_files
from mmrm_jax.eval.evaluate import evaluate
from mmrm_jax.eval.inspect import inspect_checkpoint
from mmrm_jax.eval.saved_run import read_run
from mmrm_jax.eval.score import Scored, finish
from mmrm_jax.models.hf.config import config_to_hf
from mmrm_jax.models.hf.weights import load_params
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.setup import merged_views, model_fingerprint, open_checkpoint, open_spec
from mmrm_jax.train.state import abstract_model, merge_branch
from mmrm_jax.types import Group

SETTINGS = [a.replace("--train.", "--") for a in FAST]


class NoCapture:
    """Stands in for `capsys`, which a fixture of the whole module cannot have."""

    def readouterr(self):
        return type("Captured", (), {"out": "", "err": ""})


def run(capsys, *arguments: object) -> tuple[int, str]:
    """Exit status and everything printed, without line breaks."""
    status, text = run_raw(capsys, *arguments)
    return status, " ".join(text.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of two steps, and what it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    file = write_pairs(folder, "pairs", 12)
    train = ("train", "--data", file, "--out", folder / "run", "--steps", 2, "--data.holdout", 0, *SETTINGS)
    assert run(NoCapture(), *train)[0] == 0
    return folder


def flat(params) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


@pytest.mark.parametrize("layout", ["chat", "native"])
def test_what_is_exported_is_read_back_bit_for_bit(capsys, trained, tmp_path, layout):
    out = tmp_path / "exported"
    out.mkdir()
    for name in ("vocab.json", "video_preprocessor_config.json"):  # left by an export that was broken off
        (out / name).write_text("{}")
    status, text = run(capsys, "export", "--run", trained / "run", "--out", out, "--layout", layout, "--proxy")
    assert not (out / "vocab.json").exists() and not (out / "video_preprocessor_config.json").exists()
    assert status == 0 and "step 2" in text and f"{layout} layout" in text
    state, step = read_run(trained / "run").restore(Console())
    checkpoint = open_checkpoint(out)
    assert step == 2 and checkpoint.config == read_run(trained / "run").checkpoint.config
    for branch in ("primary", "proxy"):
        loaded, drawn = load_params(out, checkpoint.config, abstract_model(checkpoint.config)[1], branch=branch)
        want, found = flat(merge_branch(state.params[branch], state.frozen)), flat(loaded)
        assert not drawn and want.keys() == found.keys()
        assert all(np.array_equal(want[name], found[name]) for name in want)
    heads = [np.asarray(state.params[branch]["score"].get_value()) for branch in ("primary", "proxy")]
    assert not np.array_equal(*heads)
    description = inspect_checkpoint(out)
    assert description["problems"] == [] and description["layout"] == layout
    assert description["score_head"] and description["proxy"] and not description["lm_head"]
    status, text = run(capsys, "export", "--run", trained / "run", "--out", out)
    assert status == 2 and "holds a checkpoint already" in text


def test_a_model_that_does_not_see_everything_is_not_exported(capsys, tmp_path):
    """Whoever reads the folder would give it the image too, or the prompt, and get other rewards."""
    file, run_dir = write_pairs(tmp_path, "pairs", 12), tmp_path / "run"
    settings = ("--steps", 1, "--data.holdout", 0, "--objective", "text_only", *SETTINGS)
    assert run(capsys, "train", "--data", file, "--out", run_dir, *settings)[0] == 0
    status, text = run(capsys, "export", "--run", run_dir, "--out", tmp_path / "out")
    assert status == 2 and "was trained with text_only" in text and not (tmp_path / "out").exists()


def test_the_settings_of_the_data_are_those_of_the_run(capsys, tmp_path):
    file, run_dir = write_pairs(tmp_path, "pairs", 12), tmp_path / "run"
    settings = ("--steps", 1, "--data.holdout", 0, "--data.max-length", 200, "--objective", "standard", *SETTINGS)
    train = ("train", "--data", file, "--out", run_dir, *settings, "--data.max-tiles")
    assert run(capsys, *train, 2)[0] == 0
    saved = read_run(run_dir)
    assert saved.config.data.max_tiles == 2 and saved.config.data.holdout == 0 and saved.data == str(file)
    assert saved.checkpoint.processor.max_length == 200 and saved.checkpoint.processor.preprocessing.max_tiles == 2
    assert run(capsys, "export", "--run", run_dir, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_dynamic_patch"] == 2
    exported = open_checkpoint(tmp_path / "out").processor
    assert exported.max_length == 200 and exported.preprocessing.max_tiles == 2
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows, json.dumps(json.loads(rows[0]) | {"prompt": "Colour? " * 100})]))
    status, text = run(capsys, "evaluate", "--run", run_dir, "--data", file)
    assert status == 0 and "1 quarantined" in text and "over the budget of max_length=200" in text
    file.write_text("\n".join(rows) + "\n")
    status, text = run(capsys, *train, 3)
    assert status == 2 and "data.max_tiles: 2 -> 3" in text
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"data": "pairs.jsonl"}))
    status, text = run(capsys, "evaluate", "--run", run_dir, "--data", file)
    assert status == 2 and "data is 'pairs.jsonl', which is no setting" in text


def test_an_lm_head_and_companion_files_are_carried_over(capsys, trained, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(MODEL_DIR, base)
    head = np.random.default_rng(0).normal(size=(2048, 64)).astype(np.float32)
    name = "language_model.lm_head.weight"
    save_file(load_file(base / "model.safetensors") | {name: head}, base / "model.safetensors")
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    for file in ("modeling.py", "imported.py"):
        (base / file).write_text("raise SystemExit('this is not to be run')")
    mapped = {"AutoModel": "modeling.Model", "AutoConfig": "gone.Config", "AutoTokenizer": "a/b--elsewhere.Tokenizer"}
    config = json.loads((base / "config.json").read_text()) | {"auto_map": mapped}
    config["llm_config"]["dtype"] = "float16"
    (base / "config.json").write_text(json.dumps(config))
    file, again = trained / "pairs.jsonl", tmp_path / "run"
    train = ("train", "--data", file, "--out", again, "--model", base, "--steps", 1, "--data.holdout", 0, *SETTINGS)
    assert run(capsys, *train)[0] == 0
    status, text = run(capsys, "export", "--run", again, "--out", out, "--proxy", "--dtype", "bfloat16")
    assert status == 0 and "auto_map names gone.py, which" in text and "elsewhere" not in text
    assert (out / "imported.py").exists() and (out / "modeling.py").read_text().startswith("raise")
    with safe_open(out / "model.safetensors", "numpy") as f:
        for prefix in ("", "bias_reward_model."):
            written = f.get_tensor(prefix + name)
            assert written.dtype.name == "bfloat16"
            np.testing.assert_array_equal(written.astype(np.float32), head.astype(written.dtype).astype(np.float32))
    exported = json.loads((out / "config.json").read_text())
    config["llm_config"]["dtype"] = "bfloat16"
    assert exported == config | {"torch_dtype": "bfloat16", "dtype": "bfloat16", "proxy_input": "absent"}
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert inspect_checkpoint(out)["dtypes"] == {"BF16": 132}


def test_scores_are_the_rewards_of_evaluation_in_the_order_of_the_rows(capsys, trained, tmp_path):
    model, rows = tmp_path / "model", (trained / "pairs.jsonl").read_text().splitlines()
    assert run(capsys, "export", "--run", trained / "run", "--out", model)[0] == 0
    broken = json.loads(rows[3]) | {"id": "broken", "img_path": "images/broken.png"}
    image = (trained / "images" / "pairs-3.png").read_bytes()
    (trained / "images" / "broken.png").write_bytes(image[: len(image) // 2])
    one = {"prompt": "Colour?", "img_path": "images/pairs-0.png", "responses": ["It is red."]}
    data = trained / "mixed.jsonl"
    data.write_text("\n".join([*rows[:5], json.dumps(broken), "{cut", json.dumps(one), *rows[5:]]) + "\n")
    out = tmp_path / "scores.jsonl"
    status, text = run(capsys, "score", "--model", model, "--data", data, "--out", out, "--batch-size", 8)
    assert status == 0 and "25 scores of 13 rows" in text and "3 without a score" in text
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    errors = {i: line["error"] for i, line in enumerate(lines) if "error" in line}
    assert list(errors) == [10, 11, 12] and "broken.png" in errors[10] and "broken JSON line" in errors[12]
    chosen, rejected = ({k: v for k, v in line.items() if k != "error"} for line in lines[10:12])
    assert chosen == {k: broken[k] for k in ("id", "prompt", "img_path")} | {"response": broken["chosen"]}
    assert rejected["response"] == broken["rejected"] and lines[13]["response"] == "It is red."
    assert lines[12].keys() == {"file", "row", "error"} and (lines[12]["file"], lines[12]["row"]) == (str(data), 7)
    assert [lines[i]["img_path"] for i in (0, 13)] == ["images/pairs-0.png"] * 2
    scored = [line["score"] for line in lines if "score" in line]
    pairs = scored[:10] + scored[11:]
    saved = read_run(trained / "run")
    source, _ = open_spec(str(trained / "pairs.jsonl"), Path(), None)
    encoded, _ = index_source(
        source, saved.checkpoint.processor, merged_views([saved.program.objective], saved.config), cache=True
    )
    state, _ = saved.restore(Console())
    e = evaluate(saved.program, state, encoded, buckets_for([encoded], 1), batch_size=16)
    margins = np.asarray(pairs[0::2]) - np.asarray(pairs[1::2])
    np.testing.assert_allclose(margins, e.margins["primary"], atol=1e-5)
    np.testing.assert_allclose(np.mean(pairs), e.mean_reward["primary"], atol=1e-5)
    assert not list(tmp_path.glob("scores.jsonl.*"))


def changed_run(trained: Path, folder: Path, **fields: object) -> Path:
    """A copy of the run with another config.json; it says that it started from `folder`/model, which may be there."""
    shutil.copytree(trained / "run", folder / "changed")
    if not (folder / "model").exists():
        shutil.copytree(MODEL_DIR, folder / "model")
    config = json.loads((trained / "run" / "config.json").read_text()) | {"model": str(folder / "model")} | fields
    config["fingerprints"]["model"] = model_fingerprint(folder / "model")
    (folder / "changed" / "config.json").write_text(json.dumps(config))
    return folder / "changed"


def test_a_run_is_read_on_any_machine_and_says_where_it_is_unfinished(capsys, trained, tmp_path):
    mesh = {"data": 2, "fsdp": 8, "tensor": 3}
    other = changed_run(trained, tmp_path, mesh=mesh, total_steps=9, eval_batch_size=3)
    saved = read_run(other)
    state, _ = saved.restore(Console())
    assert saved.program.mesh.shape["fsdp"] == 8 and state.opt_state == ()
    said, file = "stopped at step 2 of 9", tmp_path / "result.json"
    status, text = run(capsys, "export", "--run", other, "--out", tmp_path / "out", "--json", file)
    found = json.loads(file.read_text())
    assert status == 0 and said in text and (found["steps"], found["finished"]) == (9, False)
    status, text = run(capsys, "evaluate", "--run", other, "--data", trained / "pairs.jsonl", "--json", file)
    found = json.loads(file.read_text())
    assert status == 0 and said in text and (found["step"], found["steps"], found["finished"]) == (2, 9, False)
    status, text = run(capsys, "export", "--run", trained / "run", "--out", tmp_path / "o", "--json", file)
    assert status == 0 and "unfinished" not in text and json.loads(file.read_text())["finished"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_model_folder_that_has_changed_is_refused(capsys, trained, tmp_path, name):
    other = changed_run(trained, tmp_path)
    assert read_run(other).steps == 2
    with (tmp_path / "model" / name).open("a") as f:
        f.write("{}" if name.startswith("pre") else "\n")
    status, text = run(capsys, "export", "--run", other, "--out", tmp_path / "out")
    assert status == 2 and "changed since" in text and not (tmp_path / "out").exists()


def test_another_layout_has_its_files_and_keeps_what_the_language_model_said(capsys, trained, tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    carried = {"max_position_embeddings": 5000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config["llm_config"] |= carried
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"min_dynamic_patch": 2}))
    native = tmp_path / "native"
    export = ("export", "--run", changed_run(trained, tmp_path), "--out", native, "--layout", "native")
    assert run(capsys, *export)[0] == 0
    exported = json.loads((native / "config.json").read_text())
    assert exported["text_config"].items() >= carried.items()
    want = open_checkpoint(native)
    (native / "mmrm_processor.json").unlink()  # what other software reads says the same
    read = open_checkpoint(native)
    assert read.config == want.config and read.processor.chat.template == want.processor.chat.template
    assert read.processor.preprocessing == want.processor.preprocessing == Preprocessing(32, 2, 6)
    # Back again, with tiles of its own.
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(native, tmp_path / "model")
    shutil.rmtree(tmp_path / "changed")
    images = Preprocessing(32, 2, 3, use_thumbnail=False, dynamic=False)
    data = dataclasses.asdict(DataConfig(max_tiles=3))
    out = tmp_path / "chat"
    export = ("export", "--run", changed_run(trained, tmp_path, data=data), "--out", out, "--layout", "chat")
    assert run(capsys, *export)[0] == 0
    exported = json.loads((out / "config.json").read_text())
    assert exported["llm_config"].items() >= carried.items()
    assert exported["max_dynamic_patch"] == 3 and exported["min_dynamic_patch"] == 2
    (out / "mmrm_processor.json").unlink()
    assert open_checkpoint(out).processor.preprocessing == Preprocessing(32, 2, 3)
    hf = config_to_hf(want.config, template="chatml", min_tiles=2, max_tiles=3, use_thumbnail=False, dynamic=False)
    (out / "config.json").write_text(json.dumps(hf))
    assert open_checkpoint(out).processor.preprocessing == images
    # In the same layout the tiling of the run replaces that of the base.
    found = companion_files(open_checkpoint(native, DataConfig(max_tiles=4)), {}, same=True, layout="native")
    assert json.loads(found["preprocessor_config.json"])["max_patches"] == 4
    with pytest.raises(ValueError, match="always adds a thumbnail"):
        no_thumbnail = dataclasses.replace(want.processor.preprocessing, use_thumbnail=False)
        processor = dataclasses.replace(want.processor, preprocessing=no_thumbnail)
        companion_files(dataclasses.replace(want, processor=processor), {}, same=False, layout="native")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_spells_its_conversation(name):
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A “pear”\n."}]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(chat_template(TEMPLATES[name], "<IMG_CONTEXT>"))
    image = "<img><IMG_CONTEXT></img>"
    rendered = template.render(messages=messages).replace("<IMG_CONTEXT>", image)
    assert rendered == spell(TEMPLATES[name].pieces(("", "\nWhat?"), (1,), "A “pear”\n."))
    if TEMPLATES[name].before_next is not None:
        more = template.render(messages=[*messages, messages[0], {"role": "assistant", "content": " No. "}])
        pieces = TEMPLATES[name].pieces(("", "\nWhat?"), (1, 1), " No. ", [(("", "\nWhat?"), "A “pear”\n.")])
        assert more.replace("<IMG_CONTEXT>", image) == spell(pieces)
        system = template.render(messages=[{"role": "system", "content": "S"}, *messages])
        assert system.replace("<IMG_CONTEXT>", image) == rendered  # the format's own stands, not the one given
    asked = template.render(messages=messages[:1], add_generation_prompt=True).replace("<IMG_CONTEXT>", image)
    assert asked.rstrip() == spell(TEMPLATES[name].pieces(("", "\nWhat?"), (1,), "")).rstrip()


def test_the_chat_layout_has_the_files_that_others_read(capsys, trained, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, "export", "--run", trained / "run", "--out", out)[0] == 0
    images = json.loads((out / "preprocessor_config.json").read_text())
    want = {"size": 32, "crop_size": 32, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    assert images.items() >= (want | {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}).items()
    template = ImmutableSandboxedEnvironment().from_string((out / "chat_template.jinja").read_text())
    asked = template.render(messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}])
    assert asked == spell(TEMPLATES["chatml-plain"].pieces(("<image>\n?",), (), "r")).partition("<|im_end|>")[0]
    # What the base has of its own is kept, and stands for what would be made.
    base = tmp_path / "base"
    shutil.copytree(MODEL_DIR, base)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (base / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    found = companion_files(open_checkpoint(base), {}, same=True, layout="chat")
    assert found == {"preprocessor_config.json": b'{"image_mean": [0.5, 0.5, 0.5]}'}


def test_weights_are_as_readable_as_any_file(capsys, trained, tmp_path):
    before = os.umask(0o027)
    try:
        assert run(capsys, "export", "--run", trained / "run", "--out", tmp_path / "out")[0] == 0
    finally:
        os.umask(before)
    modes = {
        name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in ("model.safetensors", "config.json")
    }
    assert modes == {"model.safetensors": 0o640, "config.json": 0o640}


def test_a_run_is_no_model_and_says_how_it_becomes_one(capsys, trained, tmp_path):
    run_dir, data = trained / "run", ("--data", trained / "pairs.jsonl", "--out", tmp_path / "o")
    for command in (("score", "--model", run_dir, *data), ("train", "--model", run_dir, *data), ("inspect", run_dir)):
        status, text = run(capsys, *command)
        assert status == 2 and f"{run_dir} is a run directory of mmrm train, no checkpoint folder" in text
        assert f"mmrm export --run {run_dir} --out FOLDER" in text


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder = tmp_path / "hub" / "snapshots" / "main"
    shutil.copytree(MODEL_DIR, folder)
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "0").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    link = folder / "generation_config.json"
    link.symlink_to("../../blobs/0")
    checkpoint = open_checkpoint(folder)
    files = companion_files(checkpoint, {}, same=True, layout="chat")
    assert files.pop("generation_config.json") == b"{}" and files.keys() == {
        "preprocessor_config.json",
        "chat_template.jinja",
    }
    link.unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    for name in ("generation_config.json", "special_tokens_map.json"):
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=f"{name} is a link to .*secret, outside its folder"):
            companion_files(checkpoint, {}, same=True, layout="chat")
        (folder / name).unlink()


def test_every_row_gives_scores_or_an_error_line(capsys, trained, tmp_path):
    row = {"id": "v", "prompt": "Colour?", "img_path": "./images/pairs-0.png"}
    completions = [{"response": r, "annotations": {"A": {"Rating": a}}} for r, a in (("a", "3"), ("b", "3"), ("", "1"))]
    cut = (trained / "images" / "pairs-0.png").read_bytes()[:60]
    (trained / "images" / "cut.png").write_bytes(cut)
    bad = row | {"id": "cut", "img_path": "images/cut.png", "responses": ["a"]}
    rows = [row | {"completions": completions}, bad, row | {"id": 7, "img_path": None, "responses": ["c"]}]
    data, out = trained / "every.jsonl", tmp_path / "s.jsonl"
    score = ("score", "--model", MODEL_DIR, "--draw-score", 3, "--out", out, "--batch-size", 3, "--data")
    data.write_text("\n".join(map(json.dumps, rows)) + '\n{"\\ud800": 1}')
    status, text = run(capsys, *score, data, "--json", tmp_path / "summary.json")
    assert status == 0 and "3 scores of 2 rows" in text and "3 without a score" in text
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["id"], line.get("response"), "error" in line) for line in lines] == [
        *(("v", "a", False), ("v", "b", False), ("v", "", True), ("cut", "a", True), ("7", "c", False)),
        ("every-4", None, True),
    ]
    assert [line["img_path"] for line in lines if "score" in line] == ["./images/pairs-0.png"] * 2 + [None]
    assert json.loads((tmp_path / "summary.json").read_text())["errors"] == 3
    data.write_text(json.dumps(bad | {"img_path": "pairs.jsonl"}) + "\n{")
    status, text = run(capsys, *score, data, "--json", tmp_path / "summary.json")
    assert status == 2 and f"nothing in {data} could be scored; {out} says why" in text
    assert ["error" in json.loads(line) for line in out.read_text().splitlines()] == [True, True]
    assert json.loads((tmp_path / "summary.json").read_text())["scores"] == 0
    link = tmp_path / "link"
    link.symlink_to(out)
    for extra, reason in (
        (("--batch-size", 0), "--batch-size is 0; it must be at least 1"),
        (("--buckets", 0), "--buckets is 0"),
        (("--out", data), "is the data itself"),
        (("--out", tmp_path), "is a directory"),
        (("--out", link), "is a link or a device"),
        (("--out", "/dev/null"), "is a link or a device"),
    ):
        status, text = run(capsys, *score, data, *extra)
        assert status == 2 and reason in text and data.read_text().endswith("{")


def test_a_score_that_is_not_finite_is_an_error():
    group = Group("a", "p", ("x", "y"), (), None, "e", "f.jsonl", 4)
    bad, good = finish(Scored(group, np.asarray([np.nan, 1.0])), None).lines
    assert good["score"] == 1 and good["response"] == "y" and (bad["id"], bad["response"]) == ("a", "x")
    assert "the model gives nan" in bad["error"]


def test_a_model_without_a_score_head_is_scored_only_on_demand(capsys, trained, tmp_path):
    score = ("score", "--model", MODEL_DIR, "--data", trained / "pairs.jsonl", "--out", tmp_path / "s.jsonl")
    status, text = run(capsys, *score)
    assert status == 2 and "no score.weight" in text and "--draw-score" in text and not (tmp_path / "s.jsonl").exists()
    status, text = run(capsys, *score, "--draw-score", 3, "--batch-size", 8)
    assert status == 0 and "drawn from seed 3: score" in text


def test_a_run_without_a_proxy_or_checkpoint_is_refused(capsys, trained, tmp_path):
    standard = tmp_path / "standard"
    shutil.copytree(trained / "run", standard)
    config = json.loads((standard / "config.json").read_text())
    (standard / "config.json").write_text(json.dumps(config | {"objective": "standard"}))
    status, text = run(capsys, "export", "--run", standard, "--out", tmp_path / "o", "--proxy")
    assert status == 2 and "standard, which has no proxy" in text
    shutil.rmtree(standard / "checkpoints")
    status, text = run(capsys, "export", "--run", standard, "--out", tmp_path / "o")
    assert status == 2 and "no complete checkpoint" in text
    status, text = run(capsys, "export", "--run", MODEL_DIR, "--out", tmp_path / "o")
    assert status == 2 and "no run of `mmrm train`" in text and not (tmp_path / "o").exists()


def test_inspect_names_what_is_missing(capsys, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    status, text = run(capsys, "inspect", folder, "--json", tmp_path / "d.json")
    assert status == 0 and "nothing but the score head is missing" in text
    found = json.loads((tmp_path / "d.json").read_text())
    parts = {k: v for k, v in found["parameters"].items() if k != "total"}
    assert sum(parts.values()) == found["parameters"]["total"] == 307264 and found["template"] == "chatml-plain"
    tensors = load_file(folder / "model.safetensors")
    del tensors["mlp1.1.bias"]
    save_file(tensors | {"extra": np.zeros(2, np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{")
    problems = "\n".join(inspect_checkpoint(folder)["problems"])
    assert "missing: mlp1.1.bias" in problems and "unknown: extra" in problems and "tokenizer.json" in problems
    status, text = run(capsys, "inspect", folder, "--json", tmp_path / "d.json")
    assert status == 2 and "missing: mlp1.1.bias" in text and f"{folder} cannot be used as it is" in text
    assert json.loads((tmp_path / "d.json").read_text())["problems"]
    (folder / "config.json").unlink()
    status, text = run(capsys, "inspect", folder)
    assert status == 2 and "config.json does not exist" in text
