"""fastgen.load: a folder that fastgen.export wrote, ready to generate."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError
from .manifest import CheckedFolder, Progress

if TYPE_CHECKING:
    from ..config import Config
    from .loaded import LoadedModel


def load(
    path: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> LoadedModel:
    """Load an exported model: without transformers' code for it, without tracing or compiling.

    A folder is a program: load none that you would not run. Its files are compared with the hashes
    in its manifest, which tells that they are as they were written, and not by whom.

    Args:
        path: What `fastgen.export` wrote.
        weights: Others in the place of the folder's: a safetensors file, or a folder of them with
            an index, with the same names, shapes and dtypes. They are compared with no hash.
        config: A Config; **fields change single fields of it. What the graph depends on
            (deterministic, pack, passes_off) stays as it was when the model was exported.
        progress: Told what is being done, and how much of how much.
    Raises: ArtifactError for a folder that is damaged, changed, or for another machine, device or
        version, and where memory is too little. ValueError or TypeError for a bad field.
    """
    start = time.perf_counter()
    given = None if weights is None else Path(weights)
    checked = CheckedFolder(Path(path), skips_weights=given is not None)
    listed = time.perf_counter()
    try:
        # While files are compared, on other threads, torch and the engine are imported.
        from .assemble import assemble

        imported = time.perf_counter()
        seconds = {"folder listed": listed - start, "imports": imported - listed}
        return assemble(checked, given, config, fields, progress or _say_nothing, seconds)
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    finally:
        checked.cancel()


def _say_nothing(what: str, done: int, total: int) -> None:
    pass
