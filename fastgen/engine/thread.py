"""The engine's thread: steps while there is work, none that outlives the engine, none in a fork."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .mailbox import Mailbox
from .threads import release_openmp_team
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .engine import EngineCore

logger = logging.getLogger("fastgen")

_engines: weakref.WeakSet[EngineCore] = weakref.WeakSet()


def start(engine: EngineCore, mailbox: Mailbox, watchdog: Watchdog) -> weakref.finalize:
    """Start the thread of an engine; what is returned ends it, as does the engine's own end."""
    thread = threading.Thread(
        target=_run, args=(weakref.ref(engine), mailbox), name="fastgen-engine", daemon=True
    )
    mailbox.thread = thread
    closer = weakref.finalize(engine, _end, mailbox, watchdog)
    _engines.add(engine)
    thread.start()
    return closer


def _end(mailbox: Mailbox, watchdog: Watchdog) -> None:
    watchdog.close()
    mailbox.close()


def _run(reference: Callable[[], Any], mailbox: Mailbox) -> None:
    """Works while there is work, waits without holding the engine."""
    timeout = None
    while mailbox.wait(release_openmp_team, timeout):
        engine: EngineCore | None = reference()
        if engine is None:
            return
        try:
            goes_on = True
            while goes_on and not mailbox.closed:
                with engine.watchdog.watching("a step of the engine"):
                    goes_on = engine.step()
            timeout = engine.seconds_to_deadline()
        except BaseException as error:
            logger.exception("the engine stopped")
            mailbox.close(join=False)
            while (message := mailbox.take()) is not None:  # who waits for an answer gets one
                with contextlib.suppress(BaseException):
                    message()
            engine.abandon(error)
            return
        del engine


def _after_fork_in_child() -> None:
    """The threads are not here, and what they held stays held: nothing may wait for it."""
    for engine in list(_engines):
        engine.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
