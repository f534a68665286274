"""The name of a cached graph: a digest of everything that the graph was made from.

A graph on disk is taken for another process's model, so its key must tell apart whatever a
capture could see: the module tree with every plain attribute, the configuration, names, shapes,
dtypes and ties of the weights, and the code that the forwards run, as it is loaded and not only
as it is written. What cannot be described in a way that is the same in every process raises
`NotCacheableError`: then nothing is cached.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import hashlib
import os
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .fingerprint import IGNORED_ATTRIBUTES, SCALARS, places_inputs, storage_of
from .graph_json import NotCacheableError
from .kernels.cpu.build import _processor, why_missing
from .passes import PASSES, PLAIN, Variant
from .passes.pipeline import Pass

_OWN_FOLDERS = tuple(
    Path(str(sys.modules[name].__file__)).parent
    for name in ("fastgen", "fastgen.passes", "fastgen.kernels")
)
_OWN_PREFIXES = tuple(f"{folder}{os.sep}" for folder in _OWN_FOLDERS)
# Packages that stand in the key with their version. Of those in _FOLLOWED the code is described as
# well, wherever the forwards lead; of torch only what is often replaced at run time.
_FOLLOWED = ("transformers", "peft")
_LIBRARIES = (*_FOLLOWED, "torch", "accelerate", "numpy", "safetensors", "huggingface_hub")
# What loads, converts, prepares inputs and samples, but runs in no forward; some of it differs in
# every process.
_NOT_RUN = tuple(
    f"transformers.{name}"
    for name in (
        "audio_utils",
        "conversion_mapping",
        "core_model_loading",
        "feature_extraction",
        "generation",
        "image_",
        "loss",
        "models.auto",
        "processing_utils",
        "quantizers",
        "tokenization_utils",
        "utils.chat",
        "utils.hub",
        "video_utils",
    )
)
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, types.MappingProxyType)
_CACHED = functools._lru_cache_wrapper
_DESCRIPTORS = types.MemberDescriptorType | types.GetSetDescriptorType
_TORCH_FUNCTIONS = ("torch.nn.functional", "torch.nn.modules.activation")
# Settings of the libraries that a forward may follow.
_ENVIRONMENT = ("TORCH", "PYTORCH", "TRANSFORMERS", "FASTGEN", "ONEDNN", "DNNL", "USE_", "ATEN")
_ENVIRONMENT_WITHOUT_EFFECT = {"FASTGEN_CACHE_DIR", "TRANSFORMERS_VERBOSITY"}
# Attributes of modules that no forward reads, or that the configuration says already.
_HARMLESS_ATTRIBUTES = IGNORED_ATTRIBUTES | {"generation_config", "_hf_hook", "_old_forward"}
# What Python and transformers note on a class when they have looked at it.
_NOTES_OF_CLASSES = {
    "_abc_impl",
    "_can_set_attn_implementation_cached_value",
    "_can_set_experts_implementation_cached_value",
}
_LARGEST_TENSOR_BYTES = 1 << 16
_NAMED = (torch.dtype, torch.layout, torch.memory_format, torch.device, torch.Size, complex, bytes)


def sources_digest(folders: Iterable[Path]) -> str:
    """A digest of the Python files in these folders: names and contents."""
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        for path in sorted(folder.glob("*.py")):
            digest.update(f"{number} {path.name} {path.stat().st_size} ".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


# Taken when the code is loaded: a file that is edited later does not change what runs here.
_OWN_SOURCES = sources_digest(_OWN_FOLDERS)


def graph_key(
    model: nn.Module,
    passes_off: tuple[str, ...],
    pack_budget_bytes: int,
    variant: Variant = PLAIN,
    deterministic: bool = False,
) -> str:
    """The digest of all that the rewritten graph of a model depends on; the same in any process.

    Raises: NotCacheableError.
    """
    device = next(model.parameters()).device
    describer = _Describer(model)
    parts = [
        _OWN_SOURCES,
        repr([_pass_name(item) for item in PASSES if item.runs_on(device)]),
        repr((sorted(passes_off), pack_budget_bytes, variant, deterministic)),
        sys.version,
        repr([_version(name) for name in _LIBRARIES]),
        _cpu() if device.type == "cpu" else _accelerator(device),
        repr((torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())),
        repr(_environment()),
        *describer.model(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _pass_name(item: Pass) -> str:
    if not _is_own(item.run):
        raise NotCacheableError(f"the pass {item.name} is none of fastgen's")
    return f"{item.run.__module__}.{item.name}"


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    """What passes ask of this machine: its instructions, and whether there are C++ kernels."""
    return f"{_processor()}, C++ kernels: {why_missing() or 'built'}"


def _accelerator(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return repr([getattr(module, f"get_device_{what}")(device) for what in ("name", "capability")])


def _environment() -> list[tuple[str, str]]:
    return sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith(_ENVIRONMENT) and name not in _ENVIRONMENT_WITHOUT_EFFECT
    )


class _Describer:
    """Turns the parts of one model into text that says the same in every process.

    Code of the libraries is described leniently: an object that a library made for itself stands
    there with its type. Whatever came from elsewhere, a user's function or class above all, is
    described whole, with the globals it names, or not at all.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {id(m): name for name, m in model.named_modules(remove_duplicate=True)}
        self._seen: dict[int, int] = {}  # functions, classes and configurations: number by id
        self._modules: dict[str, None] = {}  # Python modules whose globals forwards can name
        self._sources: dict[str, str] = {}  # of the Python modules that define modules: digests

    def model(self) -> Iterator[str]:
        """All parts of the model; what the code leads to comes last."""
        ties: dict[Any, int] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            yield f"{name}: {self._class_of(module)} is {self._names[id(module)]}"
            own = vars(module)
            ignored = _HARMLESS_ATTRIBUTES | ({"forward"} if places_inputs(module) else set())
            for key in sorted(own.keys() - ignored):
                yield f"{key} = {self.describe(own[key], f'{name or type(module).__name__}.{key}')}"
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    yield f"{key}: {_tensor(tensor, ties)}"
        yield repr(self._sources)
        done: set[str] = set()
        for module_name in _TORCH_FUNCTIONS:
            self._modules.setdefault(module_name)
        while waiting := self._modules.keys() - done:
            for module_name in sorted(waiting):
                done.add(module_name)
                yield from self._globals(module_name)

    def describe(self, value: Any, where: str, lenient: bool = False) -> str:
        """The text of any value; `where` is what to call it in a refusal."""
        if type(value) in SCALARS:
            return repr(value)
        if isinstance(value, enum.Enum):
            return f"{_name_of(type(value))}.{value.name}"
        if isinstance(value, SCALARS) or type(value) in _NAMED:
            return f"{_name_of(type(value))} {value!r}"
        if isinstance(value, nn.Module):
            if id(value) in self._names:
                return f"module {self._names[id(value)]}"
        elif isinstance(value, torch.Tensor):
            if type(value) in (torch.Tensor, nn.Parameter) and value.device.type != "meta":
                return self._tensor_value(value, where)
        elif type(value) in _DICTS or hasattr(type(value), "_global_mapping"):
            rows = [
                f"{self.describe(key, where, lenient)}: {self.describe(item, where, lenient)}"
                for key, item in value.items()
                if not _is_own(item)
            ]
            return f"{_name_of(type(value))} {{{', '.join(rows)}}}"
        elif isinstance(value, list | tuple | set | frozenset):
            rows = [self.describe(item, where, lenient) for item in value]
            rows = sorted(rows) if isinstance(value, set | frozenset) else rows
            return f"{_name_of(type(value))} [{', '.join(rows)}]"
        elif isinstance(value, types.ModuleType):
            return f"Python module {value.__name__}"
        elif isinstance(value, type):
            return self._class(value, where)
        elif (function := _function_in(value)) is not None:
            return self._function(function, where, lenient)
        elif isinstance(value, types.MethodType):
            owner = self.describe(value.__self__, where, lenient)
            return f"method {self.describe(value.__func__, where, lenient)} of {owner}"
        elif isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
            return f"partial {self.describe(parts, where, lenient)}"
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType):
            return f"builtin {value.__qualname__}"  # of C, and as its package's version has it
        elif isinstance(value, property):
            return self.describe([value.fget, value.fset], where, lenient)
        elif _is_configuration(value):
            kind = self._class(type(value), where)
            return self._once(value) or f"{kind} {self.describe(vars(value), where)}"
        if lenient and (_origin_of(type(value)) != "user" or not callable(value)):
            return f"a {_name_of(type(value))}"
        raise NotCacheableError(f"{where} is a {_name_of(type(value))}, which has no lasting name")

    def _once(self, value: Any) -> str | None:
        """A reference to what was described before; None the first time."""
        if id(value) in self._seen:
            return f"#{self._seen[id(value)]}"
        self._seen[id(value)] = len(self._seen)
        return None

    def _tensor_value(self, tensor: torch.Tensor, where: str) -> str:
        if tensor.nbytes > _LARGEST_TENSOR_BYTES:
            raise NotCacheableError(
                f"{where} is a tensor of {tensor.nbytes} bytes that is no parameter and no buffer"
            )
        plain = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"{_tensor(tensor, {})} {content.hexdigest()}"

    def _class_of(self, module: nn.Module) -> str:
        """The class of a module, with all that it inherits; the source must be at hand."""
        classes = type(module).__mro__[:-1]
        for cls in classes:
            if _origin_of(cls) != "torch" and cls.__module__ not in self._sources:
                file = getattr(sys.modules.get(cls.__module__), "__file__", None)
                self._sources[cls.__module__] = _stamp(file, f"class {_name_of(cls)}")
        return " < ".join(self._class(cls, cls.__name__) for cls in classes)

    def _class(self, cls: type, where: str) -> str:
        name, origin = _name_of(cls), _origin_of(cls)
        if origin == "installed":
            file = getattr(sys.modules[cls.__module__], "__file__", None)
            return f"class {name} {_stamp(file, where)}"
        if origin == "python" or (origin == "torch" and not issubclass(cls, nn.Module)):
            return f"class {name}"
        if (seen := self._once(cls)) is not None:
            return f"class {name} {seen}"
        self._lead_to(cls.__module__)
        members = [
            f"{key} = {self.describe(member, f'{where}.{key}', lenient=origin != 'user')}"
            for key, member in sorted(vars(cls).items())
            if not (_is_bookkeeping(key, member) or _is_own(member))
        ]
        bases = [self.describe(base, where) for base in cls.__bases__ if base is not object]
        return f"class {name}({', '.join(bases)}) {{{'; '.join(members)}}}"

    def _function(self, function: types.FunctionType, where: str, lenient: bool) -> str:
        name, code = f"{function.__module__}.{function.__qualname__}", function.__code__
        generated = code.co_filename.startswith("<")  # as the methods of a dataclass are
        origin = "generated" if generated and lenient else _origin_of_file(code.co_filename)
        if origin == "python":
            return f"function {name}"
        if (seen := self._once(function)) is not None:
            return f"function {name} {seen}"
        self._lead_to(function.__module__)
        parts = [function.__defaults__, function.__kwdefaults__, *_cells(function)]
        stamp = ""
        if origin in ("installed", "user"):
            stamp = _stamp(code.co_filename, where)
        if origin == "user":  # nobody else describes its globals
            names = sorted(_names_in(code) & function.__globals__.keys())
            parts += [(key, function.__globals__[key]) for key in names]
        text = self.describe(parts, where, lenient=origin != "user")
        return f"function {name} {stamp} {_code_digest(code)} {text}"

    def _lead_to(self, module_name: str) -> None:
        if module_name.partition(".")[0] in _FOLLOWED and not module_name.startswith(_NOT_RUN):
            self._modules.setdefault(module_name)

    def _globals(self, module_name: str) -> Iterator[str]:
        """What the functions of a library's module can name."""
        yield f"globals of {module_name}"
        for key, value in sorted(vars(sys.modules[module_name]).items()):
            if not (key.startswith("__") or _is_own(value)):
                yield f"{key} = {self.describe(value, f'{module_name}.{key}', lenient=True)}"


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _folders() -> list[tuple[str, str]]:
    """Folders and whose code lies in them, the innermost first."""
    packages = [name for name in (*_FOLLOWED, "torch") if name in sys.modules]
    folders = [(str(Path(str(sys.modules[name].__file__)).parent), name) for name in packages]
    paths = sysconfig.get_paths()
    installed = {paths["purelib"], paths["platlib"], str(Path(str(torch.__file__)).parent.parent)}
    folders += [(folder, "installed") for folder in sorted(installed)]
    return [*folders, (paths["stdlib"], "python")]


