"""Names of 0.1.0 still import, from where they live now."""

import importlib
import sys
import warnings

import pytest

from r2ec_trl.moved import HOMES


@pytest.mark.parametrize("name", HOMES)
def test_an_old_module_gives_the_names_of_its_new_homes(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"r2ec_trl.{name}", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(f"r2ec_trl.{name}")
    if module.__spec__.origin is None:  # else the module is there again under its old name, and wins
        assert any("has moved" in str(warning.message) for warning in caught)
    home = importlib.import_module(f"r2ec_trl.{HOMES[name][0]}")
    public = [key for key, value in vars(home).items() if getattr(value, "__module__", "") == home.__name__]
    assert public and all(getattr(module, key) is getattr(home, key) for key in public if key[0] != "_")
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'"):
        module.nothing_of_the_kind


def test_what_was_never_there_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("r2ec_trl.never_there")
