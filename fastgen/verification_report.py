"""The text and JSON of `fastgen.verify(model)`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

LOGITS = "logits"  # behind the last layer; the name of no layer


@dataclass(frozen=True)
class PromptComparison:
    """One prompt. Steps count the new tokens from 0.

    difference: the largest between the logits of the two, fed the same tokens; difference_at: its
    step. differs: it is above the tolerance. parts_at: the first step where the tokens differ, and
    there by transformers' logits: margin, how far the best token is before the second, and gap,
    how far it is before the one that fastgen chose. near_tie: a gap that differences within the
    tolerance can turn around.
    """

    num_prompt_tokens: int
    difference: float
    difference_at: int
    differs: bool
    parts_at: int | None = None
    expected_token: int | None = None
    found_token: int | None = None
    margin: float | None = None
    gap: float | None = None
    near_tie: bool = False

    @property
    def ok(self) -> bool:
        return not self.differs and (self.parts_at is None or self.near_tie)

    def __str__(self) -> str:
        if self.parts_at is None:
            return "equal"
        kind = "near tie" if self.near_tie else "DIFFERS"
        return (
            f"{kind} at {self.parts_at}: {self.found_token}, not {self.expected_token} "
            f"(margin {self.margin:.2g}, gap {self.gap:.2g})"
        )


@dataclass(frozen=True)
class LayerComparison:
    """Largest difference of what a layer returns (LOGITS: the model); see Verification."""

    name: str
    difference: float
    noise: float
    differs: bool


@dataclass(frozen=True)
class Verification:
    """What transformers and fastgen made of the same prompts.

    noise: the largest difference of transformers' logits from its own, computed in other ways;
    tolerance: what is not taken for a mistake. layers: in the model's order and the logits last,
    from one sequence, the prompt of index layers_prompt with transformers' tokens, run alone, node
    by node. num_layers: those with attention. note: why layers were not compared.
    """

    model: str
    dtype: str
    device: str
    num_new_tokens: int
    noise: float
    tolerance: float
    prompts: tuple[PromptComparison, ...]
    layers: tuple[LayerComparison, ...]
    layers_prompt: int
    num_layers: int
    note: str | None = None

    @property
    def ok(self) -> bool:
        """Tokens equal but for near ties, and all logits equal within the tolerance."""
        return all(prompt.ok for prompt in self.prompts)

    @property
    def first_differing_layer(self) -> LayerComparison | None:
        return next((layer for layer in self.layers if layer.differs), None)

    @property
    def largest_difference(self) -> LayerComparison | None:
        """The layer that differs most, measured by its noise; the logits are none."""
        layers = [layer for layer in self.layers if layer.name != LOGITS]
        return max(layers, key=_in_noise, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that JSON does not have are written as text."""
        first, largest = self.first_differing_layer, self.largest_difference
        data = {
            "ok": self.ok,
            "verdict": self.verdict(),
            **asdict(self),
            "first_differing_layer": first and first.name,
            "largest_difference": largest and largest.name,
        }
        return _plain(data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def verdict(self) -> str:
        """One sentence."""
        if self.ok:
            ties = sum(prompt.near_tie for prompt in self.prompts)
            if not ties:
                return "equal"
            return f"equal but for near ties in {ties} of {len(self.prompts)} prompts"
        wrong = sum(not prompt.ok for prompt in self.prompts)
        where = self._where()
        return f"DIFFERENT in {wrong} of {len(self.prompts)} prompts: {where}"

    def _where(self) -> str:
        first = self.first_differing_layer
        if first is not None and first.name != LOGITS:
            return f"{first.name} is the first layer that differs"
        if first is not None:
            return "no layer differs, and the logits do: final norm, head, or what follows it"
        if not self.layers:
            return "the layers were not compared"
        if any(prompt.differs for prompt in self.prompts):
            return "run alone, node by node, the graph does not differ: look at the engine"
        return "the logits do not differ: look at how the engine chooses tokens"

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.dtype} on {self.device}: {len(self.prompts)} prompts, "
            f"{self.num_new_tokens} greedy tokens each, transformers and fastgen",
            f"  {'prompt':>6}  {'tokens':>6}  {'logits differ by':>16}  new tokens",
        ]
        for index, prompt in enumerate(self.prompts):
            mark = "!" if prompt.differs else " "
            lines.append(
                f"  {index:>6}  {prompt.num_prompt_tokens:>6}  {prompt.difference:>15.2g}{mark}  "
                f"{prompt}"
            )
        lines.append(
            f"  transformers differs from itself by {self.noise:.2g}; "
            f"{self.tolerance:.2g} is not taken for a mistake"
        )
        lines.extend(self._layer_lines())
        lines.append(f"  {self.verdict()}")
        return "\n".join(lines)

    def _layer_lines(self) -> list[str]:
        if self.note is not None:
            return [f"  layers: {self.note}"]
        largest, first = self.largest_difference, self.first_differing_layer
        if largest is None:
            return ["  layers: the graph does not say where they end"]
        num_compared = sum(layer.name != LOGITS for layer in self.layers)
        lines = [
            f"  layers compared on prompt {self.layers_prompt}: {num_compared} of {self.num_layers}"
        ]
        shown = {"first that differs": first, "largest difference": largest}
        for title, layer in shown.items():
            if layer is not None:
                lines.append(
                    f"    {title:<20}{layer.name}: {layer.difference:.2g}, noise {layer.noise:.2g}"
                )
        return lines


def _in_noise(layer: LayerComparison) -> float:
    ratio = layer.difference / layer.noise if layer.noise else layer.difference
    return math.inf if math.isnan(ratio) else ratio


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
    return value
