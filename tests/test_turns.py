"""Conversations of several turns: as tokens, as rewards, and as what clients of a server send."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import data_url, png

import mmrm_jax
from mmrm_jax.data.formats.fields import RowError
from mmrm_jax.data.templates import TEMPLATES, spell
from mmrm_jax.data.text import ChatTokenizer, TextError, encode_texts
from mmrm_jax.eval.scorer import Scorer
from mmrm_jax.serve.asks import of_classify, of_messages, of_open_rlhf, of_score, rendered
from mmrm_jax.serve.prefixes import Asked, Prefixes
from mmrm_jax.serve.schemas import ClassifyRequest, Message, OpenRlhfRequest, ScoreRequest
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.types import Group

pytestmark = pytest.mark.usefixtures("one_device")

HISTORY, PROMPT, RESPONSES = ("What is it?", "A red circle."), "Is it big?", ["Yes, it is.", "No."]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def rm() -> Scorer:
    return mmrm_jax.load(MODEL_DIR, draw_score=3, batch_size=8)


@pytest.fixture(scope="module")
def chat(rm: Scorer) -> ChatTokenizer:
    return rm.checkpoint.processor.chat


def plain(chat: ChatTokenizer, text: str) -> list[int]:
    return chat.tokenizer.encode(text, add_special_tokens=False).ids


def test_each_branch_sees_the_turns_with_its_own_image(chat: ChatTokenizer) -> None:
    start, end = chat.special_id("<|im_start|>"), chat.special_id("<|im_end|>")
    image = [chat.special_id("<img>"), *[chat.special_id("<IMG_CONTEXT>")] * 4, chat.special_id("</img>")]

    def tokens(view, tiles: int = 1, history=HISTORY) -> list[int]:
        return chat.conversation(PROMPT, "No.", tiles, view, None, history).tokens.tolist()

    def turn(who: str, *said: str | list[int]) -> list[int]:
        parts = [who + "\n" + said[0], *said[1:]] if isinstance(said[0], str) else [who + "\n", *said]
        return [start, *[t for part in parts for t in (part if isinstance(part, list) else plain(chat, part))], end]

    later = [*turn("assistant", HISTORY[1]), *turn("user", PROMPT), *turn("assistant", "No.")]
    assert tokens("multimodal") == [*turn("user", image, "\n" + HISTORY[0]), *later]
    assert tokens("blank", 3) == [*turn("user", image, "\n" + HISTORY[0]), *later]
    assert tokens("absent") == tokens("absent", 0) == [*turn("user", HISTORY[0]), *later]
    assert tokens("image_only") == tokens("image_only", history=())
    second = ("What?", "A dog.")
    found = chat.conversation("<image>\nAnd this?", "No.", 1, "multimodal", None, second)
    want = [*turn("user", second[0]), *turn("assistant", second[1]), *turn("user", image, "\nAnd this?")]
    assert found.tokens.tolist() == [*want, *turn("assistant", "No.")]
    assert found.visual[found.visual >= 0].tolist() == [0, 1, 2, 3]


def test_all_of_it_is_the_prefix_of_the_responses(chat: ChatTokenizer) -> None:
    views = {"primary": "multimodal", "proxy": "absent", "words": "caption"}
    group = encode_texts(chat, PROMPT, RESPONSES, 2, views, 1000, "A circle.", HISTORY)  # type: ignore[arg-type]
    for branch, view in (("primary", "multimodal"), ("proxy", "absent")):
        for response, rest in zip(RESPONSES, group.responses):
            whole = chat.conversation(PROMPT, response, 2, view, None, HISTORY).tokens  # type: ignore[arg-type]
            assert [*group.prefixes[branch].tokens, *rest] == whole.tolist()
    words = chat.tokenizer.decode(group.prefixes["words"].tokens.tolist(), skip_special_tokens=False)
    assert "A circle" in words.split("\n")[1] and words.index("circle") < words.index("What")
    zh = ChatTokenizer.__new__(ChatTokenizer)
    zh.__dict__ = chat.__dict__ | {"template": TEMPLATES["internvl_zh"]}
    with pytest.raises(TextError, match="internvl_zh is of one turn"):
        encode_texts(zh, PROMPT, RESPONSES, 0, {"primary": "absent"}, 1000, None, HISTORY)


def test_text_alone_sees_the_same_whether_others_look_or_not(rm: Scorer) -> None:
    """Images that stand in several turns leave no place behind, nor does one blank tile stand for two."""
    said = ("<image>\nWhat is it?", "Red.")
    group = Group("", "<image>\nAnd this?", ("a", "b"), (), png(1), "", "", 0, more_images=(png(2),), history=said)
    processor = rm.checkpoint.processor
    for view in ("absent", "blank"):
        both = {"primary": "multimodal", "proxy": view}
        alone, beside = (processor.encode(group, 0, views).prefixes["proxy"] for views in ({"proxy": view}, both))
        assert alone.tokens.tolist() == beside.tokens.tolist() and alone.visual.tolist() == beside.visual.tolist()
        assert processor.measure(group, {"proxy": view}).prefixes == {"proxy": len(alone.tokens)}  # type: ignore[dict-item]
    assert "image" not in processor.chat.tokenizer.decode(
        processor.encode(group, 0, {"proxy": "absent"}).prefixes["proxy"].tokens
    )


def test_rewards_look_at_the_turns_before(rm: Scorer) -> None:
    rewards = rm.score(png(1), PROMPT, RESPONSES, HISTORY)
    assert not np.allclose(rewards, rm.score(png(1), PROMPT, RESPONSES), atol=1e-3)
    assert not np.allclose(rewards, rm.score(png(1), PROMPT, RESPONSES, ("What is it?", "A dog.")), atol=1e-3)
    many = rm.score_many([(png(1), PROMPT, RESPONSES, HISTORY), (png(1), PROMPT, RESPONSES)])
    np.testing.assert_allclose(many[0], rewards, atol=CLOSE)
    np.testing.assert_allclose(many[1], rm.score(png(1), PROMPT, RESPONSES), atol=CLOSE)
    (group,) = rm.encode([rm.tiles(png(1))], PROMPT, RESPONSES, HISTORY, alone=True)
    np.testing.assert_allclose(Prefixes(rm, 2**20).rewards([Asked(group)], "primary")[0], rewards, atol=CLOSE)
    with pytest.raises(RowError, match="wrong turns: 1 before the prompt"):
        rm.score(None, PROMPT, RESPONSES, ["What?"])
    with pytest.raises(RowError, match=r"empty prompt: 'history\[0\]'"):
        rm.score(None, PROMPT, RESPONSES, [" ", "What?"])


def message(role: str, text: str, *images: bytes) -> Message:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return Message.model_validate({"role": role, "content": [*parts, {"type": "text", "text": text}]})


def test_what_clients_send() -> None:
    said = [message("user", HISTORY[0], png(1)), message("assistant", HISTORY[1])]
    ask = of_messages([*said, message("user", PROMPT), message("assistant", "No.")])
    assert (ask.images, ask.prompt, ask.responses) == ((png(1),), PROMPT, ("No.",))
    assert ask.history == ("<image>\n" + HISTORY[0], HISTORY[1])
    own = ScoreRequest(prompt=PROMPT, responses=RESPONSES, history=list(HISTORY))
    assert of_score(own).history == HISTORY
    for broken in (said[::-1], [*said, message("user", PROMPT)], [message("system", "s"), *said], []):
        with pytest.raises(ValueError, match="in turn"):
            of_messages(broken)
    with pytest.raises(ValueError, match=r"messages\[1\] has an image"):
        of_messages([said[0], message("assistant", "a", png(2))])


def test_a_query_of_another_chat_template_is_refused() -> None:
    query = "<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\nIt is red."
    request = OpenRlhfRequest(query=["Colour? Red.", query], prompts=["Colour?", query[: -len("It is red.")]])
    with pytest.raises(ValueError, match=r"query\[1\] spells <\|im_start\|>, but not as .* chatml-plain does"):
        of_open_rlhf(request, TEMPLATES["chatml-plain"])
    (ask,) = of_open_rlhf(OpenRlhfRequest(query=[query + "<|im_end|>\n"]), TEMPLATES["chatml"])
    assert (ask.prompt, ask.responses) == ("Colour?", ("It is red.",))


@pytest.mark.parametrize("name", sorted(name for name, t in TEMPLATES.items() if t.before_next is not None))
def test_rendered_turns_are_read_back(name: str) -> None:
    text = spell(TEMPLATES[name].pieces((PROMPT,), (), "A.\nB", [((HISTORY[0],), HISTORY[1]), (("c",), "d")]))
    assert rendered(text, TEMPLATES[name]) == [*HISTORY, "c", "d", PROMPT, "A.\nB"]
    # Generation ends before a last line break; what goes on after the end of a turn is another format's.
    assert rendered(text.rstrip("\n"), TEMPLATES[name]) == rendered(text, TEMPLATES[name])
    assert rendered(text + "x", TEMPLATES[name]) is None
    unanswered = spell(TEMPLATES[name].pieces((PROMPT,), (), "", [((HISTORY[0],), HISTORY[1])]))
    asked = unanswered.removesuffix(spell(TEMPLATES[name].before_response))
    assert asked.endswith(PROMPT) and rendered(asked, TEMPLATES[name]) is None
    (ask,) = of_classify(ClassifyRequest(input=text), TEMPLATES[name])
    assert (ask.history, ask.prompt, ask.responses) == ((*HISTORY, "c", "d"), PROMPT, ("A.\nB",))
