"""insert_paged_cache: `fastgen::attention` -> `fastgen::paged_attention`.

`fastgen::latent_attention` becomes `fastgen::paged_latent_attention` in the same way.

The cache tensors of each layer and the batch metadata become inputs of the graph; what the cache
must look like is read from the keys and values that the graph computes, and emitted as the
`CacheSpec`. An attention over the very keys and values of an earlier one, that sees as far, reads
that one's cache and stores nothing. Required: every attention has its own layer index. Numerics:
bit-equal attention over the same keys. The op mutates the cache inputs themselves: mutating a view
of them would make a compiler clone the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from .graph import CapturedGraph, InputSpec, fake_mode_of
from .report import PassReport

# Batch tensors that the paged op reads, with the example shapes that their fakes are made from.
_METADATA = {
    "slot_mapping": ((8,), torch.int64),
    "block_table": ((3, 5), torch.int32),
    "query_start_loc": ((4,), torch.int32),
    "seq_lens": ((3,), torch.int32),
}
_EXAMPLE_BLOCKS, _EXAMPLE_BLOCK_SIZE = 11, 16

_ATTENTION = torch.ops.fastgen.attention.default
_LATENT = torch.ops.fastgen.latent_attention.default
_PAGED = torch.ops.fastgen.paged_attention.default
_PAGED_LATENT = torch.ops.fastgen.paged_latent_attention.default


@dataclass(frozen=True)
class LayerCache:
    """What one attention layer keeps per token.

    kind: "kv", keys and values; "latent", what they are made from: one vector of `head_dim` and a
    rotated one of `v_head_dim` for all heads (later recurrent, conv). window: keys a query sees, 0
    for all. layout names how a block's slots lie in memory; "canonical" is
    [num_kv_heads, block_size, head_dim]. chunk: tokens that see none before them, 0 for no chunks.
    alibi: whether scores depend on distance.
    """

    kind: str
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    window: int
    layout: str = "canonical"
    chunk: int = 0
    alibi: bool = False

    def counts_places(self, length: int) -> bool:
        """Whether what a query of so long a sequence sees depends on how many tokens lie between
        it and a key: no window or chunk that is as long hides any.
        """
        return self.alibi or 0 < self.window < length or 0 < self.chunk < length

    @property
    def tensors(self) -> dict[str, int]:
        """What its cache tensors are called, and how wide a head is in each."""
        if self.kind == "latent":  # side by side: the keys of one head, whose values they are, too
            return {"latent": self.head_dim + self.v_head_dim}
        return {"key": self.head_dim, "value": self.v_head_dim}

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * sum(self.tensors.values()) * self.dtype.itemsize


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache a graph needs.

    layers: One entry per attention layer that stores, in the order of the graph's inputs. entries:
    for each attention layer of the model, in their order, the entry that it reads.
    """

    layers: tuple[LayerCache, ...]
    entries: tuple[int, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def shared_bytes_per_token(self) -> int:
        """What more it would take if every layer kept keys and values of its own."""
        return sum(self.layers[entry].bytes_per_token for entry in self.entries) - (
            self.bytes_per_token if self.entries else 0
        )


def insert_paged_cache(captured: CapturedGraph) -> PassReport:
    report = PassReport("insert_paged_cache")
    attentions = [node for node in captured.graph.nodes if node.target in (_ATTENTION, _LATENT)]
    if not attentions:
        return report
    for node in attentions:
        if node.target is _ATTENTION and node.args[3] is not None:
            raise ValueError(
                f"{node.name} has a mask ({node.args[3]}), which no paged op can carry"
            )
    fake_mode = fake_mode_of(captured.placeholders())
    device = attentions[0].meta["val"].device

    def fake(shape: tuple[int, ...], dtype: torch.dtype, dynamic: tuple[int, ...]) -> Any:
        sizes = [
            DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(len(shape))
        ]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        example = torch.empty(shape, dtype=dtype, device="meta")
        value = fake_mode.from_tensor(example, symbolic_context=context, static_shapes=False)
        with fake_mode:
            return value.new_empty(value.shape, device=device)

    metadata = [
        captured.add_input(name, InputSpec("batch", name), fake(shape, dtype, (0, 1)))
        for name, (shape, dtype) in _METADATA.items()
    ]
    caches = _add_caches(captured, attentions, fake)
    stored: set[tuple[fx.Node, ...]] = set()
    slots, *others = metadata
    for node, cache in zip(attentions, caches, strict=True):
        latent = node.target is _LATENT
        own_slots = None if cache in stored else slots
        stored.add(cache)
        # Of latents the fourth is their weight; of others a mask, which is None.
        first, settings = (
            (node.args[:4], node.args[4:6])
            if latent
            else (node.args[:3], (*node.args[4:8], *node.args[9:]))
        )
        with captured.graph.inserting_before(node):
            paged = captured.graph.call_function(
                _PAGED_LATENT if latent else _PAGED,
                (*first, *cache, own_slots, *others, *settings),
                dict(node.kwargs),
            )
        paged.meta = dict(node.meta)
        node.replace_all_uses_with(paged)
        captured.graph.erase_node(node)
        report.matches += 1
    return report


def _add_caches(
    captured: CapturedGraph, attentions: list[fx.Node], fake
) -> list[tuple[fx.Node, ...]]:
    """The cache inputs of each attention, in graph order.

    Attentions over the same keys and values have the same, if they see as far.
    """
    layers = [_arguments(node)["layer_idx"] for node in attentions]
    if len(set(layers)) < len(layers):
        raise ValueError(f"each layer may have one attention, got layers {layers}")
    made: dict[Any, tuple[fx.Node, ...]] = {}
    caches = []
    for node in attentions:
        layer = _layer_cache(node)
        kept = node if node.target is _LATENT else (*node.args[1:3], layer)
        if kept not in made:
            made[kept] = _add_cache(captured, len(made), layer, fake)
        caches.append(made[kept])
    return caches


def _add_cache(captured: CapturedGraph, index: int, layer: LayerCache, fake) -> tuple[fx.Node, ...]:
    inputs = []
    for role, width in layer.tensors.items():
        shape = (_EXAMPLE_BLOCKS, layer.num_kv_heads, _EXAMPLE_BLOCK_SIZE, width)
        value = fake(shape, layer.dtype, (0, 2))
        spec = InputSpec("cache", f"{role}:{index}")
        inputs.append(captured.add_input(f"{role}_cache_{index}", spec, value))
    return tuple(inputs)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What an op is given, by name; not what is left to its defaults."""
    names = [argument.name for argument in node.target._schema.arguments]  # pyright: ignore
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _layer_cache(node: fx.Node) -> LayerCache:
    """What an attention's layer keeps, read from the keys and values it is given."""
    latent = node.target in (_LATENT, _PAGED_LATENT)
    key, value = node.args[1].meta["val"], node.args[2].meta["val"]  # pyright: ignore
    given = _arguments(node)
    return LayerCache(
        kind="latent" if latent else "kv",
        num_kv_heads=1 if latent else int(key.shape[1]),
        head_dim=int(key.shape[-1]),
        v_head_dim=int(value.shape[-1]),
        dtype=key.dtype,
        window=given["window"],
        chunk=given.get("chunk", 0),
        alibi=given.get("alibi_slopes") is not None,
    )


def cache_spec(captured: CapturedGraph) -> CacheSpec:
    """The spec of a graph with a paged cache, read from its attention nodes in graph order."""
    layers: dict[fx.Node, LayerCache] = {}
    readers: list[fx.Node] = []
    for node in captured.graph.nodes:
        if node.target in (_PAGED, _PAGED_LATENT):
            given = _arguments(node)
            cache = given["cache" if node.target is _PAGED_LATENT else "key_cache"]
            layers.setdefault(cache, _layer_cache(node))
            readers.append(cache)
    numbers = {cache: index for index, cache in enumerate(layers)}
    return CacheSpec(tuple(layers.values()), tuple(numbers[cache] for cache in readers))
