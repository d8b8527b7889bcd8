"""How much to learn from labels, and how much of what from a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainValidator

from ..errors import PruningError
from ..settings import settings


def _weight(value: Any) -> float | tuple[float, float]:
    """Check a weight: a number, or a start and an end."""
    ends = value if isinstance(value, (list, tuple)) else (value,)
    numbers = [isinstance(end, (int, float)) and not isinstance(end, bool) and 0 <= end < float("inf") for end in ends]
    if not all(numbers) or (isinstance(value, (list, tuple)) and len(value) != 2):
        raise ValueError("a weight must be a number of at least 0, or two of them: (start, end)")
    return float(value) if len(ends) == 1 else (float(ends[0]), float(ends[1]))


if TYPE_CHECKING:
    Weight = float | tuple[float, float]
else:  # pydantic would warn of the list that a tuple is in YAML
    Weight = Annotated[Any, PlainValidator(_weight)]


@settings(frozen=True)
class Distillation:
    """How much to learn from labels, and how much from the teacher.

    The loss is ``hard * (the Trainer's own) + logits * T^2 * KL(teacher_T || student_T) + hidden * H + attention * A
    + relations * R``.

    A weight is a number, or ``(start, end)``: then it goes linearly with training progress, from `start` at the first
    step to `end` after the last. Terms of weight 0 cost nothing.

    Args:
        temperature: T, softens both distributions; above 0 (Hinton et al. 2015, arXiv:1503.02531).
        hard: Weight of the loss that the Trainer computes without a teacher, at least 0.
        logits: Weight of the Kullback-Leibler term, at least 0. For regression it is the squared difference, for models
            of embeddings 1 - their cosine.
        hidden: Weight of H, at least 0: the squared distance of layers' outputs, each scaled to length 1, the mean over
            positions that are not padding (Sun et al. 2019, arXiv:1908.09355). Where the teacher has another width, a
            matrix is learned between the two (Jiao et al. 2020, arXiv:1909.10351), which is not part of the model.
        attention: Weight of A, at least 0: KL(teacher || student) of attention's distributions over keys, the mean over
            queries that are not padding (Sun et al. 2020, arXiv:2004.02984). While it trains, both models run with
            ``attn_implementation="eager"``, as others hand out no maps.
        layer_map: Which layer of the teacher a layer of the student learns from, in dense numbers: ``"uniform"``, at
            the same share of the depth; ``"last"``, the last that the student has from the teacher's last, and no other
            (as in MiniLM, Wang et al. 2020); ``{student's: teacher's, ...}``; or ``"nearest"``, for `hidden` alone:
            each layer of the teacher is matched with that layer of the student whose output is nearest to its own on
            this batch, behind the matrix between different widths, and in order, so that their lines do not cross (as
            in CoFi, Xia et al. 2022, arXiv:2204.00408).
        heads: ``"mean"`` compares the average over heads; ``"kept"`` each head with the teacher's of the same dense
            number: for a teacher that is the dense model itself.
        teacher_dtype: What the teacher computes in; ``None``: as it comes.
        cache: Folder that keeps the teacher's logits by what a row holds, so that it is asked about each row once, in
            all epochs and runs: for classifiers and regression, with `top_k` for language models, with nothing to be
            learned but logits, and data that are not augmented. ``None``: it is asked each time.
        top_k: How many of its most probable words `cache` keeps of each token of a language model, at least 1: the loss
            is the divergence over these and the rest of the words as one (Tan et al. 2019, arXiv:1902.10461, keep the
            first 8 words, without the rest). ``None``: the teacher is no language model.
        cache_dtype: What the logarithms of these words' probabilities are kept in.
        relations: Weight of R, at least 0: KL(teacher || student) of how alike tokens are, softmax(X X^T / sqrt(width))
            over those that are not padding, the mean of X as queries, keys and values of one layer (MiniLM, Wang et al.
            2020, arXiv:2002.10957, 2021, arXiv:2012.15828). The student's last layer that has heads learns; the two may
            have other widths.
        relation_heads: Into how many equal parts queries, keys and values of all heads are split, at least 1, for
            students whose heads stay (MiniLMv2): it must divide their width, and of pruned heads the width that is
            left. ``None``: each head is one, compared as `heads` says.
        relation_layer: Layer of the teacher whose relations are learned, in dense numbers; ``None``: the last.

    Example:
        >>> Distillation(temperature=4.0, hidden=(1.0, 0.0)).weight("hidden", progress=0.25)
        0.75
    """

    temperature: float = Field(default=2.0, gt=0)
    hard: Weight = 0.5
    logits: Weight = 0.5
    hidden: Weight = 0.0
    attention: Weight = 0.0
    layer_map: Literal["uniform", "last", "nearest"] | dict[int, int] = "uniform"
    heads: Literal["mean", "kept"] = "mean"
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    cache: str | None = None
    top_k: int | None = Field(default=None, ge=1)
    cache_dtype: Literal["float16", "float32"] = "float16"
    relations: Weight = 0.0
    relation_heads: int | None = Field(default=None, ge=1)
    relation_layer: int | None = Field(default=None, ge=0)

    def __post_init__(self) -> None:
        """Only logits are kept, and what is said of layers is for terms of layers."""
        if self.top_k is not None and self.cache is None:
            raise PruningError(
                "top_k says what cache keeps of a language model: give cache a folder, or leave top_k out. "
                f"Received: top_k={self.top_k}, cache=None"
            )
        if self.layer_map == "nearest" and self.uses("attention"):
            raise PruningError(
                "layer_map='nearest' matches the outputs of layers: for attention take another map. "
                f"Received: layer_map='nearest', attention={self.attention!r}"
            )
        if self.layer_map != "uniform" and not (self.uses("hidden") or self.uses("attention")):
            raise PruningError(
                "layer_map says which layers are compared: give hidden or attention a weight, or leave layer_map out. "
                f"Received: layer_map={self.layer_map!r}, hidden={self.hidden!r}, attention={self.attention!r}"
            )
        inside = [term for term in ("hidden", "attention", "relations") if self.uses(term)]
        if self.cache is not None and inside:
            raise PruningError(
                f"cache keeps a teacher's logits: it must be left out where {inside[0]} is above 0. "
                f"Received: cache={self.cache!r}, {inside[0]}={getattr(self, inside[0])!r}"
            )

    def weight(self, term: str, progress: float) -> float:
        """Return the weight of a term.

        Args:
            term: ``hard``, ``logits``, ``hidden``, ``attention`` or ``relations``.
            progress: Share of the training that is done, in [0, 1].
        """
        weight: float | tuple[float, float] = getattr(self, term)
        return weight[0] + (weight[1] - weight[0]) * progress if isinstance(weight, tuple) else weight

    def uses(self, term: str) -> bool:
        """Whether the weight of a term is above 0 at any time."""
        return max(self.weight(term, 0.0), self.weight(term, 1.0)) > 0
