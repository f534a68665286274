"""The weights of a folder: safetensors under the names of the model's state_dict, tied ones once.

They are mapped into memory, not read: a page comes from the disk when it is first looked at, and a
weight that is written to gets pages of its own. The file is a checkpoint like any other, and any
other of the same names, shapes and dtypes can stand in its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ArtifactError
from ..released import is_released
from .manifest import TensorEntry

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFERS = "buffers.safetensors"
_SHARD_BYTES = 5 << 30  # as transformers cuts its checkpoints
_METADATA = {"format": "pt"}


def weights_of(model: nn.Module) -> dict[str, tuple[TensorEntry, torch.Tensor]]:
    """What a model's state_dict holds, by the first name of each tensor.

    Raises: ArtifactError for what is no plain tensor.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or not (
            type(tensor) in (torch.Tensor, nn.Parameter) or is_released(tensor)
        ):
            raise ArtifactError(
                f"{name} is a {type(tensor).__name__}; only plain tensors can be exported"
            )
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    found = {}
    for key, tensor in tensors.items():
        kind = "parameter" if names[key][0] in parameters else "buffer"
        found[names[key][0]] = entry_of(tensor, kind, names[key]), tensor
    return found


def entry_of(tensor: torch.Tensor, kind: str, names: Iterable[str]) -> TensorEntry:
    return TensorEntry(kind, _dtype_name(tensor), tuple(tensor.shape), tuple(names))


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_weights(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    progress: Callable[[int], None],
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write tensors into one file, or into several with an index if they are many bytes.

    progress: Told the bytes of each file that was written.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, weights)
        progress(size)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: weights[name] for name in names})
        progress(sum(weights[name].nbytes for name in names))
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file; a tensor that shares memory with another is copied."""
    from safetensors.torch import save_file

    plain, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        plain[name] = value
    save_file(plain, path, metadata=_METADATA)


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file, or a folder with one or several.

    Raises: ArtifactError.
    """
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        try:
            weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path / INDEX} is no index of weights: {error}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ArtifactError(f"{path / INDEX} names {name!r}, which is no file beside it")
        return [path / name for name in names]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    raise ArtifactError(
        f"{path} must be a safetensors file or a folder with {WEIGHTS} or {INDEX}, and is none"
    )


def read_tensors(
    paths: Iterable[Path], entries: Iterable[TensorEntry], device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors of files under the first name of each entry, mapped into memory on the CPU.

    Raises: ArtifactError for a file that is none, and for a name, shape or dtype that is not that
        of its entry.
    """
    wanted = {name: entry for entry in entries for name in entry.names}
    found: dict[str, torch.Tensor] = {}
    where: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _tensors_in(path, device).items():
            if name not in wanted:
                raise ArtifactError(f"{path} holds {name}, which the model has not")
            entry = wanted[name]
            first = entry.names[0]
            if _dtype_name(tensor) != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ArtifactError(
                    f"{name} must be {entry.dtype} {list(entry.shape)}, and in {path} it is "
                    f"{_dtype_name(tensor)} {list(tensor.shape)}"
                )
            if first in found and not torch.equal(found[first], tensor):
                raise ArtifactError(
                    f"{' and '.join(entry.names)} are one weight, and differ in {path} and "
                    f"{where[first]}"
                )
            found.setdefault(first, tensor)
            where.setdefault(first, path)
    if missing := sorted({entry.names[0] for entry in wanted.values()} - found.keys()):
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise ArtifactError(f"{', '.join(map(str, paths))}: {listed} are missing")
    return found


def _tensors_in(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:  # pyright: ignore
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is no safetensors file that can be read: {error}") from error
