"""What a run says at its end."""

from __future__ import annotations

import io

from rich.console import Console

from mmrm_jax.eval.single_tables import training_table
from mmrm_jax.objectives import find_objective


def test_branches_are_named_after_what_they_see() -> None:
    for name, others in (
        ("shortcut_aware", ["text-only proxy"]),
        ("dual_sfc", ["text-only proxy", "image-only proxy"]),
        ("lff:proxy=multimodal", ["proxy, which sees all"]),
    ):
        objective = find_objective(name)
        entry = {"step": 2, "loss": 0.7} | {f"{branch}/accuracy": 0.5 for branch in objective.branches}
        console = Console(file=io.StringIO(), width=100, record=True)
        console.print(training_table(objective, [entry]))
        text = console.export_text()
        assert [line.strip().split("  ")[0] for line in text.splitlines() if "accuracy of" in line] == [
            f"accuracy of the {other}" for other in others
        ]
