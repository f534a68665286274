"""What a model will take and how fast it can be at best, before its weights are loaded.

The model is built on the meta device, captured and rewritten as `optimize` would do it, and the
plan is read from the graph: nothing is guessed from names in the configuration. See `Plan` for what
each number counts, and costs.py for the FLOPs and bytes of an op.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .capture import capture, check_model, longest_sequence, why_not_longer
from .config import Config, check_float, check_int
from .costs import (
    Cost,
    Sizes,
    Step,
    may_read_matrix,
    node_cost,
    op_name,
    peak_bytes,
    product_weight,
)
from .engine.kv_cache import block_bytes
from .errors import UnsupportedModelError
from .passes import CacheSpec, CapturedGraph, run_passes
from .passes.graph import fake_mode_of, memory_of
from .passes.insert_paged_cache import cache_spec
from .passes.pack_gated_linears import pack_gated_linears
from .passes.pack_linears import pack_linears, packed_bytes
from .passes.pipeline import RequiredPassError

_PACKING = ("pack_gated_linears", "pack_linears")


@dataclass(frozen=True)
class Device:
    """Limits of a device: memory read and FLOPs of products per second.

    itemsize: bytes of the numbers that tflop_per_s is for; None: any. packs: fastgen makes packed
    copies of weights there, as on a CPU.
    """

    name: str
    read_gb_per_s: float
    tflop_per_s: float
    itemsize: int | None = None
    packs: bool = False

    def __post_init__(self) -> None:
        check_float("read_gb_per_s", self.read_gb_per_s, 1e-3, 1e9)
        check_float("tflop_per_s", self.tflop_per_s, 1e-6, 1e9)


# From the vendor's data sheets: memory bandwidth, dense bf16 (of the SXM boards).
DEVICES = {
    "a100": Device("A100 80GB", 2039.0, 312.0, 2),
    "h100": Device("H100", 3350.0, 989.0, 2),
    "h200": Device("H200", 4800.0, 989.0, 2),
}


@dataclass(frozen=True)
class Weights:
    """Parameters and their memory.

    parameters: each counted once, however often it is used. matmul_parameters: in products, the
    tied head included. active_parameters: of those, what one token goes through; fewer where a
    router chooses experts. bytes_by_dtype: of parameters. buffer_bytes: of buffers.
    embedding_bytes: of the input embedding, which the head shares if tied. packed_bytes: second
    copies in the layout of the processor's GEMM.
    """

    parameters: int
    matmul_parameters: int
    active_parameters: int
    bytes_by_dtype: dict[str, int]
    buffer_bytes: int
    embedding_bytes: int
    tied_head: bool
    packed_bytes: int

    @property
    def parameter_bytes(self) -> int:
        return sum(self.bytes_by_dtype.values())

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.buffer_bytes + self.packed_bytes


@dataclass(frozen=True)
class KVCachePlan:
    """The paged KV cache.

    bytes_per_token: of all layers. sequence_bytes: of a sequence of max_model_len tokens, whole
    blocks; windowed_sequence_bytes: what its layers ever see of it (a layer with a window at most
    the window), which this cache does not make use of: its blocks hold all layers. The next are
    None without a memory budget: pool_bytes is what is left of it, and num_blocks, tokens and
    sequences of max_model_len are what fits there besides the null block (not more sequences than
    max_num_seqs).
    """

    bytes_per_token: int
    layers: list[dict[str, Any]]
    block_size: int
    sequence_bytes: int
    windowed_sequence_bytes: int
    pool_bytes: int | None = None
    num_blocks: int | None = None
    tokens: int | None = None
    sequences: int | None = None


@dataclass(frozen=True)
class Floors:
    """The least time a device needs, by formula; a real run takes longer.

    A step takes as long as its FLOPs or as reading its weights once (of experts those that its
    tokens can reach) and the keys and values it sees, whichever is longer. Activations may stay in
    caches and are not counted, nor is anything but products and attention. ttft_ms: all chunks of
    a prompt of prompt_tokens, alone. tpot_ms: a step of `batch` sequences of context_tokens each.
    """

    device: str
    read_gb_per_s: float
    tflop_per_s: float
    prompt_tokens: int
    ttft_ms: float
    ttft_bound_by: str
    prefill_flops: int
    batch: int
    context_tokens: int
    tpot_ms: float
    tpot_bound_by: str
    decode_flops: int
    decode_bytes: int

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.tpot_ms * 1e3


@dataclass(frozen=True)
class Plan:
    """activation_bytes: tensors that live at once between the ops of a step of
    max_num_batched_tokens; what ops use inside comes on top.
    """

    model: str
    dtype: str
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    weights: Weights
    activation_bytes: int
    kv_cache: KVCachePlan
    memory_bytes: int | None
    floors: Floors | None

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self)
        result["weights"]["total_bytes"] = self.weights.total_bytes
        if self.floors is not None:
            result["floors"]["tokens_per_s"] = self.floors.tokens_per_s
        return result

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        weights, cache = self.weights, self.kv_cache
        by_dtype = ", ".join(f"{_size(n)} {name}" for name, n in weights.bytes_by_dtype.items())
        tied = "tied with the head" if weights.tied_head else "the head is another"
        lines = [
            f"{self.model}, {self.dtype}, sequences of up to {self.max_model_len} tokens",
            f"  parameters    {_count(weights.parameters)} ({by_dtype}); in products "
            f"{_count(weights.matmul_parameters)}, active per token "
            f"{_count(weights.active_parameters)}",
            f"  weights       {_size(weights.total_bytes)}: of it embedding "
            f"{_size(weights.embedding_bytes)} ({tied}), packed copies "
            f"{_size(weights.packed_bytes)}",
            f"  activations   {_size(self.activation_bytes)} in a step of "
            f"{self.max_num_batched_tokens} tokens",
            f"  KV cache      {cache.bytes_per_token} bytes per token, "
            f"{_size(cache.sequence_bytes)} for the longest sequence",
        ]
        if cache.windowed_sequence_bytes < cache.sequence_bytes:
            lines.append(
                f"    windows     {_size(cache.windowed_sequence_bytes)} of that are ever seen"
            )
        if cache.pool_bytes is not None and self.memory_bytes is not None:
            lines.append(
                f"  memory        {_size(self.memory_bytes)}: {_size(cache.pool_bytes)} left for "
                f"the cache (kv_cache_memory_bytes={cache.pool_bytes}), {cache.tokens} tokens, "
                f"{cache.sequences} sequences of {self.max_model_len}"
            )
        if (floors := self.floors) is not None:
            lines += [
                f"  device        {floors.device}: {floors.read_gb_per_s:.1f} GB/s, "
                f"{floors.tflop_per_s:.2f} TFLOP/s",
                f"  TTFT          at least {floors.ttft_ms:.3g} ms for a prompt of "
                f"{floors.prompt_tokens} tokens ({floors.ttft_bound_by})",
                f"  TPOT          at least {floors.tpot_ms:.3g} ms for {floors.batch} sequences of "
                f"{floors.context_tokens} tokens ({floors.tpot_bound_by}): at most "
                f"{floors.tokens_per_s:.4g} tokens/s",
            ]
        return "\n".join(lines)


def plan(
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = Config.max_num_seqs,
    max_num_batched_tokens: int = Config.max_num_batched_tokens,
    block_size: int = Config.block_size,
    pack: bool | str = "auto",
    device: Device | None = None,
    prompt_tokens: int | None = None,
    batch: int = 1,
    context_tokens: int | None = None,
) -> Plan:
    """Plan a model from its configuration alone, in seconds; no weight is read or made.

    Args:
        config: A transformers config, a model folder on disk, or the path of its config.json.
        dtype: Of the weights; None: what the config names, else float32.
        memory_bytes: What weights, packed copies, activations and cache may take together.
        max_model_len, max_num_seqs, max_num_batched_tokens, block_size, pack: As in `Config`; for
            "auto" a quarter of memory_bytes less the weights may be packed copies.
        device: For the floors of TTFT and TPOT, and whether it packs weights and caches latents
            (a CPU does).
        prompt_tokens, batch, context_tokens: What the floors are asked for. None: a prompt of
            512 tokens, or of max_model_len if that is less; contexts as long as the prompt.
    Raises: UnsupportedModelError, naming what capture does not understand or why a plan from the
        configuration would be wrong; OSError for a folder without a configuration; ValueError.
    """
    settings = Config(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=block_size,
        pack=pack,
    )
    model = _meta_model(read_config(config), dtype)
    if device is not None and device.itemsize not in (None, model.dtype.itemsize):
        raise ValueError(
            f"the FLOP/s of {device.name} are known for numbers of {device.itemsize} bytes, the "
            f"weights are {model.dtype}; give a Device with the right ones"
        )
    length = _max_model_len(model, settings)
    if memory_bytes is not None:
        check_int("memory_bytes", memory_bytes, 1, 1 << 60)
    prompt_tokens = min(512, length) if prompt_tokens is None else prompt_tokens
    context = prompt_tokens if context_tokens is None else context_tokens
    for name, value in (("prompt_tokens", prompt_tokens), ("context_tokens", context)):
        check_int(name, value, 1, length)
    check_int("batch", batch, 1, min(max_num_seqs, max_num_batched_tokens))

    graph = _rewritten(model, on_cpu=device is None or device.packs)
    sizes = _Steps(graph)
    weights = _weights(model, graph, sizes, settings, memory_bytes, device)
    activation_bytes = sizes.activation_bytes(
        max_num_batched_tokens, min(max_num_seqs, max_num_batched_tokens)
    )
    taken = weights.total_bytes + activation_bytes
    if memory_bytes is not None and memory_bytes < taken:
        raise ValueError(
            f"memory_bytes must be > {taken} (weights {weights.total_bytes}, activations "
            f"{activation_bytes}) to leave room for a cache, got {memory_bytes}; give more, set "
            "pack=False or lower max_num_batched_tokens"
        )
    left = None if memory_bytes is None else memory_bytes - taken
    kv_cache = _kv_cache(cache_spec(graph), settings, length, left)
    needed = batch * -(-context // block_size) * block_size
    if kv_cache.tokens is not None and needed > kv_cache.tokens:
        raise ValueError(
            f"{batch} sequences of {context} tokens take {needed} slots of the cache, and "
            f"{kv_cache.tokens} fit; ask for fewer, or give more memory"
        )
    floors = None
    if device is not None:
        floors = _floors(sizes, device, settings, prompt_tokens, batch, context)
    return Plan(
        model=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=length,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        weights=weights,
        activation_bytes=activation_bytes,
        kv_cache=kv_cache,
        memory_bytes=memory_bytes,
        floors=floors,
    )


def read_config(config: Any) -> Any:
    """A transformers config as it is, or that of a model folder or config.json on disk.

    Raises: OSError if there is none.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(config, PreTrainedConfig):
        return config
    path = Path(config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise OSError(f"config must be a model folder or a config.json on disk, got {config}")
    return AutoConfig.from_pretrained(file, local_files_only=True)


def weight_dtype(config: Any, dtype: torch.dtype | None) -> torch.dtype:
    """What a model of this config is made in: what is asked, what the config names, or float32."""
    return dtype or config.dtype or torch.float32


def _meta_model(config: Any, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the configuration names quantised weights (quantization_config), whose size a model "
            "built from it does not show"
        )
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=weight_dtype(config, dtype))
        except ValueError as error:
            raise UnsupportedModelError(
                f"no causal LM can be made of a {type(config).__name__}: {error}"
            ) from error
    check_model(model, shapes_only=True)
    return model.eval()


