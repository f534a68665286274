"""A pytest plugin: the tests of a checkout of transformers, every model that generates optimised.

With `--suite-mode=fastgen` the first `generate()` of a model optimises it, and every call is
recorded: made by the engine, or by transformers' loop and why. With `--suite-mode=baseline` nothing
is changed. In both, a test begins with random numbers of its own, so that both see the same model
and the same inputs. `run.py` runs both and compares.
"""

from __future__ import annotations

import functools
import inspect
import json
import random
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

MIXIN = "GenerationTesterMixin"
KV_CACHE_BYTES = 8 << 20


class OptimizedCalls:
    """Optimises each model at its first `generate()`, and notes who made each call's tokens."""

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []
        self._optimized: list[weakref.ref] = []
        self._refused: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._counting: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
        self._running = threading.local()

    def install(self) -> None:
        from transformers import GenerationMixin

        GenerationMixin.generate = self._counted(GenerationMixin.generate)

    def _counted(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if id(model) in self._models_in_call():  # fastgen's patch, on its way to transformers
                return inner(model, *args, **kwargs)
            refusal = self._refusal(model)
            with self._in_call(model):
                if refusal is None:
                    return self._call_optimized(model, args, kwargs)
                self._note(model, "loop", refusal)
                return inner(model, *args, **kwargs)

        self._counting.add(generate)
        return generate

    def _models_in_call(self) -> set[int]:
        return vars(self._running).setdefault("models", set())

    @contextmanager
    def _in_call(self, model: Any) -> Iterator[None]:
        models = self._models_in_call()
        models.add(id(model))
        try:
            yield
        finally:
            models.discard(id(model))

    def _refusal(self, model: Any) -> str | None:
        """Optimise a model that is not; why fastgen cannot, or None."""
        import fastgen
        from fastgen.api import lookup

        if model in self._refused:
            return self._refused[model]
        if lookup(model) is None:
            random_state = torch.get_rng_state()
            try:
                fastgen.optimize(model, kv_cache_memory_bytes=KV_CACHE_BYTES)
            except fastgen.UnsupportedModelError as error:
                self._refused[model] = f"refused: {error}"
                return self._refused[model]
            assert torch.equal(random_state, torch.get_rng_state()), (
                "fastgen.optimize drew random numbers of torch's generator"
            )
            self._optimized.append(weakref.ref(model))
        cls = type(model)
        if cls.generate not in self._counting:
            cls.generate = self._counted(cls.generate)
        return None

    def _call_optimized(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        import fastgen

        before = fastgen.explain(model)
        try:
            result = type(model).generate(model, *args, **kwargs)
        except Exception as error:
            self._note(model, "raised", type(error).__name__)
            raise
        after = fastgen.explain(model)
        loops = {
            reason
            for reason, count in after.fallbacks.items()
            if count > before.fallbacks.get(reason, 0)
        }
        steps = (after.metrics.engine_steps if after.metrics else 0) - (
            before.metrics.engine_steps if before.metrics else 0
        )
        if not loops:
            assert steps > 0, "generate() returned, and neither engine nor transformers' loop ran"
            self._note(model, "engine", "")
        for reason in sorted(loops):
            self._note(model, "loop", reason)
        return result

    def _note(self, model: Any, who: str, why: str) -> None:
        self.calls.append({"model": type(model).__name__, "by": who, "why": why})

    def end_test(self) -> list[dict[str, str]]:
        """What was called since the last time; engines end, models are as they were."""
        import fastgen
        from fastgen.api import lookup

        for ref in self._optimized:
            if (model := ref()) is not None and lookup(model) is not None:
                fastgen.restore(model)
        calls, self.calls, self._optimized = self.calls, [], []
        return calls


class SuitePlugin:
    """Chooses the tests, seeds each, and writes a line of JSON when one begins and when it ends."""

    def __init__(self, record: Path, calls: OptimizedCalls | None) -> None:
        self.record, self.calls = record, calls
        self.begun = {line["test"] for line in read_lines(record)}
        self.reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        chosen = [i for i in items if about_generation(i) and i.nodeid not in self.begun]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.reports.clear()
        self._write({"test": item.nodeid, "event": "begins"})
        seed_everything(zlib.crc32(item.nodeid.encode()))
        result = yield
        outcome, reason = self._outcome()
        calls = []
        try:
            calls = self.calls.end_test() if self.calls else []
        except Exception as error:
            outcome, reason = "failed", f"fastgen.restore: {type(error).__name__}: {error}"
        seconds = sum(report.duration for report in self.reports)
        ends = {"outcome": outcome, "reason": reason, "calls": calls, "seconds": round(seconds, 2)}
        self._write({"test": item.nodeid, "event": "ends", **ends})
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def _outcome(self) -> tuple[str, str]:
        for report in self.reports:
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                return "failed", crash.message if crash else str(report.longrepr)
        for report in self.reports:
            if report.skipped and type(report) is pytest.TestReport:
                why = report.longrepr
                return "skipped", str(why[2] if isinstance(why, tuple) else why)
        return "passed", ""

    def _write(self, line: dict[str, Any]) -> None:
        with self.record.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(record: Path) -> list[dict[str, Any]]:
    """The lines of a record, all but one that was cut short."""
    if not record.exists():
        return []
    lines = record.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def about_generation(item: Any) -> bool:
    """In a model's test file: tests of the generation mixin, and those that call generate()."""
    if "models" not in item.path.parts:
        return True
    mixins = [cls for cls in getattr(item.cls, "__mro__", ()) if cls.__name__ == MIXIN]
    if any(hasattr(mixin, item.name) for mixin in mixins):
        return True
    try:
        return ".generate(" in inspect.getsource(inspect.unwrap(item.function))
    except (OSError, TypeError):
        return False


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    common = sys.modules.get("tests.test_modeling_common")
    if hasattr(common, "global_rng"):  # of the inputs that transformers' tests draw
        common.global_rng.seed(seed)  # pyright: ignore


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgen on transformers' tests")
    group.addoption("--suite-mode", choices=("baseline", "fastgen"), required=True)
    group.addoption("--suite-record", type=Path, required=True, help="lines of JSON; is continued")


def pytest_configure(config: pytest.Config) -> None:
    calls = None
    if config.getoption("suite_mode") == "fastgen":
        calls = OptimizedCalls()
        calls.install()
    config.pluginmanager.register(SuitePlugin(config.getoption("suite_record"), calls))
