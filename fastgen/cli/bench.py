"""fastgen bench: tokens per second against transformers on the same work, in one run.

No speed without parity: the run begins with a comparison of fp32 tokens and of first-step logits,
and stops if they differ. Engines then take turns, round by round; the table shows medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..bench import from_disk, peers, startup
from ..bench.engines import DETERMINISTIC, Measurement, engines_for, measure
from ..bench.fresh import run_fresh
from ..bench.machine import measure_machine
from ..bench.parity import check_parity
from ..bench.plot import plot_bars
from ..bench.profile import profile_workload
from ..bench.workloads import WORKLOADS, Workload, block_waste, make_workload
from .models import DTYPES, SHAPES, load_model, random_model
from .profile_table import plot_profile, show_profile
from .simulation import add_options, check_options, plot_simulation, run_simulation, show_simulation


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench", help="measure against transformers, with a parity gate", description=__doc__
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=SHAPES, help="a known shape with random weights")
    source.add_argument("--model", metavar="DIR", type=Path, help="a model folder, or 'demo'")
    source.add_argument(
        "--simulate", action="store_true", help="no model: the scheduler in virtual time"
    )
    parser.add_argument(
        "--workload",
        choices=(*WORKLOADS, "startup"),
        default="mixed",
        help="; ".join(f"{name}: {make.__doc__}" for name, make in WORKLOADS.items())
        + "; startup: a model in memory to its first token, in fresh processes",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3, medians are shown")
    parser.add_argument("--block-size", type=int, default=16, help="16, 32 or 64; default: 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="measure fastgen with deterministic=True beside fastgen",
    )
    parser.add_argument("--no-peers", action="store_true", help="measure fastgen alone")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument(
        "--peer",
        metavar="NAME=PYTHON",
        action="append",
        default=[],
        help=f"another engine and the python it is installed for: {', '.join(peers.DRIVERS)}",
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="for the workload startup: also from a checkpoint, and from an export of it",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="show where the time of fastgen's steps goes instead; without parity gate and peers",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON to a file too")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw bars (needs matplotlib), e.g. bench.png"
    )
    add_options(parser)
    parser.add_argument("--child", choices=("parity", *startup.ENGINES), help=argparse.SUPPRESS)
    parser.set_defaults(run=run, default_of=parser.get_default)


def run(arguments: argparse.Namespace) -> int:
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    check_options(arguments)
    if arguments.simulate:
        give(arguments, run_simulation(arguments), show_simulation, plot_simulation)
        return 0
    if arguments.profile:
        return run_profile(arguments)
    if arguments.child is not None:
        print(json.dumps(run_child(arguments)))
        return 0
    if arguments.peer and torch.device(arguments.device).type != "cpu":
        raise ValueError(f"--peer measures on the CPU, got --device {arguments.device}")
    if arguments.workload == "startup":
        give(arguments, run_startup(arguments), show_startup, plot)
    else:
        give(arguments, run_workload(arguments), show, plot)
    return 0


def give(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    show_it: Callable[[dict[str, Any]], None],
    plot_it: Callable[[dict[str, Any], Path], None],
) -> None:
    """Print a result, and write and draw it where that is asked for."""
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show_it(result)
    if arguments.plot is not None:
        plot_it(result, arguments.plot)
        print(f"drawn in {arguments.plot}", file=sys.stderr)


def make_model(arguments: argparse.Namespace) -> Any:
    if arguments.shape:
        model = random_model(arguments.shape, arguments.dtype, arguments.device, arguments.seed)
    else:
        model, _ = load_model(arguments.model, arguments.dtype, arguments.device)
    model.generation_config.eos_token_id = None  # every request runs to its length
    model.generation_config.pad_token_id = 0
    return model


def workload_for(model: Any, arguments: argparse.Namespace) -> Workload:
    limit = model.config.max_position_embeddings
    return make_workload(arguments.workload, model.config.vocab_size, limit, arguments.seed)


def run_child(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process of bench does for the one that started it."""
    model = make_model(arguments)
    if arguments.child == "parity":
        return check_parity(model, workload_for(model, arguments).requests).to_dict()
    return asdict(startup.measure_here(arguments.child, model))


def child_arguments(arguments: argparse.Namespace) -> list[str]:
    given = ["--dtype", arguments.dtype, "--device", arguments.device]
    given += ["--shape", arguments.shape] if arguments.shape else ["--model", str(arguments.model)]
    given += ["--threads", str(torch.get_num_threads()), "--seed", str(arguments.seed)]
    return given


