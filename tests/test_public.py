"""What the first released names mean stays: every name, every parameter in its place and with its default."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from models import build_bert

import hf_prune

LISTED = Path(__file__).parent / "public.json"


def parameters_of(thing: Any) -> list[list[str]]:
    """Return (name, kind, default) of each parameter; none of what has no signature, such as an exception."""
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return []
    return [[one.name, one.kind.name, repr(one.default)] for one in signature.parameters.values()]


def described(name: str) -> dict[str, list[list[str]]]:
    """Return the parameters of a public name, and of its public methods."""
    thing = getattr(hf_prune, name)
    if not callable(thing) or not hasattr(thing, "__name__"):
        return {}
    methods = [key for key in dir(thing) if not key.startswith("_") and inspect.isfunction(getattr(thing, key))]
    own = [key for key in methods if getattr(thing, key).__module__.startswith("hf_prune")]
    return {"": parameters_of(thing), **{key: parameters_of(getattr(thing, key)) for key in own}}


def takes(now: list[str], listed: list[str]) -> bool:
    """Whether a parameter takes what it took: it is as it was, or need not be given any more."""
    return now == listed or (now[:2] == listed[:2] and listed[2] == repr(inspect.Parameter.empty))


def test_no_name_has_gone():
    assert set(json.loads(LISTED.read_text())) <= set(hf_prune.__all__)


@pytest.mark.parametrize("name", json.loads(LISTED.read_text()))
def test_a_public_name_takes_what_it_took(name):
    told, now = json.loads(LISTED.read_text())[name], described(name)
    for method, listed in told.items():
        assert method in now, method
        names = [one[0] for one in listed]
        assert all(map(takes, [one for one in now[method] if one[0] in names], listed)), method
        assert [one[0] for one in now[method] if one[0] in names] == names, method


def test_an_older_name_of_an_argument_still_serves():
    with pytest.warns(FutureWarning, match="'shrink_live' is called 'shrink_during_training' now.*0.3"):
        told = hf_prune.PruningSettings(hf_prune.HeadPruner(sparsity=0.5), shrink_live=True)
    assert told.shrink_during_training is told.shrink_live is True
    now = hf_prune.PruningSettings(hf_prune.HeadPruner(sparsity=0.5))
    with pytest.warns(FutureWarning, match="'shrink_live' is called"):
        assert dataclasses.replace(now, shrink_live=True).shrink_during_training
    with pytest.warns(FutureWarning, match="Pruning: 'shrink_live'"):
        hf_prune.Pruning(build_bert(), told.pruners, total_steps=4, shrink_live=True).close()


if __name__ == "__main__":
    text = json.dumps({name: described(name) for name in sorted(hf_prune.__all__) if name != "__version__"})
    LISTED.write_text(text + "\n")