def _max_model_len(model: Any, settings: Config) -> int:
    limit = longest_sequence(model)
    wanted = settings.max_model_len or limit
    if wanted is None:
        raise ValueError("the configuration does not say how long sequences get; set max_model_len")
    if limit is not None and wanted > limit:
        raise ValueError(
            f"max_model_len must be <= {limit} ({why_not_longer(model)}), got {wanted}; lower it"
        )
    return wanted


def _rewritten(model: Any, on_cpu: bool) -> CapturedGraph:
    """The graph after all passes but packing, which asks what device a weight is on."""
    captured = capture(model, shapes_only=True)
    try:
        off = _PACKING if on_cpu else (*_PACKING, "cache_latent")
        graph, _ = run_passes(captured, off)
    except RequiredPassError as error:
        raise UnsupportedModelError(f"the graph cannot be rewritten: {error}") from error
    return graph


class _Steps:
    """What a graph takes and computes in steps of given sizes."""

    def __init__(self, graph: CapturedGraph) -> None:
        self.graph = graph
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.calls = [(op_name(node, {}), node) for node in calls]
        self.matrices = self._matrices()

    def _matrices(self) -> dict[int | None, tuple[str, int]]:
        """Memory -> (name, elements) of the weight matrices, and of what they are cast to.

        Raises: UnsupportedModelError for an op over one whose cost is not known: it would be left
            out of the plan.
        """
        matrices = {
            memory_of(node): (spec.target, node.meta["val"].numel())
            for node, spec in zip(
                self.graph.placeholders(), self.graph.inputs.values(), strict=True
            )
            if spec.kind in ("parameter", "merged") and node.meta["val"].dim() > 1
        }
        for op, node in self.calls:
            for used in node.all_input_nodes:
                if may_read_matrix(op) or memory_of(used) not in matrices:
                    continue
                if op == "aten::to":
                    matrices[memory_of(node)] = matrices[memory_of(used)]
                elif memory_of(node) not in matrices:  # else it is a view
                    raise UnsupportedModelError(
                        f"{op} reads {matrices[memory_of(used)][0]}, and what that costs is not "
                        "known"
                    )
        return matrices

    def _sizes(self, step: Step) -> Sizes:
        return Sizes(self.graph.placeholders(), list(self.graph.inputs.values()), step)

    def cost(self, step: Step) -> Cost:
        sizes, total = self._sizes(step), Cost()
        for op, node in self.calls:
            total += node_cost(op, node, sizes)
        return total

    def activation_bytes(self, num_tokens: int, num_rows: int) -> int:
        sizes = self._sizes(Step(num_tokens, num_rows, ()))
        return peak_bytes(self.graph.graph, sizes)


