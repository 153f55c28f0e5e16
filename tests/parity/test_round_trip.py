"""From transformers to mmrm_jax and back: the same weights, and nothing that transformers misses or does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[test,parity]'")

from torch_models import (
    FAMILIES,
    IMAGE_TOKEN,
    make_model,
    random_conversations,
    read_model,
    save_state_dict,
    torch_pixels,
)
from transformers import InternVLForConditionalGeneration

from mmrm_jax.models.hf.config import config_to_native
from mmrm_jax.models.hf.weights import save_params, unused_tensors

pytestmark = pytest.mark.filterwarnings("default")


def logits(model: InternVLForConditionalGeneration, config) -> torch.Tensor:
    group = random_conversations(config, tiles=1, lengths=(12,))
    ids = torch.tensor([[*group.prefixes["primary"].tokens, *group.responses[0]]])
    pixels = torch_pixels(group.tiles, config).to(model.dtype)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def back(folder: Path, dtype: str) -> InternVLForConditionalGeneration:
    """What transformers makes of a folder, which it must know and find everything in but the score head."""
    model, info = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert set(info["unexpected_keys"]) == {"score.weight"}
    return model.eval()


def rope(model: InternVLForConditionalGeneration) -> dict:
    parameters = model.config.get_text_config().rope_parameters
    return {key: x for key, x in parameters.items() if key != "type"}  # of old, for "rope_type"


@pytest.mark.parametrize("saved", ["save_pretrained", "state_dict"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name: str, tied: bool, dtype: str, saved: str, tmp_path: Path) -> None:
    model = make_model(name, tied=tied).to(getattr(torch, dtype))
    source, out = tmp_path / "source", tmp_path / "out"
    if saved == "state_dict":
        save_state_dict(model, source)
    else:
        model.save_pretrained(source)
    config, params = read_model(source)
    out.mkdir()
    head = unused_tensors(source)
    # A raw state dict holds a tied head, too.
    assert len(head) == (1 if not tied or saved == "state_dict" else 0)
    hf = config_to_native(config, image_token_id=IMAGE_TOKEN)
    hf["tie_word_embeddings"] = hf["text_config"]["tie_word_embeddings"] = tied
    (out / "config.json").write_text(json.dumps(hf))
    # Several files, so that the index is read as well.
    save_params(out, config, params, unused=head, layout="native", dtype=dtype, max_file_bytes=4000)
    assert len(list(out.glob("*.safetensors"))) > 2
    again = back(out, dtype)
    theirs, ours = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        assert ours[key].dtype == x.dtype and torch.equal(ours[key], x), key
    # Not `model` itself: `to` rounds rotary frequencies, too, which loading does not.
    before = InternVLForConditionalGeneration.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    assert torch.equal(logits(again, config), logits(before, config))
    assert rope(again) == rope(before)
