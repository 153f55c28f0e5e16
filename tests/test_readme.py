"""The README's commands and links are real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CALL_MAIN = "import sys; from mmrm_jax.cli import main; sys.argv[0] = 'mmrm'; sys.exit(main())"


def find_commands(text: str) -> list[list[str]]:
    """The arguments after `mmrm` of each such command in fenced blocks, chained and continued lines included."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|\||;|\|", line)]
    return [words[1:] for words in commands if words and Path(words[0]).name == "mmrm"]


def show_help(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", CALL_MAIN, *arguments, "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, f"mmrm {' '.join(arguments)} --help\n{result.stdout}{result.stderr}"
    return result.stdout


COMMANDS = find_commands(README)


def test_commands_are_found_in_blocks() -> None:
    text = "Run `mmrm no`.\n```bash\n.venv/bin/pip install . && .venv/bin/mmrm a --b 1  # c\nmmrm d \\\n  --e\n```\n"
    assert find_commands(text) == [["a", "--b", "1"], ["d", "--e"]]


def test_readme_has_its_install_and_test_blocks() -> None:
    for marker, word in (("install", "mmrm quickstart"), ("test", "pytest")):
        (block,) = re.findall(rf"<!-- ci:{marker} -->\s*```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
        assert word in block


@pytest.mark.parametrize("subcommand", sorted({command[0] for command in COMMANDS}))
def test_readme_commands_exist_with_their_flags(subcommand: str) -> None:
    text = show_help(subcommand)
    words = {word for command in COMMANDS if command[0] == subcommand for word in command}
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    missing = [flag for flag in sorted(flags) if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
    assert not missing, f"`mmrm {subcommand}` has no {', '.join(missing)}"


def test_readme_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    missing = [t for t in targets if "://" not in t and not t.startswith("mailto:") and not (REPOSITORY / t).exists()]
    assert not missing
