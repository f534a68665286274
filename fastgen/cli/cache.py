"""fastgen cache: what is kept on disk between starts.

`show` lists it, `clear` removes the graphs (they are traced again) and the compiled kernels (they
are compiled again).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import graph_cache
from ..kernels.cpu.build import MissingLibraryError, cache_dir


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "cache", help="show or clear what is kept on disk", description=__doc__
    )
    parser.add_argument("action", choices=("show", "clear"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises: OSError if the cache folder cannot be used."""
    graphs, kernels = graph_cache.entries(), _kernels()
    if arguments.action == "clear":
        for path in (*graphs, *kernels):
            path.unlink(missing_ok=True)
        print(f"removed {len(graphs)} graphs and {len(kernels)} compiled kernel libraries")
        return 0
    print(f"{graph_cache.folder().parent}")
    for name, paths in (("graphs", graphs), ("compiled kernel libraries", kernels)):
        size = sum(path.stat().st_size for path in paths)
        print(f"  {len(paths)} {name}, {size / 2**20:.1f} MiB")
    return 0


def _kernels() -> list[Path]:
    try:
        return sorted(cache_dir().glob("kernels-*.so"))
    except MissingLibraryError as error:
        raise OSError(str(error)) from error
