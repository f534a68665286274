"""A loaded model: modules without code that hold the weights, and generate() over the engine."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import SamplingParams
from ..errors import (
    ArtifactError,
    FastgenError,
    InvalidRequestError,
    NotOptimizedError,
    RequestFailedError,
)
from ..frontend import Engine, params_of
from ..outputs import EngineMetrics
from ..registry import lookup, require
from .manifest import Manifest, TensorEntry

TOKENIZER = "tokenizer"
# New tokens where neither the call nor the configuration says how many; as transformers.
_DEFAULT_NEW_TOKENS = 20


class GenerationConfig:
    """The fields of a generation_config.json; one that it does not have is None."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks for
            raise AttributeError(name)
        return None

    def __repr__(self) -> str:
        return f"GenerationConfig({vars(self)})"


class LoadedModel(nn.Module):
    """A model that `fastgen.load` brought from a folder.

    It generates, runs in an `Engine` or `AsyncEngine`, and answers `fastgen.explain`. Parameters
    and buffers have the names of the model that was exported, and values that change in place, by
    `load_state_dict` or otherwise, are followed. There is no forward: the code is not here.

    Attributes:
        path: The folder. manifest: What it said. generation_config: Defaults of `generate`.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        tensors: Mapping[str, torch.Tensor],
        generation_config: GenerationConfig,
    ) -> None:
        """tensors: By the first name of each entry of the manifest."""
        super().__init__()
        self.path, self.manifest, self.generation_config = path, manifest, generation_config
        for entries, persistent in ((manifest.weights, True), (manifest.buffers, False)):
            for entry in entries:
                _hold(self, entry, tensors[entry.names[0]], persistent)
        self.eval()

    def __repr__(self) -> str:
        return f"LoadedModel({self.manifest.model}, {str(self.path)!r})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise FastgenError(
            f"a loaded model has no forward: the code of {self.manifest.model} is not in the "
            "folder; use generate() or fastgen.Engine"
        )

    @property
    def device(self) -> torch.device:
        return torch.device(self.manifest.device)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was exported with the model, or None; imports transformers."""
        folder = self.path / TOKENIZER
        if not folder.is_dir():
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def metrics(self) -> EngineMetrics:
        """A snapshot of the engine's counters."""
        return require(self).engine().metrics()

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **fields: Any,
    ) -> torch.Tensor:
        """Continue rows of tokens, as transformers' generate() does.

        Greedy unless do_sample is set. A sampled row draws from a generator of its own, whose seed
        torch's default generator gives. repetition_penalty counts what a row's mask shows.

        Args:
            input_ids: [B, T] int64. attention_mask: [B, T], zeros before a row's tokens and
                nowhere else; None: transformers' guess, zeros where the padding token is.
            fields: Of the generation configuration: max_new_tokens, max_length, min_new_tokens,
                do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
                num_return_sequences, bad_words_ids, eos_token_id, pad_token_id.
        Returns: [B * num_return_sequences, T + new] int64: the rows with their new tokens, padded
            behind the end token.
        Raises: InvalidRequestError for anything else, and for a number out of its range;
            CapacityError for too many tokens, RequestFailedError if a step fails.
        """
        if lookup(self) is None:
            raise NotOptimizedError(
                "this loaded model is a copy of one, or was restored: load the folder again"
            )
        config = self._config(fields)
        rows = _visible(input_ids, attention_mask, config)
        params = _params(config, input_ids.shape[1], self.manifest.max_model_len)
        outputs = Engine(self).generate(rows, params)
        completions = [each for output in outputs for each in output.outputs]
        for each in completions:
            if each.error is not None:
                raise RequestFailedError(each.error)
        longest = max(len(each.token_ids) for each in completions)
        pad = _pad_token(config)
        new = [each.token_ids + [pad] * (longest - len(each.token_ids)) for each in completions]
        given = input_ids.repeat_interleave(params.n, dim=0).long()
        return torch.cat([given, torch.tensor(new, device=given.device)], dim=-1)

    def _config(self, fields: Mapping[str, Any]) -> GenerationConfig:
        if unknown := [name for name in fields if name not in _FIELDS]:
            raise InvalidRequestError(
                f"generate() of a loaded model does not take {', '.join(unknown)}; it takes "
                f"{', '.join(_FIELDS)}, and fastgen.Engine what SamplingParams has"
            )
        config = copy.copy(self.generation_config)
        vars(config).update(fields)
        if fields.get("max_length") is not None and fields.get("max_new_tokens") is None:
            vars(config)["max_new_tokens"] = None  # the call's own limit counts
        return config


