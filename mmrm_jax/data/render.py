"""Renders a chat template: a program of its own, since a hostile template can take any time and memory.

Reads {"template", "variables", "seconds", "bytes"} as JSON from standard input, and writes the text as JSON; where it
fails, a line on standard error says why. It runs as a plain file, without the package and all that importing it takes.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

from jinja2.ext import Extension
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 2**20


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks what the assistant says; here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's own extensions have it

    def parse(self, parser: Parser) -> Scope:
        """The block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def render(template: str, variables: dict[str, Any]) -> str:
    """The template in Jinja's sandbox, with the settings and tags of transformers; raises whatever it runs into."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    text = environment.from_string(template).render(**variables)
    if len(text) > MAX_TEXT:
        raise ValueError(f"it makes {len(text)} characters, more than the limit of {MAX_TEXT}")
    return text


def _brief(write: Callable[[str], Any]) -> Callable[..., None]:
    """An exception hook that writes one short line: a message may hold what the template made."""
    return lambda kind, error, trace: write(f"{kind.__name__}: {error}"[:500])


def main() -> None:
    """Set the limits, then render."""
    sys.excepthook = _brief(sys.stderr.write)
    task = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (task["bytes"], task["bytes"]))
    json.dump(render(task["template"], task["variables"]), sys.stdout)


if __name__ == "__main__":
    main()