def _origin_of_file(file: str) -> str:
    """A package of _FOLLOWED, "torch", "installed", "python" (its own) or "user"."""
    return next((name for folder, name in _folders() if file.startswith(folder + os.sep)), "user")


def _origin_of_module(name: str) -> str:
    if name.partition(".")[0] in sys.stdlib_module_names:
        return "user" if name == "__main__" else "python"
    file = getattr(sys.modules.get(name), "__file__", None)
    return "user" if file is None else _origin_of_file(file)


def _origin_of(cls: type) -> str:
    return _origin_of_module(cls.__module__)


def _stamp(file: str | None, what: str) -> str:
    """A digest of a source file, the size of a binary one."""
    try:
        return _stamp_of(str(file), os.stat(str(file)).st_mtime_ns)
    except OSError:
        raise NotCacheableError(f"{what} has no source file that can be read ({file})") from None


@functools.cache
def _stamp_of(file: str, mtime_ns: int) -> str:
    path = Path(file)
    if path.suffix != ".py":
        return f"{path.stat().st_size} bytes"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cells(function: types.FunctionType) -> list[Any]:
    """What a function has closed over."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # empty: the name is not bound yet
            values.append(None)
    return values


def _names_in(code: types.CodeType) -> set[str]:
    inner = [_names_in(item) for item in code.co_consts if isinstance(item, types.CodeType)]
    return set(code.co_names).union(*inner)


@functools.cache
def _code_digest(code: types.CodeType) -> str:
    """A digest of what a function does, wherever in its file it stands."""
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags)
    text = repr((code.co_code, code.co_exceptiontable, names, counts)) + _constant(code.co_consts)
    return hashlib.sha256(text.encode()).hexdigest()


def _constant(value: Any) -> str:
    match value:
        case types.CodeType():
            return _code_digest(value)
        case tuple():
            return f"({', '.join(map(_constant, value))})"
        case frozenset():
            return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    return repr(value)


def _function_in(value: Any) -> types.FunctionType | None:
    """The Python function that a function, a method of a class or a cache around one holds."""
    for attribute in ("__func__", "func", "__wrapped__"):
        if isinstance(value, staticmethod | classmethod | functools.cached_property | _CACHED):
            value = getattr(value, attribute, value)
    return value if isinstance(value, types.FunctionType) else None


def _is_own(value: Any) -> bool:
    """Whether this is a function of fastgen's, whose patches and registrations come and go."""
    function = _function_in(value)
    return function is not None and function.__code__.co_filename.startswith(_OWN_PREFIXES)


def _is_bookkeeping(key: str, member: Any) -> bool:
    """Whether an entry of a class is not a thing that a forward could use."""
    if key in _NOTES_OF_CLASSES or isinstance(member, _DESCRIPTORS):
        return True
    return key.startswith("__") and _function_in(member) is None


def _is_configuration(value: Any) -> bool:
    """Whether an object is what its attributes say: a model's configuration, or an adapter's."""
    from transformers import PretrainedConfig

    return isinstance(value, PretrainedConfig) or dataclasses.is_dataclass(value)


def _tensor(tensor: torch.Tensor | None, ties: dict[Any, int]) -> str:
    """What a graph knows of a tensor besides its values; ties numbers tensors and storages."""
    if tensor is None:
        return "None"
    numbers = ties.setdefault(id(tensor), len(ties)), ties.setdefault(storage_of(tensor), len(ties))
    form = tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)
    return repr((_name_of(type(tensor)), *form, tensor.is_inference(), numbers))
