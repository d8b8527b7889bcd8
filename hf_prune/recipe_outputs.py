"""What a recipe says of everything behind its training: how models are measured, exported and described."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RecipeSettings(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)


class MeasureSettings(RecipeSettings):
    """How latency is measured.

    Args:
        batch: Rows in one forward.
        length: Tokens in a row of text.
        threads: Threads of one operator.
        repeats: Timed forwards of each model; the median counts.
    """

    batch: int = Field(default=1, ge=1)
    length: int = Field(default=128, ge=1)
    threads: int = Field(default=1, ge=1)
    repeats: int = Field(default=20, ge=1)


class ExportSettings(RecipeSettings):
    """One file for another runtime, of the pruned model.

    Args:
        format: Of the file.
        quantize: ``null``, ``dynamic`` (int8) or ``static`` (int8, calibrated on batches of the training data).
        dtype: ``fp32`` or ``fp16``.
        batches: How many batches of training data static quantization calibrates on.
    """

    format: Literal["onnx", "openvino", "executorch"] = "onnx"
    quantize: Literal["dynamic", "static"] | None = None
    dtype: Literal["fp32", "fp16"] = "fp32"
    batches: int = Field(default=8, ge=1, le=32)

    @model_validator(mode="after")
    def _one_way(self) -> ExportSettings:
        if self.quantize is not None and self.dtype != "fp32":
            raise ValueError(
                f"either quantize or dtype makes numbers smaller. Received: {self.quantize!r} and {self.dtype!r}"
            )
        if self.format == "executorch" and (self.quantize is not None or self.dtype != "fp32"):
            raise ValueError(f"executorch is exported in fp32. Received: {self.quantize!r} and {self.dtype!r}")
        return self

    @property
    def folder(self) -> str:
        """Its name in the folder of the run, such as ``onnx`` or ``onnx-int8``."""
        numbers = {None: "" if self.dtype == "fp32" else self.dtype, "dynamic": "int8", "static": "int8-static"}
        return "-".join(filter(None, (self.format, numbers[self.quantize])))


def as_list(given: Any) -> Any:
    """Return several exports as they are, and one that stands without a list as a list."""
    return [] if given is None else given if isinstance(given, list) else [given]


class CardSettings(RecipeSettings):
    """What the card cannot find out: where a local copy of a model or data set comes from, and under which terms.

    Args:
        base_model: Hub name of the dense model, where `model.name` is a local copy of it.
        datasets: Hub names of the data, where `data.name` or `data.files` are local copies.
        license: The Hub's identifier; by default what the dense model's own card says.
    """

    base_model: str | None = None
    datasets: list[str] = []
    license: str | None = None
