"""Triton's kernels run in Python where TRITON_INTERPRET=1 was set before Triton was imported.

A process either interprets or compiles them. So the tests in kernels/ of an implementation called
"triton" are run by a process of their own, which runs no others (test_triton.py).
"""

from pathlib import Path

import pytest
import torch
from fastgen.kernels.gpu import INTERPRETED

_FOLDER = Path(__file__).parent / "kernels"

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def _convert(input, input_dtype, output_dtype, rounding_mode):
        """The interpreter cuts fp32 off where a GPU rounds to the nearest bf16."""
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return _convert_float(input, input_dtype, output_dtype, rounding_mode)
        rounded = torch.from_numpy(input.copy()).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()

    interpreter._convert_float = _convert


def _is_of_triton(item: pytest.Item) -> bool:
    params = getattr(item, "callspec", None)
    return params is not None and params.params.get("name") == "triton"


def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        here = _FOLDER in item.path.parents
        (kept if not here or _is_of_triton(item) == INTERPRETED else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept
