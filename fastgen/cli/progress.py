"""What is being done, on stderr, for commands that take more than a moment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from ..artifact.manifest import Progress


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Bars (needs rich), or a line for each thing that is done if stderr is no terminal."""
    if not sys.stderr.isatty():
        said: set[str] = set()

        def say(what: str, done: int, total: int) -> None:
            if what not in said:
                print(f"{what} ...", file=sys.stderr)
            said.add(what)

        yield say
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            for other, task in tasks.items():
                if other != what:  # what came before has ended
                    bars.update(task, total=1, completed=1)
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], total=total if done else None, completed=done)

        yield show
