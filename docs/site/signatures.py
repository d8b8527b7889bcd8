"""Signatures of classes that write no `__init__` of their own, for mkdocstrings, which reads sources alone."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

import hf_prune


class Signatures(griffe.Extension):
    """Gives public classes that pydantic makes (settings, recipes) the signature that they are called with."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Let the one example of a docstring be read as code: griffe knows a section of several."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Add what is missing to the classes of hf_prune, once all is read."""
        if pkg.name != "hf_prune":
            return
        for name in hf_prune.__all__:
            thing = getattr(hf_prune, name)
            if inspect.isclass(thing) and thing.__module__.startswith("hf_prune"):
                read = pkg[f"{thing.__module__.removeprefix('hf_prune.')}.{name}"]
                if "__init__" not in read.members and "__init__" in thing.__dict__:
                    read.set_member("__init__", _init(thing))


def _init(thing: type) -> griffe.Function:
    self = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    told = [_parameter(one) for one in inspect.signature(thing).parameters.values()]
    return griffe.Function("__init__", parameters=griffe.Parameters(self, *told))


def _parameter(one: inspect.Parameter) -> griffe.Parameter:
    empty = inspect.Parameter.empty
    return griffe.Parameter(
        one.name,
        annotation=None if one.annotation is empty else inspect.formatannotation(one.annotation).strip("'"),
        kind=griffe.ParameterKind(one.kind.description),
        default=None if one.default is empty else repr(one.default),
    )
