"""Untested versions are warned of, tested ones are not."""

import pytest

from fastgen import versions


@pytest.mark.parametrize(
    ("torch", "warned"),
    [("2.11.0", False), ("2.13.1+cpu", False), ("2.10.2", True), ("3.0", True), ("dev", True)],
)
def test_warning(monkeypatch, caplog, torch, warned):
    found = {"torch": torch, "transformers": "5.23.0"}
    monkeypatch.setattr(versions.metadata, "version", found.get)
    versions.warn_of_untested_versions.cache_clear()
    versions.warn_of_untested_versions()
    versions.warn_of_untested_versions.cache_clear()
    assert ("untested" in caplog.text) is warned
    assert "transformers" not in caplog.text
