"""A Hugging Face causal LM becomes one graph. The only folder that knows Hugging Face's names.

The model is called once, under torch.export, with flat packed tokens and no cache.

    capturing.py      all of it, step by step
    supported.py      what a model must be, before it is traced
    packed_forward.py the call that is traced        tracing.py  torch.export over any sizes
    attention.py      what transformers calls for attention and masks meanwhile
    own_attention.py  attention that a model writes itself, found in the graph and proven
    graph_checks.py, places.py, shared_keys.py       the graph, understood
    packing_check.py  the graph, compared with the model itself
"""

from .capturing import capture
from .packed_forward import PackedForward
from .supported import check_model, longest_sequence, takes_positions, why_not_longer

__all__ = [
    "PackedForward",
    "capture",
    "check_model",
    "longest_sequence",
    "takes_positions",
    "why_not_longer",
]
