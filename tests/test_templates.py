"""Chat formats: the authors' prompt strings, and which format a checkpoint asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from goldens import fixtures

from mmrm_jax.data import templates
from mmrm_jax.data.images import Preprocessing
from mmrm_jax.data.templates import (
    TEMPLATES,
    ImageSlots,
    Special,
    find_template,
    spell,
    split_at_images,
    split_turns,
    without_images,
)

every_set = pytest.mark.parametrize("folder", fixtures("templates", "templates.json", "constants.json"))


def conversation(name: str, prompt: str, slots: int, answer: str) -> str:
    parts = split_at_images(prompt, 1)
    pieces = (parts, (slots,)) if slots else (("".join(parts),), ())
    return spell(TEMPLATES[name].pieces(*pieces, answer))


@every_set
def test_prompt_strings_are_the_authors(folder: Path) -> None:
    styles = json.loads((folder / "templates.json").read_text())
    assert styles
    for name, style in styles.items():
        for case, want in style["cases"].items():
            slots = want["n_context_tokens"]
            got = conversation(name, want["prompt"], slots, want["answer"])
            assert got == want["expanded"], (name, case)
            image = f"{templates.IMAGE_START}{templates.IMAGE_CONTEXT * slots}{templates.IMAGE_END}"
            assert got.replace(image, templates.IMAGE_PLACEHOLDER) == want["formatted"], (name, case)
        if style["system_message"]:
            assert style["system_template"].format(system_message=style["system_message"]) in got


@every_set
def test_constants_are_the_authors(folder: Path) -> None:
    constants = json.loads((folder / "constants.json").read_text())
    assert constants["IMG_START"] == templates.IMAGE_START
    assert constants["IMG_END"] == templates.IMAGE_END
    assert constants["IMG_CONTEXT"] == templates.IMAGE_CONTEXT
    assert [list(Preprocessing.mean), list(Preprocessing.std)] == constants["imagenet"]


def test_internvl2_5_by_hand() -> None:
    """As registered in InternVL's conversation code: turns end with a line break, the last one too."""
    system = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
    assert conversation("internvl2_5", "What?", 2, " A cat.") == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n A cat.<|im_end|>\n"
    )
    assert conversation("internvl2_5", "What?", 1, "").endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_stripping_without_an_image() -> None:
    chat = TEMPLATES["internlm2-chat"]
    assert spell(chat.pieces((" \n a b \n",), (), " c ")).endswith(
        "user\na b<|im_end|><|im_start|>assistant\nc<|im_end|>"
    )
    # With one, only the outer ends of the message are its ends.
    assert chat.pieces((" look \n", " a "), (4,), "  ")[-8:] == (
        "look \n",
        Special("<img>"),
        ImageSlots(4),
        Special("</img>"),
        " a",
        Special("<|im_end|>"),
        Special("<|im_start|>"),
        "assistant\n",
    )


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("What?", ("", "\nWhat?")),
        ("", ("", "\n")),
        ("<image>\nWhat?", ("", "\nWhat?")),
        ("<image>What?", ("", "What?")),
        ("What?\n<image>", ("What?\n", "")),
        ("a\n<image>\nb\n<image>", ("a\n", "\nb\n<image>")),
        ("Is <image> a tag?", ("", "\nIs <image> a tag?")),
        ("a <image>", ("", "\na <image>")),
        ("a\r\n<image>\r\nb", ("a\r\n", "\r\nb")),
        ("a\n<image> \nb", ("a\n", " \nb")),
    ],
)
def test_where_the_image_stands(prompt: str, parts: tuple[str, str]) -> None:
    assert split_at_images(prompt, 1) == parts


@pytest.mark.parametrize(
    ("prompt", "parts", "text"),
    [
        (
            "Image-1: <image>\nImage-2: <image>\nSame?",
            ("Image-1: ", "\nImage-2: ", "\nSame?"),
            "Image-1: \nImage-2: \nSame?",
        ),
        ("<image><image>Same?", ("", "", "Same?"), "Same?"),
        ("Same?", ("", "\n", "\nSame?"), "Same?"),
        ("Is <image> a tag?", ("", "\n", "\nIs <image> a tag?"), "Is <image> a tag?"),
    ],
)
def test_where_several_images_stand(prompt: str, parts: tuple[str, ...], text: str) -> None:
    """In place, as in InternVL's documentation of several images, or all before the prompt."""
    assert split_at_images(prompt, 2) == parts and without_images(parts) == text
    spelt = spell(TEMPLATES["chatml-plain"].pieces(parts, (1, 2), "A."))
    one, two = ("<img>" + "<IMG_CONTEXT>" * n + "</img>" for n in (1, 2))
    assert f"user\n{parts[0]}{one}{parts[1]}{two}{parts[2]}<|im_end|>" in spelt


def test_several_turns_by_hand() -> None:
    """Each turn as the one before it; the system message comes once; images stand where the user's turns say."""
    chat = TEMPLATES["internvl2_5"]
    history = [(("", "\nWhat?"), "A cat."), (("And ", "?"), "A dog.")]
    spelt = spell(chat.pieces(("Sure?",), (1, 2), "Yes.", history))
    assert spelt.count("书生·万象") == 1 and spelt.endswith(
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nAnd <img><IMG_CONTEXT><IMG_CONTEXT></img>?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    stripped = spell(TEMPLATES["internlm2-chat"].pieces((" Sure? ",), (), " Yes. ", [((" What? ",), " A cat. ")]))
    assert stripped.endswith(
        "user\nWhat?<|im_end|><|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|>"
        "<|im_start|>assistant\nYes.<|im_end|>"
    )
    with pytest.raises(ValueError, match="internvl_zh is of one turn; the conversation has 2"):
        TEMPLATES["internvl_zh"].pieces(("b",), (), "c", [(("a",), "b")])
    with pytest.raises(ValueError, match="fewer places"):
        chat.pieces(("Sure?",), (1,), "Yes.", [(("What?",), "A cat.")])


@pytest.mark.parametrize(
    ("asked", "images", "parts"),
    [
        (["a", "b"], 0, [("a",), ("b",)]),
        (["a", "b"], 1, [("", "\na"), ("b",)]),
        (["a", "<image>\nb"], 1, [("a",), ("", "\nb")]),
        (["is <image> a tag?", "b"], 1, [("", "\nis <image> a tag?"), ("b",)]),
        (["<image>a", "b <image>"], 2, [("", "a"), ("b ", "")]),
        (["a", "<image><image>b"], 2, [("a",), ("", "", "b")]),
        (["a", "b"], 2, [("", "\n", "\na"), ("b",)]),
    ],
)
def test_where_images_stand_in_several_turns(asked, images, parts) -> None:
    assert split_turns(asked, images) == parts


NATIVE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def native(path: Path, **files: str) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": "internvl", "text_config": {}}))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json", "tokenizer_config.json"])
def test_a_native_checkpoint_says_its_format_in_jinja(tmp_path: Path, file: str) -> None:
    native(tmp_path, **{file: json.dumps({"chat_template": NATIVE})})
    assert find_template(tmp_path).name == "chatml"
    native(tmp_path, **{file: json.dumps({"chat_template": NATIVE.replace("<IMG_CONTEXT>", "<image>")})})
    assert find_template(tmp_path).name == "chatml"
    # The file of its own comes first.
    system = "{{ '<|im_start|>system\n" + templates._INTERNVL_2_5 + "<|im_end|>\n' }}"
    expanded = NATIVE.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>")
    (tmp_path / "chat_template.jinja").write_text(system + expanded)
    assert find_template(tmp_path).name == "internvl2_5"
    # And what is said outright before that.
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}, "template": "Hermes-2"}))
    assert find_template(tmp_path).name == "Hermes-2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}[{{ m['role'] }}]{% endfor %}", r"makes '\[user\]\[assistant\]', which is no known"),
        ("{% for %}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("{{ messages + 1 }}", "cannot be rendered"),
        ("{{ raise_exception('no images') }}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered.*unsafe"),
        # Hostile ones: time, memory, recursion, and whatever else a template can make Python raise.
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "cannot be .* than 2 s"),
        ("{{ 'a' * 10**12 }}", "cannot be rendered .MemoryError"),
        ("{{ 'a' * 10**7 }}", "cannot be rendered .*10000000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered .RecursionError"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "cannot be rendered .RecursionError"),
        ("{{ cycler() }}", "cannot be rendered .RuntimeError"),
        ("{% include 'config.json' %}", "cannot be rendered .TypeError: no loader"),
        ("{{ '\udc80' }}", r"makes '\\udc80', which is no known"),
    ],
)
def test_a_chat_template_that_is_no_known_format(tmp_path: Path, text: str, message: str) -> None:
    native(tmp_path, chat_template__json=json.dumps({"chat_template": text}))
    with pytest.raises(ValueError, match=rf"chat_template.json: the chat template {message}") as error:
        find_template(tmp_path)
    assert "name one of chatml-plain, " in str(error.value) and 'internvl_zh in config.json as "template"' in str(
        error.value
    )
    assert len(str(error.value)) < 1500


def test_tags_of_transformers_chat_templates(tmp_path: Path) -> None:
    """Loop controls, and the mark around what the assistant says."""
    text = "{% for x in messages %}{% if loop.index0 > 9 %}{% break %}{% endif %}{% endfor %}" + NATIVE.replace(
        "{{ content['text'] }}", "{% generation %}{{ content['text'] }}{% endgeneration %}"
    )
    assert find_template(native(tmp_path, chat_template__jinja=text)).name == "chatml"


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    (native(tmp_path) / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja cannot be read"):
        find_template(tmp_path)


def test_without_a_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        find_template(tmp_path)
    with pytest.raises(ValueError, match=r"has no chat template: name one of chatml-plain"):
        find_template(native(tmp_path))
    for config, name in (({}, "None"), ({"template": "vicuna"}, "'vicuna'"), ({"template": ["x"]}, r"\['x'\]")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"config.json: template {name} is not known; known: chatml-plain, "):
            find_template(tmp_path)
    for broken in ("{", "[1]", '"internlm2-chat"'):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"config.json"):
            find_template(tmp_path)
