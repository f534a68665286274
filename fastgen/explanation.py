"""The text and JSON of `fastgen.explain(model)`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .config import Config
from .outputs import EngineMetrics
from .passes import CacheSpec, Report


@dataclass(frozen=True)
class Explanation:
    """Everything that was done to one model; str() is for people, to_json() for programs."""

    model: str
    device: str
    config: Config
    max_model_len: int
    why_not_longer: str
    spec: CacheSpec
    report: Report
    weight_epoch: int
    graph_source: str
    variants: dict[str, float]  # other graphs of the model: seconds to make
    start: dict[str, float]
    seconds: dict[str, float]
    fallbacks: dict[str, int]
    metrics: EngineMetrics | None
    released_bytes: int
    kept: dict[str, tuple[int, str]]  # packed and not released: bytes, why

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "dtype": str(layer.dtype)} for layer in self.spec.layers]
        return {
            "model": self.model,
            "device": self.device,
            "config": asdict(self.config),
            "max_model_len": self.max_model_len,
            "why_not_longer": self.why_not_longer,
            "cache": {
                "bytes_per_token": self.spec.bytes_per_token,
                "shared_bytes_per_token": self.spec.shared_bytes_per_token,
                "layers": layers,
                "entries": list(self.spec.entries),
            },
            **self.report.to_dict(),
            "weight_epoch": self.weight_epoch,
            "graph": self.graph_source,
            "variants": self.variants,
            "start_seconds": self.start_seconds(),
            "seconds": self.seconds,
            "fallbacks": self.fallbacks,
            "released_bytes": self.released_bytes,
            "kept": self.kept,
            "metrics": None if self.metrics is None else self.metrics.to_dict(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        layer = self.spec.layers[0]
        dtype = str(layer.dtype).removeprefix("torch.")
        kept = f"{layer.num_kv_heads} KV heads x {layer.head_dim}"
        if layer.kind == "latent":
            kept = f"a latent of {layer.head_dim} and a key of {layer.v_head_dim} for all heads"
        count = len(self.spec.entries)
        lines = [
            f"{self.model} on {self.device}, one graph of {count} attention layers",
            f"  KV cache      {self.spec.bytes_per_token} bytes per token ({dtype}, {kept}), "
            f"blocks of {self.config.block_size}; sequences of up to {self.max_model_len} tokens",
        ]
        if "RoPE" in self.why_not_longer:
            lines.append(f"    not longer  {self.why_not_longer}: transformers' loop")
        if shared := count - len(self.spec.layers):
            lines.append(
                f"    shared      {shared} layers read the cache of earlier ones, which saves "
                f"{self.spec.shared_bytes_per_token} bytes per token"
            )
        for item in self.report.passes:
            lines.append(f"  pass          {item.name}: {item.matches} ({item.status})")
            places: dict[str, list[str]] = {}
            for where, why in item.refused:
                places.setdefault(why, []).append(where)
            lines.extend(f"    refused     {', '.join(at)}: {why}" for why, at in places.items())
        for op, chosen in self.report.kernels.items():
            for name, entry in chosen.items():
                lines.append(f"  kernel        {op} x {entry['calls']}: {name}")
                lines.extend(f"    not {who}: {why}" for who, why in entry["refused"].items())
        for op, calls in self.report.facts.get("by_row", {}).items():
            lines.append(
                f"  by row        {op} x {calls}: apart from other rows, deterministic=True"
            )
        lines.append(f"  codegen       {self.report.facts['codegen']}")
        programs: list[int] = self.report.facts["programs"]
        left: dict[str, int] = self.report.facts["not_in_programs"]
        if programs or left:
            word = "program" if len(programs) == 1 else "programs"
            lines.append(f"  native        {len(programs)} {word} of {sum(programs)} kernels")
            lines.extend(f"    from Python {count} x {why}" for why, count in left.items())
        packed = self.report.facts["packed_bytes"]
        lines.append(
            f"  weights       epoch {self.weight_epoch}, checked: {self.config.weight_check}; "
            f"{packed / 2**20:.1f} MiB of packed copies"
        )
        if self.config.release_weights:
            lines.append(
                f"  released      {self.released_bytes / 2**20:.1f} MiB of weights, whose packed "
                "copies are the only ones; fastgen.restore(model) unpacks them"
            )
        for name, (num_bytes, why) in self.kept.items():
            lines.append(f"    kept        {name} ({num_bytes / 2**20:.1f} MiB): {why}")
        lines.append(f"  graph         {self.graph_source}")
        for name, seconds in self.variants.items():
            lines.append(f"  variant       with {name}, made in {seconds:.2f} s")
        for title, seconds in (("start", self.start_seconds()), ("time", self.seconds)):
            if seconds:
                times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
                lines.append(f"  {title:<14}{times}")
        lines.extend(self._traffic())
        return "\n".join(lines)

    def start_seconds(self) -> dict[str, float]:
        """What the start took, from the call of optimize to the end of the first step."""
        seconds = dict(self.start)
        if self.metrics is not None and self.metrics.first_step_seconds:
            seconds["first step"] = self.metrics.first_step_seconds
        return {**seconds, "total": sum(seconds.values())}

    def _traffic(self) -> list[str]:
        lines = []
        if (metrics := self.metrics) is not None:
            lines.append(
                f"  engine        {metrics.engine_steps} steps, {metrics.prompt_tokens} prompt and "
                f"{metrics.output_tokens} output tokens, {metrics.preemptions} preemptions, "
                f"cache waste {metrics.cache_waste:.1%}, "
                f"prefix cache hits {metrics.prefix_cache_hit_rate:.1%}"
            )
            if metrics.forks:
                lines.append(
                    f"  beams         {metrics.forks} rows went on from another row's blocks, "
                    f"{metrics.block_copies} blocks copied on write"
                )
            if metrics.captured_graphs or metrics.capture_refusal:
                lines.append(
                    f"  CUDA graphs   {metrics.captured_graphs} sizes of decode steps captured, "
                    f"{metrics.replayed_steps} steps replayed"
                )
            if metrics.capture_refusal:
                lines.append(f"    not any more: {metrics.capture_refusal}")
        if not self.fallbacks:
            lines.append("  fallbacks     none")
        for reason, count in self.fallbacks.items():
            lines.append(f"  fallback      {count} x transformers' loop: {reason}")
        return lines
