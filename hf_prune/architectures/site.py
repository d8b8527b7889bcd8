"""One model while it is being read: its modules by path, and slices and counters of the modules that units lie in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from ..adapters import adapters_dropped, through_adapters
from ..structure import Counter, Slice

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
STATISTICS = ("running_mean", "running_var")  # of a batch norm


@dataclass(frozen=True)
class Refusal:
    """A place whose units cannot be removed exactly, and why."""

    place: str
    reason: str


class Site:
    """A base model's modules, and what its tensors are called from the root.

    Args:
        model: The root.
    """

    def __init__(self, model: nn.Module) -> None:
        base = getattr(model, "base_model", model)
        self.prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
        self.root = cast(Any, model)
        modules = dict(base.named_modules())
        self.modules: dict[str, Any] = through_adapters(modules)
        self.adapted = [path for path, module in self.modules.items() if module is not modules[path]]

    def child(self, path: str, name: str) -> str:
        """Return the path of a child."""
        return f"{path}.{name}" if path else name

    def is_projection(self, path: str) -> bool:
        """Whether a module is a matrix between features: Linear, transposed Linear, 1x1 or plain convolution."""
        module = self.modules.get(path)
        if isinstance(module, CONVOLUTIONS):
            return bool(module.groups == 1)
        return isinstance(module, nn.Linear) or type(module).__name__ in _LIKE_LINEAR

    def width(self, path: str) -> int:
        """Return how many features a projection gives."""
        return int(self.modules[path].weight.shape[self._out(path)])

    def reads(self, path: str) -> int:
        """Return how many features a projection takes."""
        return int(self.modules[path].weight.shape[1 - self._out(path)])

    def rows(self, path: str, per_unit: int, offset: int = 0, stride: int | None = None) -> Iterator[Slice]:
        """Yield what one unit owns of a projection that computes it, or of a batch norm with its statistics."""
        yield Slice(f"{self.prefix}{path}.weight", self._out(path), per_unit, offset, stride)
        for name in ("bias", *STATISTICS):
            if getattr(self.modules[path], name, None) is not None:
                yield Slice(f"{self.prefix}{path}.{name}", 0, per_unit, offset, stride)

    def columns(self, path: str, per_unit: int) -> Slice:
        """Return what one unit owns of a projection that reads it."""
        return Slice(f"{self.prefix}{path}.weight", 1 - self._out(path), per_unit)

    def counters(
        self,
        holders: Sequence[str],
        attributes: Sequence[str],
        value: int,
        per_unit: int = 1,
        of: Literal["units", "units_per_part"] = "units",
    ) -> list[Counter]:
        """Return counters for these attributes, where a holder has them with this value."""
        return [
            Counter(self.prefix + holder, name, per_unit, of)
            for holder in dict.fromkeys(holders)
            for name in attributes
            if _number(self.modules[holder], name) == value
        ]

    def read_counts(self, path: str, names: Sequence[str]) -> list[Counter]:
        """Return counters for numbers of the config that a module's own code reads; it then gets its own copy."""
        if not hasattr(self.modules[path], "config"):
            return []
        source = source_of(type(self.modules[path]))
        return [Counter(self.prefix + path, f"config.{one}") for one in names if f"self.config.{one}" in source]

    def attribute(self, holders: Sequence[str], names: Sequence[str]) -> int | None:
        """Return the first whole number that a holder has under one of these names."""
        found = (_number(self.modules[holder], name) for holder in holders for name in names)
        return next((value for value in found if value is not None), None)

    def config(self, path: str) -> Any:
        """Return the config nearest to a module."""
        while True:
            config = getattr(self.modules[path], "config", None)
            if config is not None or not path:
                return config if config is not None else getattr(self.root, "config", None)
            path = path.rpartition(".")[0]

    def tensors(self, path: str, *, buffers: bool = True) -> dict[str, Any]:
        """Return parameters, and saved buffers, below a module by their names there."""
        module = self.modules[path]
        found = dict(module.named_parameters(remove_duplicate=False))
        if buffers:
            saved = module.state_dict(keep_vars=True)
            found |= {name: one for name, one in module.named_buffers() if name in saved and one.is_floating_point()}
        inside = [one.removeprefix(f"{path}.") for one in self.adapted if one.startswith(f"{path}.")]
        return {name: found[real] for real, name in adapters_dropped(list(found), inside).items()}

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return a parameter's shape."""
        path, _, name = parameter.rpartition(".")
        return tuple(getattr(self.modules[path], name).shape)

    def axis(self, parameter: str) -> int:
        """Return along which axis of a parameter the units that it computes lie."""
        path, _, name = parameter.rpartition(".")
        return self._out(path) if name == "weight" else 0

    def _out(self, path: str) -> int:
        return 1 if type(self.modules[path]).__name__ == "Conv1D" else 0


def setting(config: Any, *names: str) -> Any:
    """Return the first of these settings that a config states; transformers 5 raises on what differs by layer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:
            continue
        if value is not None:
            return value
    return None


def first_number(config: Any, names: Sequence[str]) -> int | None:
    """Return the first of these settings that a config states as a whole number."""
    return next((value for name in names if isinstance(value := setting(config, name), int)), None)


def source_of(code: Any) -> str:
    """Return the source of a class or function; reading it takes long, and layers share theirs."""
    return _read_source(code)


_read_source = functools.cache(inspect.getsource)


# transposed Linear; Falcon's and I-BERT's own; Gemma's clippable; what carries `weight` (out, in) and maybe `bias`
_LIKE_LINEAR = ("Conv1D", "FalconLinear", "QuantLinear", "NonDynamicallyQuantizableLinear")


def _number(module: nn.Module, name: str) -> int | None:
    value = getattr(module, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
