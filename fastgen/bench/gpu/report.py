"""The records of all sections as one page: figures beside their goals, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
NOT_MEASURED = "not measured"

# Goals, where a figure has one.
FASTER_THAN_TUTORIAL, SHARE_OF_CUDNN, CUDNN_FROM = 1.2, 0.85, 2048
SHARE_OF_DENSE = 0.93  # at blocks of 64
DECODE_SHARES = {512: 0.60, 1024: 0.75, 2048: 0.87, 4096: 0.94, 8192: 0.98}
BATCH_1_MS = {"llama-3-8b": 5.7, "llama-3.2-1b": 1.25}
TIMES_ONE_BY_ONE, TIMES_GENERATE_BATCH = 20.0, 2.0
WARM_START_S = 5.0

_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_PEERS = ("fastgen", "tutorial", "cuDNN", "SDPA flash", "FlexAttention")
_SHAPES = ("qwen3-0.6b", "llama-3.2-1b", "llama-3-8b")
_DECODE_BLOCK = 16  # the engine's own, for which the goals are


def report(records: Mapping[str, Record]) -> str:
    """Markdown of the records by section name; what they lack is marked as not measured."""
    figures = {name: record.get("figures", {}) for name, record in records.items()}
    pages = [
        ["# GPU check", "", *_machine(records)],
        _states(records),
        _prefill(figures.get("prefill", {})),
        _paged(figures.get("paged", {})),
        _decode(figures.get("decode", {})),
        _generate(figures.get("generate", {})),
        _missing(records),
    ]
    return "\n\n".join("\n".join(page) for page in pages) + "\n"


def _machine(records: Mapping[str, Record]) -> list[str]:
    if not records:
        return ["Nothing was run."]
    machine = dict(next(iter(records.values())).get("machine", {}))
    versions = machine.pop("versions", {})
    return [
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
    ]


def _states(records: Mapping[str, Record]) -> list[str]:
    lines = ["## Sections", ""]
    rows, wrong = [], []
    for name, record in records.items():
        checks = record.get("checks", {})
        bad = [check for check, found in checks.items() if not found["ok"]]
        rows.append(
            [name, record["status"], f"{len(checks) - len(bad)} of {len(checks)}",
             f"{record.get('seconds', 0.0):.0f}", record.get("why", "")]
        )  # fmt: skip
        wrong += [f"- **wrong**: {name}: {one}: {checks[one].get('error', '')}" for one in bad]
        for part, end in record.get("parts", {}).items():
            if end["status"] != "done":
                wrong.append(f"- **{end['status']}**: {part}: {end['why']}")
    lines += _table(["section", "status", "checks that hold", "seconds", ""], rows)
    return [*lines, "", *wrong] if wrong else lines


def _prefill(figures: Record) -> list[str]:
    """TFLOP/s; ours with the shares that have goals."""
    rows = []
    for head_dim in (64, 128):
        for length in _LENGTHS:
            rates = [figures.get(f"{head_dim}/{length}/{who}") for who in _PEERS]
            ours, tutorial, cudnn = rates[:3]
            goals = head_dim == 128
            rows.append(
                [f"{head_dim}", f"{length}", *(_number(rate, "{:.0f}") for rate in rates),
                 _goal(_ratio(ours, tutorial), FASTER_THAN_TUTORIAL if goals else None),
                 _goal(_ratio(ours, cudnn),
                       SHARE_OF_CUDNN if goals and length >= CUDNN_FROM else None)]
            )  # fmt: skip
    head = ["head size", "sequence", *_PEERS, "/ tutorial", "/ cuDNN"]
    return ["## Prompts: causal attention, bf16, 16384 tokens, TFLOP/s", "", *_table(head, rows)]


def _paged(figures: Record) -> list[str]:
    rows = []
    for head_dim in (64, 128):
        for length in _LENGTHS:
            ratios = [
                _get(figures, f"{head_dim}/{length}/{block}", "ratio") for block in (16, 32, 64)
            ]
            rows.append(
                [f"{head_dim}", f"{length}", *(_number(ratio, "{:.2f}") for ratio in ratios[:2]),
                 _goal(ratios[2], SHARE_OF_DENSE)]
            )  # fmt: skip
    head = ["head size", "sequence", "blocks of 16", "of 32", "of 64"]
    return ["## Prompts through pages, as a share of dense", "", *_table(head, rows)]


def _decode(figures: Record) -> list[str]:
    rows = []
    for heads in ("32:4", "32:8"):
        for block in (16, 64):
            cells = []
            for context, goal in DECODE_SHARES.items():
                share = _get(figures, f"{heads}/{block}/{context}", "share")
                cells.append(_goal(share, goal if block == _DECODE_BLOCK else None, "{:.0%}"))
            rows.append([heads, f"{block}", *cells])
    read = _number(_get(figures, "read_gb_per_s", "best"), "{:.0f} GB/s")
    head = ["query : KV heads", "blocks of", *(f"{context}" for context in DECODE_SHARES)]
    return [
        f"## Decode: 64 sequences, heads of 128, share of the read bandwidth ({read})",
        "",
        *_table(head, rows),
    ]


def _generate(figures: Record) -> list[str]:
    rows = []
    for shape in _SHAPES:
        batch_1 = f"{shape}/batch 1"
        ms = _get(figures, batch_1, "ms_per_token")
        static = _get(figures, f"{shape}/transformers static cache", "ms_per_token")
        warm = _get(figures, f"{shape}/warm start", "total_s")
        rows.append(
            [
                shape,
                _goal(ms, BATCH_1_MS.get(shape), "{:.2f}", least=False),
                _number(_get(figures, batch_1, "share_of_floor"), "{:.0%}"),
                _number(_get(figures, batch_1, "host_ms_per_step"), "{:.2f}"),
                _number(static, "{:.2f}"),
                _number(_get(figures, f"{shape}/cold start", "total_s"), "{:.1f}"),
                _goal(warm, WARM_START_S, "{:.1f}", least=False),
            ]
        )
    head = ["model", "batch 1, ms per token", "of the floor", "host ms per step",
            "static cache + compile, ms", "cold start, s", "warm start, s"]  # fmt: skip
    small = _SHAPES[0]
    rounds = [
        rate
        for number in (1, 2, 3)
        if (rate := _get(figures, f"{small}/mixed, {number}", "tokens_per_s")) is not None
    ]
    ours = sorted(rounds)[len(rounds) // 2] if rounds else None
    first = _get(figures, f"{small}/mixed, first time", "tokens_per_s")
    alone = _get(figures, f"{small}/transformers one by one", "tokens_per_s")
    batch = _get(figures, f"{small}/transformers generate_batch", "tokens_per_s")
    graphs = figures.get(f"{small}/graphs")
    return [
        "## Whole models, random weights, bf16",
        "",
        *_table(head, rows),
        "",
        f"256 mixed requests of {small}: {_number(ours, '{:.0f} tokens/s')} "
        f"(first time {_number(first, '{:.0f}')}); "
        f"transformers one by one (8 of them) {_number(alone, '{:.0f}')}: "
        f"{_goal(_ratio(ours, alone), TIMES_ONE_BY_ONE, '{:.1f}x')}; "
        f"its generate_batch (64 of them) {_number(batch, '{:.0f}')}: "
        f"{_goal(_ratio(ours, batch), TIMES_GENERATE_BATCH, '{:.1f}x')}.",
        f"Captured decode steps: {graphs['captured'] if graphs else NOT_MEASURED}"
        + (f" ({graphs['refusal']})." if graphs and graphs["refusal"] else "."),
    ]


def _missing(records: Mapping[str, Record]) -> list[str]:
    lines = [
        f"- {name}: {what}: {why}"
        for name, record in records.items()
        for what, why in record.get("missing", {}).items()
    ]
    return ["## Not measured, and why", "", *(lines or ["Nothing is missing."])]


def _get(figures: Record, name: str, field: str) -> float | None:
    found = figures.get(name)
    return None if found is None else found.get(field)


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def _number(value: float | None, how: str) -> str:
    return NOT_MEASURED if value is None else how.format(value)


def _goal(value: float | None, goal: float | None, how: str = "{:.2f}", least: bool = True) -> str:
    """A figure and its goal, in words if it is missed; least: it must be at least the goal."""
    if goal is None:
        return _number(value, how)
    wanted = f"goal {'≥' if least else '≤'} {how.format(goal)}"
    if value is None:
        return f"{NOT_MEASURED} ({wanted})"
    reached = value >= goal if least else value <= goal
    return f"{how.format(value)} ({wanted}{'' if reached else ', **missed**'})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