def chosen_peers(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    return [] if arguments.no_peers else [peers.parse_peer(text) for text in arguments.peer]


def run_workload(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = chosen_peers(arguments)
    gate = [*child_arguments(arguments), "--workload", arguments.workload, "--child", "parity"]
    parity = run_fresh("the parity check", gate)  # its models must not count as an engine's memory
    model = make_model(arguments)
    workload = workload_for(model, arguments)
    result: dict[str, Any] = {
        "setting": setting(arguments, workload),
        "parity": parity,
        "machine": measure_machine(model.device, model.dtype),
    }
    if not parity["passed"]:
        print(json.dumps(result, indent=2))
        raise ValueError("the parity gate failed: tokens or logits differ from transformers'")
    transformers = not (arguments.no_peers or arguments.no_transformers)
    engines = engines_for(
        model, workload, arguments.block_size, transformers, arguments.deterministic
    )
    threads = torch.get_num_threads()
    with peers.loaded(chosen, model, arguments.dtype, workload, threads) as loaded:
        turns = [functools.partial(peer.turn, workload) for peer in loaded]
        result["engines"] = summarize(measure(engines, arguments.rounds, turns))
    result["peers"] = peers.reports(loaded, model, workload)
    result["shares"] = shares(model, result)
    result["waste"] = block_waste(workload) if arguments.workload == "mixed" else {}
    return result


def run_profile(arguments: argparse.Namespace) -> int:
    if arguments.workload == "startup":
        raise ValueError("--profile needs a workload of requests, got startup")
    model = make_model(arguments)
    limit = model.config.max_position_embeddings
    workload = make_workload(arguments.workload, model.config.vocab_size, limit, arguments.seed)
    where = setting(arguments, workload)
    profile = profile_workload(model, workload, arguments.block_size, arguments.rounds)
    result = {"setting": where, **profile}
    heading = f"{describe(where)}\n{versions(where)}"
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show_profile(result, heading)
    if arguments.plot is not None:
        plot_profile(result, heading, arguments.plot)
        print(f"drawn in {arguments.plot}", file=sys.stderr)
    return 0


def run_startup(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each engine in fresh processes, in turn; medians."""
    chosen, given = chosen_peers(arguments), child_arguments(arguments)
    alone = arguments.no_peers or arguments.no_transformers
    names = startup.ENGINES[:1] if alone else startup.ENGINES
    rounds = [startup.measure_fresh(name, given) for _ in range(arguments.rounds) for name in names]
    others, reports = [], []
    if chosen:
        with peers.saved(make_model(arguments)) as path:
            others, reports = peers.measure_startup(
                chosen, path, arguments.dtype, torch.get_num_threads(), arguments.rounds
            )
    rows, rounds = [], rounds + others + _from_disk(arguments)
    for name in dict.fromkeys(item.engine for item in rounds):
        items = sorted((item for item in rounds if item.engine == name), key=lambda i: i.total_s)
        middle = items[len(items) // 2]
        all_s = [item.total_s for item in items]
        rows.append({**asdict(middle), "total_s": middle.total_s, "all_total_s": all_s})
    return {"setting": setting(arguments, None), "engines": rows, "peers": reports}


def _from_disk(arguments: argparse.Namespace) -> list[startup.Startup]:
    """Starts that begin with files, if they are asked for: each kind in turn."""
    if not arguments.from_disk:
        return []
    with from_disk.folders(make_model(arguments)) as folders:
        where = (*folders, arguments.dtype, torch.get_num_threads())
        from_disk.measure(from_disk.WARM, *where)  # caches the graph
        return [
            from_disk.measure(what, *where)
            for _ in range(arguments.rounds)
            for what in from_disk.STARTS
        ]


def setting(arguments: argparse.Namespace, workload: Workload | None) -> dict[str, Any]:
    import transformers

    counts = {}
    if workload is not None:
        counts = {
            "requests": len(workload.requests),
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
        }
    return {
        "model": arguments.shape or str(arguments.model),
        "workload": arguments.workload,
        **counts,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "fastgen": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def summarize(rounds: list[Measurement]) -> list[dict[str, Any]]:
    """Medians per engine, and each one's time per token over fastgen's."""
    rows = []
    for name in dict.fromkeys(item.engine for item in rounds):
        items = [item for item in rounds if item.engine == name]
        rows.append(
            {
                **asdict(sorted(items, key=lambda item: item.seconds)[len(items) // 2]),
                "tokens_per_s": statistics.median(item.tokens_per_s for item in items),
                "all_tokens_per_s": [item.tokens_per_s for item in items],
            }
        )
    for row in rows:
        row["fastgen_is_faster_by"] = rows[0]["tokens_per_s"] / row["tokens_per_s"]
    return rows


def cost_of_determinism(rows: list[dict[str, Any]]) -> str | None:
    """What deterministic=True costs, if it was measured."""
    for row in rows:
        if row["engine"] == DETERMINISTIC:
            cost = row["fastgen_is_faster_by"] - 1
            return f"deterministic=True takes {cost:.1%} more time per token"
    return None


def shares(model: Any, result: dict[str, Any]) -> dict[str, float]:
    """What share of the machine fastgen's run used: weights read per second, FLOP/s of linears."""
    fastgen, machine = result["engines"][0], result["machine"]
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = list(model.parameters())
    read = sum(weight.nbytes for weight in weights) - (0 if tied else embedding.nbytes)
    head = model.get_output_embeddings().weight.numel()
    body = sum(weight.numel() for weight in weights if weight.dim() == 2)
    body -= head + (0 if tied else embedding.numel())
    flops = 2 * (body * fastgen["computed_tokens"] + head * fastgen["output_tokens"])
    seconds = fastgen["seconds"]
    return {
        "read_bandwidth": read * fastgen["steps"] / seconds / 1e9 / machine["read_gb_per_s"],
        "gemm_rate": flops / seconds / 1e12 / machine["gemm_tflop_per_s"],
    }


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    where, parity, machine = result["setting"], result["parity"], result["machine"]
    console = Console()
    console.print(
        f"{describe(where)}: {where['requests']} requests, {where['prompt_tokens']} "
        f"prompt and {where['output_tokens']} output tokens; {versions(where)}"
    )
    console.print(
        f"parity: passed; fp32 tokens equal on {parity['fp32_requests']} requests "
        f"({parity['fp32_tokens']} tokens, {parity['chunked_requests']} chunked); first-step "
        f"logits off by {parity['logits_error']:.2e}, transformers' own by "
        f"{parity['transformers_logits_error']:.2e}; equal tokens in {where['dtype']}: "
        f"{parity['equal_token_share']:.0%}"
    )
    table = Table()
    for name in ("engine", "tokens/s", "fastgen is", "TTFT ms", "TPOT ms", "peak MiB"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in result["engines"]:
        each = row["all_ttft_ms"] or ([] if row["ttft_ms"] is None else [row["ttft_ms"]])
        table.add_row(
            row["engine"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['fastgen_is_faster_by']:.2f}x",
            " / ".join(f"{ms:.0f}" for ms in each),
            "" if row["tpot_ms"] is None else f"{row['tpot_ms']:.1f}",
            mebibytes(row["peak_rss_bytes"]),
        )
    for peer in result["peers"]:
        if peer["failure"] is not None:
            table.add_row(peer["name"], "failed")
    console.print(table)
    for peer in result["peers"]:
        console.print(peers.describe(peer))
    if (cost := cost_of_determinism(result["engines"])) is not None:
        console.print(cost)
    share = result["shares"]
    console.print(
        f"machine: reads {machine['read_gb_per_s']:.1f} GB/s, GEMM "
        f"{machine['gemm_tflop_per_s']:.2f} TFLOP/s; fastgen read weights at "
        f"{share['read_bandwidth']:.0%} and computed at {share['gemm_rate']:.0%} of that; "
        f"{result['engines'][0]['prefix_hit_rate']:.0%} of the tokens let in were cached"
    )
    if result["waste"]:
        by_size = ", ".join(f"{size}: {part:.1%}" for size, part in result["waste"].items())
        console.print(f"cache waste by block size: {by_size}")


def show_startup(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{describe(result['setting'])}; {versions(result['setting'])}")
    table = Table()
    for name in (
        "engine",
        "load s",
        "prepare s",
        "first token s",
        "together",
        "next s",
        "peak MiB",
    ):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in result["engines"]:
        times = [
            row[f"{name}_s"] for name in ("load", "prepare", "first_token", "total", "second_token")
        ]
        cells = [f"{seconds:.2f}" for seconds in times]
        table.add_row(row["engine"], *cells, mebibytes(row["peak_rss_bytes"]))
    for peer in result["peers"]:
        if peer["failure"] is not None:
            table.add_row(peer["name"], "failed")
    console.print(table)
    for peer in result["peers"]:
        console.print(peers.describe(peer))


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of what the workload is about: tokens/s, time to the first token, or start-up."""
    workload, rows = result["setting"]["workload"], result["engines"]
    title = f"{describe(result['setting'])}\n{versions(result['setting'])}"
    match workload:
        case "startup":
            unit, bars = "seconds to the first token", [(r["engine"], r["total_s"]) for r in rows]
        case "prefill":
            unit = f"milliseconds to the first token (mean of {result['setting']['requests']})"
            bars = [(row["engine"], row["ttft_ms"]) for row in rows]
        case _:
            unit, bars = "output tokens/s", [(r["engine"], r["tokens_per_s"]) for r in rows]
    plot_bars(title, unit, bars, path)


def describe(where: dict[str, Any]) -> str:
    return (
        f"{where['model']}, {where['dtype']}, {where['device']} ({where['threads']} threads), "
        f"workload {where['workload']}"
    )


def versions(where: dict[str, Any]) -> str:
    return (
        f"fastgen {where['fastgen']}, torch {where['torch']}, transformers {where['transformers']}"
    )


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"