def _weights(
    model: Any,
    graph: CapturedGraph,
    steps: _Steps,
    settings: Config,
    memory_bytes: int | None,
    device: Device | None,
) -> Weights:
    by_dtype: Counter[str] = Counter()
    for parameter in model.parameters():  # a tied one comes once
        by_dtype[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    packed = 0
    if device is None or device.packs:
        left = None if memory_bytes is None else memory_bytes - sum(by_dtype.values()) - buffers
        packed = _packed_bytes(graph, settings.pack, left)
    one = steps.cost(Step(1, 1, ()))
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return Weights(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matmul_parameters=_matmul_parameters(steps),
        active_parameters=one.flops // 2,
        bytes_by_dtype=dict(by_dtype),
        buffer_bytes=buffers,
        embedding_bytes=embedding.nbytes,
        tied_head=head is not None and head.weight is embedding,
        packed_bytes=packed,
    )


def _matmul_parameters(steps: _Steps) -> int:
    """Elements of the weights that products read, each weight once."""
    operands = (product_weight(op, node) for op, node in steps.calls)
    memories = (memory_of(operand) for operand in operands if operand is not None)
    return sum(dict(steps.matrices[m] for m in memories if m in steps.matrices).values())


def _packed_bytes(graph: CapturedGraph, pack: bool | str, left: int | None) -> int:
    """What the passes would pack if the weights were on this machine's CPU; left: free memory."""
    copy = graph.copy()
    mode = fake_mode_of(copy.placeholders())
    for node in copy.placeholders():
        if copy.inputs[node.name].kind in ("parameter", "merged"):
            value = node.meta["val"]
            with mode:
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    if pack == "auto":
        copy.pack_budget_bytes = sys.maxsize if left is None else max(0, left) // 4
    else:
        copy.pack_budget_bytes = sys.maxsize if pack else 0
    pack_gated_linears(copy)
    pack_linears(copy)
    return packed_bytes(copy)


def _kv_cache(spec: CacheSpec, settings: Config, length: int, left: int | None) -> KVCachePlan:
    size = settings.block_size

    def slots(tokens: int) -> int:
        return -(-tokens // size) * size

    counts = Counter(spec.layers)
    layers = [
        {"count": count, **asdict(layer), "dtype": str(layer.dtype).removeprefix("torch.")}
        for layer, count in counts.items()
    ]
    result = KVCachePlan(
        bytes_per_token=spec.bytes_per_token,
        layers=layers,
        block_size=size,
        sequence_bytes=spec.bytes_per_token * slots(length),
        windowed_sequence_bytes=sum(
            layer.bytes_per_token
            * slots(min(length, layer.window or length, layer.chunk or length))
            for layer in spec.layers
        ),
    )
    if left is None:
        return result
    num_blocks = left // block_bytes(spec, size)
    usable = max(0, num_blocks - 1)  # the null block holds nothing
    return replace(
        result,
        pool_bytes=left,
        num_blocks=num_blocks,
        tokens=usable * size,
        sequences=min(settings.max_num_seqs, usable * size // slots(length)),
    )


def _floors(
    steps: _Steps,
    device: Device,
    settings: Config,
    prompt_tokens: int,
    batch: int,
    context_tokens: int,
) -> Floors:
    limits = device.read_gb_per_s, device.tflop_per_s
    prefill, ttft_s = Cost(), 0.0
    for start in range(0, prompt_tokens, settings.max_num_batched_tokens):
        end = min(prompt_tokens, start + settings.max_num_batched_tokens)
        chunk = Step(end - start, int(end == prompt_tokens), ((end - start, end),))
        cost = steps.cost(chunk)
        prefill, ttft_s = prefill + cost, ttft_s + cost.floor_s(*limits)
    decode = steps.cost(Step(batch, batch, ((1, context_tokens),) * batch))
    return Floors(
        device=device.name,
        read_gb_per_s=device.read_gb_per_s,
        tflop_per_s=device.tflop_per_s,
        prompt_tokens=prompt_tokens,
        ttft_ms=ttft_s * 1e3,
        ttft_bound_by=prefill.bound_by(*limits),
        prefill_flops=prefill.flops,
        batch=batch,
        context_tokens=context_tokens,
        tpot_ms=decode.floor_s(*limits) * 1e3,
        tpot_bound_by=decode.bound_by(*limits),
        decode_flops=decode.flops,
        decode_bytes=decode.streamed_bytes,
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
