"""The table of all types as Markdown."""

from __future__ import annotations

import platform
from collections import Counter
from itertools import groupby
from typing import Any

import torch
import transformers

from .classify import CLASSES, EXACT

_HEAD = """\
# Every causal LM of transformers

{counts}, of the {total} types of transformers {transformers}'s `MODEL_FOR_CAUSAL_LM_MAPPING`
(torch {torch}, Python {python}, fp32 on the CPU). Written by `make models`; do not edit.

A tiny random model of each type, with one layer of each kind that its default configuration has:

- **exact**: the engine made every token (by its counters), equal to transformers' own greedy
  `generate()` of the same row alone: for rows alone, in a left-padded ragged batch, in prompts cut
  into chunks, behind a shared prefix and after preemption; and logits within twice the rounding
  error of transformers' own (against fp64). Only prompts whose two best logits always differ by 20
  times the noise count, with at least {kinds} different tokens in {tokens}.
- **transformers' loop**: `fastgen.optimize` refuses the type by name; everything runs as before.
- **cannot be built**: transformers has no model of the type that makes text from token ids alone.

*cached* is what each layer keeps for a token: KV heads x head size (key/value where they differ);
for types that are not exact, the kinds of layers their configuration names.
"""


def markdown(verdicts: dict[str, dict[str, Any]]) -> str:
    from .classify import _FEWEST_KINDS, NUM_TOKENS

    counts = Counter(verdict["outcome"] for verdict in verdicts.values())
    lines = [
        _HEAD.format(
            counts=", ".join(f"{counts[name]} {name}" for name in CLASSES if counts[name]),
            total=len(verdicts),
            transformers=transformers.__version__,
            torch=torch.__version__.split("+")[0],
            python=".".join(platform.python_version_tuple()[:2]),
            kinds=_FEWEST_KINDS,
            tokens=NUM_TOKENS,
        ),
        "| type | | model | cached | what is special, or why not |",
        "|---|---|---|---|---|",
    ]
    for name, verdict in sorted(verdicts.items()):
        cells = [
            name,
            verdict["outcome"],
            verdict["model_class"],
            "; ".join(_counted(verdict["layers"])),
            _cell("; ".join(filter(None, [verdict["reason"], *verdict["notes"]]))),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _counted(layers: list[str]) -> list[str]:
    runs = [(kind, len(list(group))) for kind, group in groupby(layers)]
    return [f"{count} x {kind}" for kind, count in runs]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def types_listed(text: str) -> dict[str, str]:
    """The types of a table, and the class of each."""
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): row[1] for row in rows if row[1] in (*CLASSES, EXACT)}
