"""fuse_rope_store: rope + paged_attention -> `rope_store_kv` + paged_attention without slots.

For GPUs, where it saves a launch per layer; on the CPU the attention kernel writes the pages on its
way. Required: query and key of the attention are the two results of one rope, the key has no other
readers than attentions that store nothing, and query and key have one head size. Numerics:
bit-equal.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from .graph import CapturedGraph
from .pattern import calls, value_of
from .report import PassReport

_ROPE = torch.ops.fastgen.rope.default
_ATTENTION = torch.ops.fastgen.paged_attention.default
_FUSED = torch.ops.fastgen.rope_store_kv.default


def fuse_rope_store(captured: CapturedGraph) -> PassReport:
    report = PassReport("fuse_rope_store")
    graph = captured.graph
    for attention in list(graph.nodes):
        if not calls(attention, _ATTENTION) or attention.args[5] is None:
            continue
        query, key, value, key_cache, value_cache, slot_mapping = attention.args[:6]
        if not _is_rotated(query) and not _is_rotated(key):
            continue
        rope, why = _rope_of(attention, query, key)
        if rope is None:
            report.refuse(attention.name, why)
            continue
        with graph.inserting_before(attention):
            pages = (key_cache, value_cache, slot_mapping)
            arguments = (*rope.args[:2], value, *rope.args[2:], *pages)
            fused = graph.call_function(_FUSED, arguments)  # pyright: ignore
            fused.meta = dict(rope.meta)
            parts = []
            for index, part in enumerate((query, key)):
                parts.append(graph.call_function(operator.getitem, (fused, index)))
                parts[-1].meta = dict(part.meta)  # pyright: ignore
        key.replace_all_uses_with(parts[1])  # pyright: ignore
        attention.args = (*parts, value, key_cache, value_cache, None, *attention.args[6:])
        report.matches += 1
    graph.eliminate_dead_code()
    return report


def _is_rotated(node: object) -> bool:
    return calls(node, operator.getitem) and calls(node.args[0], _ROPE)


def _stores_nothing(node: fx.Node) -> bool:
    return calls(node, _ATTENTION) and node.args[5] is None


def _rope_of(attention: fx.Node, query: object, key: object) -> tuple[fx.Node | None, str]:
    """The rope that makes both, or None and why they cannot be made where they are stored."""
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    rope = query.args[0]
    if not calls(rope, _ROPE) or (query.args, key.args) != ((rope, 0), (rope, 1)):
        return None, "query and key do not come from one rope"
    others = [user for user in key.users if user is not attention and not _stores_nothing(user)]
    if list(query.users) != [attention] or others:
        return None, "others read the rotated query or key, too"
    if value_of(query).shape[2] != value_of(key).shape[2]:
        return None, "query and key have several head sizes"
    return rope, ""