_FIELDS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "bad_words_ids",
    "eos_token_id",
    "pad_token_id",
)


def _hold(model: nn.Module, entry: TensorEntry, tensor: torch.Tensor, persistent: bool) -> None:
    """Give a tensor its names, in modules that are made for them."""
    if entry.kind == "parameter":
        tensor = nn.Parameter(tensor, requires_grad=False)
    for name in entry.names:
        *path, attribute = name.split(".")
        module = model
        try:
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            if entry.kind == "parameter":
                module.register_parameter(attribute, tensor)  # pyright: ignore
            else:
                module.register_buffer(attribute, tensor, persistent)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"a weight cannot be called {name!r}: {error}") from error


def _params(config: GenerationConfig, prompt_length: int, max_model_len: int) -> SamplingParams:
    """What the configuration asks of rows with so many columns."""
    new_tokens = config.max_new_tokens
    if new_tokens is None:
        at_most = max_model_len - prompt_length
        new_tokens = min(_DEFAULT_NEW_TOKENS, at_most)
        if config.max_length is not None:
            new_tokens = config.max_length - prompt_length
    rest = copy.copy(config)
    min_tokens, bad_words = config.min_new_tokens or 0, config.bad_words_ids or ()
    vars(rest).update(max_new_tokens=None, max_length=None, min_new_tokens=None, bad_words_ids=None)
    eos = config.eos_token_id
    stops = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return dataclasses.replace(
        params_of(rest),
        max_tokens=new_tokens,
        min_tokens=min(min_tokens, new_tokens),
        bad_words=tuple(map(tuple, bad_words)),
        stop_token_ids=stops,
        ignore_eos=True,  # they are the stop tokens
    )


def _pad_token(config: GenerationConfig) -> int:
    """What stands behind a row's end token: the end token itself, if there is no other."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = config.eos_token_id
    return 0 if eos is None else eos if isinstance(eos, int) else next(iter(eos))


def _visible(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: GenerationConfig
) -> list[list[int]]:
    """The tokens of each row behind its padding. Raises: InvalidRequestError."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise InvalidRequestError("input_ids must be a tensor of rows and columns [B, T]")
    if input_ids.is_floating_point() or 0 in input_ids.shape:
        raise InvalidRequestError(
            f"input_ids must hold token ids, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if attention_mask is None:
        attention_mask = _guessed_mask(input_ids, config)
    if attention_mask.shape != input_ids.shape:
        raise InvalidRequestError(
            f"attention_mask must have the shape of input_ids {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}"
        )
    rows = []
    for number, (row, mask) in enumerate(
        zip(input_ids.tolist(), attention_mask.ne(0).tolist(), strict=True)
    ):
        start = mask.index(True) if True in mask else len(mask)
        if start == len(mask) or not all(mask[start:]):
            raise InvalidRequestError(
                f"row {number} of attention_mask must be zeros and then ones: only padding before "
                "a prompt is left out by generate() of a loaded model"
            )
        rows.append(row[start:])
    return rows


def _guessed_mask(input_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Zeros where the padding token is, unless that is an end token, too; as transformers."""
    pad, eos = config.pad_token_id, config.eos_token_id
    ends: Iterable[int] = () if eos is None else (eos,) if isinstance(eos, int) else eos
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return input_ids.ne(pad)
