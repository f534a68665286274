"""The options, tables and picture of `fastgen bench --simulate`."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from .. import __version__
from ..bench.plot import Panel, plot_panels
from ..bench.simulate import RATES, SIZES, Setting, simulate
from ..bench.simulation.engine import Limits
from ..bench.simulation.load import Goal
from ..bench.simulation.step_cost import COSTS, parse_cost

_TITLES = {
    "running": "running requests",
    "short": "... short of blocks",
    "waiting": "waiting requests",
    "finished": "finished requests",
    "pool": "blocks in the pool",
}
_OF_SIMULATIONS = (
    "requests",
    "rate",
    "step_cost",
    "blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "ttft_ms",
    "tpot_ms",
    "no_growth",
)
_OF_MODELS = (
    "workload",
    "dtype",
    "device",
    "threads",
    "rounds",
    "no_peers",
    "no_transformers",
    "peer",
    "profile",
    "child",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The number of requests, the limits and the rest; the seed and block size are bench's own."""
    group = parser.add_argument_group(
        "simulation", "the real scheduler, a bursty trace, and a model of what steps cost"
    )
    default, limits, goal = Setting(), Limits(), Goal()
    group.add_argument(
        "--requests",
        type=int,
        default=default.num_requests,
        help=f"at each rate, up to millions; default: {default.num_requests}",
    )
    group.add_argument(
        "--rate",
        nargs="+",
        default=list(RATES),
        help="requests per second, or per cent of what can be served; "
        f"default: {' '.join(RATES).replace('%', '%%')}",
    )
    group.add_argument(
        "--step-cost",
        metavar="COST",
        default="cpu-0.5b",
        help=f"{', '.join(COSTS)}, or seconds FIXED,TOKEN,READ: of any step, per computed token, "
        "and per token read from the cache; default: cpu-0.5b",
    )
    for option, value, what in (
        ("--blocks", limits.num_blocks, "in the pool"),
        ("--max-num-seqs", limits.max_num_seqs, "sequences in one step"),
        ("--max-num-batched-tokens", limits.max_num_batched_tokens, "tokens in one step"),
        ("--max-model-len", limits.max_model_len, "longest prompt and output"),
    ):
        group.add_argument(option, type=int, default=value, help=f"{what}; default: {value}")
    for option, value, what in (
        ("--ttft-ms", goal.ttft_ms, "latest first token of a good request"),
        ("--tpot-ms", goal.tpot_ms, "its longest time per further token, on the average"),
    ):
        group.add_argument(option, type=float, default=value, help=f"{what}; default: {value:g}")
    group.add_argument(
        "--no-growth", action="store_true", help="do not measure how the scheduler's time grows"
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Raises: ValueError if an option is given that would have no effect."""
    unused = _OF_MODELS if arguments.simulate else _OF_SIMULATIONS
    for name in unused:
        if getattr(arguments, name) != arguments.default_of(name):
            whom = "models" if arguments.simulate else "--simulate"
            raise ValueError(f"--{name.replace('_', '-')} is for {whom} only; leave it out")


def run_simulation(arguments: argparse.Namespace) -> dict[str, Any]:
    limits = Limits(
        num_blocks=arguments.blocks,
        block_size=arguments.block_size,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_model_len=arguments.max_model_len,
    )
    result = simulate(
        Setting(
            arguments.requests,
            arguments.rate,
            limits,
            parse_cost(arguments.step_cost),
            Goal(arguments.ttft_ms, arguments.tpot_ms),
            arguments.seed,
            {} if arguments.no_growth else SIZES,
        )
    )
    versions = {"fastgen": __version__, "python": platform.python_version()}
    return {**result, "setting": {**result["setting"], **versions}}


def show_simulation(result: dict[str, Any]) -> None:
    """What requests see, what the scheduler takes, how that grows, and the longest run's parts."""
    from rich.console import Console

    console = Console()
    where = result["setting"]
    cost, goal = where["cost"], where["goal"]
    console.print(f"{_describe(where)}\n{_versions(where)}")
    console.print(
        f"a step: {cost['fixed_s'] * 1e3:.3g} ms, {cost['per_token_s'] * 1e6:.3g} us per token, "
        f"{cost['per_read_s'] * 1e9:.3g} ns per token read ({cost['source']})"
    )
    console.print(
        f"{result['capacity_per_s']:.2f} requests/s can be served; a good one has its first token "
        f"in {goal['ttft_ms']:g} ms and each further one in {goal['tpot_ms']:g} ms"
    )
    for table in (_requests_table, _scheduler_table, _host_table):
        console.print(table(result["loads"]))
    console.print(_describe_parts(result["loads"][-1]))
    if result["growth"]:
        console.print(_growth_table(result["growth"]))


def _requests_table(loads: list[dict[str, Any]]) -> Any:
    table = _table("virtual time, p50 / p99 of the requests; load: part of what can be served")
    for name in ("load", "arrive/s", "good/s", "queue s", "TTFT s", "TPOT ms"):
        table.add_column(name, justify="right")
    for row in loads:
        table.add_row(
            f"{row['load']:.0%}",
            f"{row['arrived_per_s']:.2f}",
            f"{row['goodput_per_s']:.2f}",
            _spread(row["queue_time_ms"], 1e-3, 2),
            _spread(row["ttft_ms"], 1e-3, 2),
            _spread(row["tpot_ms"]),
        )
    return table


def _scheduler_table(loads: list[dict[str, Any]]) -> Any:
    table = _table("requests that run and wait; hits: of the prompts' tokens, in the prefix cache")
    for name in ("load", "steps", "run, mean", "most", "wait, most", "hits", "preempted"):
        table.add_column(name, justify="right")
    for row in loads:
        counts = (row["max_running"], row["max_waiting"])
        table.add_row(
            f"{row['load']:.0%}",
            str(row["steps"]),
            f"{row['mean_running']:.0f}",
            *map(str, counts),
            f"{row['prefix_hit_rate']:.0%}",
            str(row["preemptions"]),
        )
    return table


def _host_table(loads: list[dict[str, Any]]) -> Any:
    table = _table("CPU time of the scheduler, microseconds; share: of the virtual time")
    for name in ("load", "step", "p50 / p99", "longest", "request", "token", "share"):
        table.add_column(name, justify="right")
    for row in loads:
        table.add_row(
            f"{row['load']:.0%}",
            f"{row['host_us_per_step']:.0f}",
            _spread(row["host_step_us"]),
            f"{row['host_step_us']['largest']:.0f}",
            f"{row['host_us_per_request']:.0f}",
            f"{row['host_us_per_token']:.2f}",
            f"{row['host_share']:.2%}",
        )
    return table


def _growth_table(growth: list[dict[str, Any]]) -> Any:
    table = _table(
        "CPU time of the scheduler, microseconds\n"
        "power: of the size in it; 0 independent, 1 in proportion"
    )
    table.add_column("what grows")
    for name in ("size", "step", "request", "cancel"):
        table.add_column(name, justify="right")
    costs = ("step_us", "request_us", "cancel_us")
    for series in growth:
        for row in series["rows"]:
            cells = [f"{row[cost]:.0f}" if cost in row else "" for cost in costs]
            table.add_row(_TITLES[series["series"]], str(row["size"]), *cells)
        powers = [series["exponents"].get(cost) for cost in costs]
        cells = ["" if power is None else f"{power:.2f}" for power in powers]
        table.add_row("", "power", *cells, end_section=True)
    return table


def _describe_parts(row: dict[str, Any]) -> str:
    parts = row["parts"]
    host = " ".join(f"{part['host_us_per_request']:.0f}" for part in parts)
    peaks = [part["peak_rss_bytes"] for part in parts]
    text = f"the run at {row['load']:.0%} in {len(parts)} parts: {host} us per request"
    if None not in peaks:
        text += f"; peak MiB {' '.join(f'{peak / 2**20:.0f}' for peak in peaks)}"
    return text


def plot_simulation(result: dict[str, Any], path: Path) -> None:
    """Goodput and times against load, and the scheduler's time against the sizes."""
    loads = sorted(result["loads"], key=lambda row: row["arrived_per_s"])
    rates = [row["arrived_per_s"] for row in loads]

    def curve(name: str, part: str | None = None) -> list[tuple[float, float]]:
        values = [row[name] if part is None else row[name][part] for row in loads]
        return [(x, y) for x, y in zip(rates, values, strict=True) if y]

    panels = [
        Panel(
            "requests per second that arrive",
            "requests per second",
            {"good": curve("goodput_per_s")},
        ),
        Panel(
            "requests per second that arrive",
            "milliseconds of virtual time",
            {
                f"{title}, {part}": curve(name, part)
                for name, title in (("queue_time_ms", "queue"), ("ttft_ms", "TTFT"))
                for part in ("p50", "p99")
            }
            | {f"TPOT, {part}": curve("tpot_ms", part) for part in ("p50", "p99")},
            log_y=True,
        ),
    ]
    if result["growth"]:
        steps = {
            _TITLES[series["series"]]: [(row["size"], row["step_us"]) for row in series["rows"]]
            for series in result["growth"]
        }
        panels.append(Panel("how many", "microseconds of a step", steps, log_x=True, log_y=True))
    where = result["setting"]
    plot_panels(f"{_describe(where)}\n{where['cost']['source']}; {_versions(where)}", panels, path)


def _table(caption: str) -> Any:
    from rich.table import Table

    return Table(caption=caption)


def _spread(values: dict[str, float | None], factor: float = 1.0, digits: int = 0) -> str:
    chosen = (values["p50"], values["p99"])
    return " / ".join("-" if v is None else f"{v * factor:.{digits}f}" for v in chosen)


def _describe(where: dict[str, Any]) -> str:
    limits = where["limits"]
    return (
        f"simulation of {where['num_requests']} requests at each rate, seed {where['seed']}; "
        f"{limits['max_num_seqs']} sequences and {limits['max_num_batched_tokens']} tokens in a "
        f"step, {limits['num_blocks']} blocks of {limits['block_size']}"
    )


def _versions(where: dict[str, Any]) -> str:
    return f"fastgen {where['fastgen']}, Python {where['python']}"
