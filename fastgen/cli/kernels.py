"""fastgen kernels: compile the Triton kernels for a GPU that need not be there.

Prints registers, spilled bytes and shared memory of each; exit code 1 if one does not compile,
spills or takes more than the card has.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "kernels", help="compile the Triton kernels for a GPU", description=__doc__
    )
    parser.add_argument("--target", default="sm_90", help="sm_80, sm_89, sm_90, ... (%(default)s)")
    parser.add_argument("--only", default="", help="only kernels whose name begins like this")
    parser.add_argument("--jobs", type=int, default=2, help="compile so many at once (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises: ValueError for an unknown target."""
    import triton

    from ..kernels.gpu.launch import KNOWN_CARDS
    from ..kernels.gpu.resources import launches

    card = KNOWN_CARDS.get(arguments.target)
    if card is None:
        raise ValueError(
            f"--target must be one of {', '.join(KNOWN_CARDS)}, got {arguments.target!r}"
        )
    names = [name for name, _ in launches(card) if name.startswith(arguments.only)]
    print(
        f"{arguments.target}, Triton {triton.__version__}; a block has at most "
        f"{card.shared_memory_bytes} bytes of shared memory"
    )
    print(f"{'kernel':<30}{'registers':>10}{'stack':>7}{'shared':>8}{'warps':>7}  tensor cores")
    failed = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        found_of = pool.map(_compile, [arguments.target] * len(names), names)
        for name, found in zip(names, found_of, strict=True):
            if isinstance(found, str):
                print(f"{name:<30}{found}")
                failed += 1
                continue
            print(
                f"{name:<30}{found.registers:>10}{found.stack_bytes:>7}{found.shared_bytes:>8}"
                f"{found.num_warps:>7}  {found.tensor_cores or '-'}"
            )
            failed += bool(found.stack_bytes or found.shared_bytes > card.shared_memory_bytes)
    if failed:
        print(f"{failed} kernels do not compile, spill registers or take too much shared memory")
    return 1 if failed else 0


def _compile(target: str, name: str) -> Any:
    """The kernel's Resources, or what went wrong."""
    from ..kernels.gpu.launch import KNOWN_CARDS
    from ..kernels.gpu.resources import launches, resources_of

    card = KNOWN_CARDS[target]
    try:
        return resources_of(name, dict(launches(card))[name], card)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
