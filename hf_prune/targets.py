"""How much is to remain, over all structured pruners together: in multiply-accumulates, parameters, bytes or time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from .errors import PruningError
from .settings import settings

_BUDGETS = ("macs", "parameters", "size_mb", "speedup", "latency_ms")


@settings(frozen=True)
class Target:
    """How much is to remain, over all structured pruners together; they then leave `sparsity` at ``None``.

    Exactly one of the first five is said. For times, a table of what each width costs is measured on the spot, where
    training begins, and what was chosen last is measured as a whole.

    Args:
        macs: Share of the dense model's multiply-accumulates per token in the matrices that units can be cut from
            (projections and feed-forward parts), in (0, 1]; 0.5: half remains.
        parameters: Share of all of the dense model's parameters, in (0, 1].
        size_mb: Size of all parameters in the precision that they have, in 10^6 bytes.
        speedup: How many times as fast as the dense model in fp32, at least 1.
        latency_ms: Time of one forward in milliseconds, above 0.
        runtime: For times: ``"onnxruntime"`` or ``"torch"``.
        device: For times: ``"cpu"``, or for torch ``"cuda"``.
        batch: For times: rows of a forward, at least 1.
        length: For times: tokens of a row, at least 1; images have none.
        image_size: For times of images: pixels of a side, at least 1; by default what the model's config says. A recipe
            takes it from its data.
        threads: For times: threads of one operator, at least 1.
        dtype: For times: of the pruned model, ``"fp32"`` or ``"int8"`` (quantized dynamically, in ONNX Runtime).

    Example:
        >>> Target(macs=0.5).macs
        0.5
        >>> Target(speedup=2, batch=8).budget
        ('time', 0.5)
    """

    macs: float | None = None
    parameters: float | None = None
    size_mb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    speedup: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    runtime: Literal["onnxruntime", "torch"] = "onnxruntime"
    device: str = "cpu"
    batch: int = Field(default=1, ge=1)
    length: int = Field(default=128, ge=1)
    image_size: int | None = Field(default=None, ge=1)
    threads: int = Field(default=1, ge=1)
    dtype: Literal["fp32", "int8"] = "fp32"

    def __post_init__(self) -> None:
        """Exactly one budget is said, and what it needs."""
        said = self.said
        if len(said) != 1:
            raise PruningError(
                f"it takes exactly one of {', '.join(_BUDGETS)}. Received: {', '.join(said) or 'none of them'}"
            )
        for name, usual in (("dtype", "fp32"), ("device", "cpu")):
            needed = "onnxruntime" if name == "dtype" else "torch"
            if getattr(self, name) != usual and self.runtime != needed:
                raise PruningError(
                    f"{name} {getattr(self, name)!r} needs runtime={needed!r}. Received: runtime={self.runtime!r}"
                )

    def __repr__(self) -> str:
        """Show what is not as it would be anyway."""
        usual = {name: one.default for name, one in type(self).__pydantic_fields__.items()}  # type: ignore[attr-defined]
        changed = [f"{name}={getattr(self, name)!r}" for name in usual if getattr(self, name) != usual[name]]
        return f"{type(self).__name__}({', '.join(changed)})"

    @property
    def said(self) -> dict[str, float]:
        """What is to remain, by its name: one entry."""
        named = {name: getattr(self, name) for name in _BUDGETS}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def budget(self) -> tuple[str, float]:
        """The name of the budget that decides, and what is to remain: a share, or what `Budget.share` makes one of."""
        ((name, value),) = self.said.items()
        if name in ("speedup", "latency_ms"):
            return "time", 1 / value if name == "speedup" else value
        return name, value

    @field_validator("macs", "parameters")
    @classmethod
    def _share(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and not 0 < value <= 1:
            hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
            raise ValueError(f"{info.field_name} must be in (0, 1]: the share that remains. Received: {value:g}.{hint}")
        return value
