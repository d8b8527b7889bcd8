"""What a student learns from a teacher on one batch, term by term."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, PruningError
from ..resume import write_part
from .hearing import Forward, answers, by_name, flat, hear
from .layers import (
    Anatomy,
    Attention,
    Key,
    Place,
    candidate_layers,
    listen,
    nearest_in_order,
    pair_layers,
    take_hidden,
    take_map,
    use_eager_attention,
)
from .losses import attention_loss, hidden_loss, layer_distances
from .matching import match_outputs
from .memory import Memory
from .outputs import output_loss, positions
from .relations import check_relation_heads, pair_relations, relations_between
from .settings import Distillation
from .teacher import known_words, teacher_inputs

PROJECTIONS = "distillation.safetensors"
TERMS = ("logits", "hidden", "attention", "relations")


@dataclass
class Heard:
    """What a student's forwards are compared in, and the forwards."""

    wanted: set[str]
    layers: Sequence[tuple[Key, Key]]
    maps: Mapping[Place, Place]
    relations: Mapping[Place, Place]
    forwards: list[Forward]


class Lesson:
    """What a student learns from a teacher on one batch, term by term.

    Args:
        student: The model that learns, not wrapped.
        teacher: The teacher, in evaluation mode.
        settings: Which terms, and how they are computed.
        seed: For the matrices between hidden states of different widths.
        memory: What the teacher has answered before; ``None``: it is asked each time.

    Raises:
        PruningError: The two have no layers that could be compared.
    """

    def __init__(
        self, student: Any, teacher: Any, settings: Distillation, seed: int = 0, memory: Memory | None = None
    ) -> None:
        self.student, self.teacher, self.settings, self.seed = student, teacher, settings, seed
        self.memory = memory
        self.columns = match_outputs(student, teacher)
        self.projections = nn.ModuleDict()
        self.implementations: dict[int, tuple[Any, str]] = {}
        if any(settings.uses(term) for term in TERMS if term != "logits"):
            self.anatomies = Anatomy(student), Anatomy(teacher)
            self._check()
        self.draw(seed)

    def _check(self) -> None:
        """Check that there is something to be compared inside of both models."""
        settings, both = self.settings, f"{type(self.student).__name__}, {type(self.teacher).__name__}"
        layers = candidate_layers(settings.layer_map, *self.anatomies)
        if not layers:
            raise PruningError(
                "Distillation of hidden states, attention or relations needs layers in a list. "
                f"Received: {type(self.student).__name__}"
            )
        if settings.uses("attention") and not self._pair_attentions(dict(layers)):
            raise PruningError(
                f"Distillation.attention needs attentions whose heads hf_prune finds in both models. Received: {both}"
            )
        if not settings.uses("relations"):
            return
        pairs = pair_relations(settings, *self.anatomies)
        if not pairs:
            raise PruningError(
                "Distillation.relations needs attentions of both models with queries, keys and values from three "
                f"projections, or from one in three blocks. Received: {both}"
            )
        for pair in pairs.items():
            for anatomy, place, whose in zip(self.anatomies, pair, ("student", "teacher")):
                check_relation_heads(settings.relation_heads, anatomy, place, whose)

    def terms(
        self, model: Any, inputs: Mapping[str, Any], labels: Collection[str], weights: Mapping[str, float]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run both models; return the student's outputs, and the terms whose weight is above 0.

        Args:
            model: The student, possibly wrapped.
            inputs: The batch.
            labels: Names of labels.
            weights: Weight of each term now.
        """
        with self.hear(model, weights) as heard:
            outputs = model(**inputs)
        return outputs, self.learn(heard, inputs, labels)

    @contextmanager
    def hear(self, model: Any, weights: Mapping[str, float]) -> Iterator[Heard]:
        """Collect the student's forwards while a Trainer computes its loss.

        Args:
            model: The student, possibly wrapped.
            weights: Weight of each term now.
        """
        wanted, settings = {term for term in TERMS if weights.get(term, 0.0) > 0}, self.settings
        layers = candidate_layers(settings.layer_map, *self.anatomies) if "hidden" in wanted else []
        maps = self._pair_attentions(pair_layers(settings.layer_map, *self.anatomies)) if "attention" in wanted else {}
        relations = pair_relations(settings, *self.anatomies) if "relations" in wanted else {}
        heard = Heard(wanted, layers, maps, relations, [])
        with hear(model, self.student, lambda stack: self._listen(stack, 0, heard)) as heard.forwards:
            yield heard

    def learn(
        self,
        heard: Heard,
        batch: Mapping[str, Any],
        labels: Collection[str],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, Tensor]:
        """Ask the teacher what the student was asked; return each term, the mean over the student's forwards.

        Args:
            heard: What `hear` collected.
            batch: What the Trainer was given; its labels say what counts.
            labels: Names of labels.
            autocast: What the teacher computes in; the terms themselves are computed in float32.
        """
        found: dict[str, list[Tensor]] = {}
        for forward in heard.forwards if heard.wanted else ():
            for name, value in self._compare(heard, forward, batch, labels, autocast).items():
                found.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def _compare(
        self, heard: Heard, forward: Forward, batch: Mapping[str, Any], labels: Collection[str], autocast: Any
    ) -> dict[str, Tensor]:
        with ExitStack() as stack, torch.no_grad(), autocast():
            theirs = self._listen(stack, 1, heard)
            taught = self._ask(self._readable(teacher_inputs(self.teacher, forward.inputs, labels)))
        given = batch.get("labels")
        given = given if torch.is_tensor(given) else None
        inputs = flat(forward.inputs if given is None else {**forward.inputs, "labels": given})
        terms: dict[str, Tensor | None] = {}
        if "logits" in heard.wanted:
            mine, temperature = answers(self.student, forward), self.settings.temperature
            terms["logits"] = output_loss(self.student, mine, taught, inputs, temperature, self.columns, given)
        if heard.layers:
            terms["hidden"] = self._hidden(heard.layers, forward.inside[0], theirs[0], inputs)
        if heard.maps:
            terms["attention"] = self._attention(heard.maps, forward.inside[1], theirs[1], inputs)
        if heard.relations:
            terms["relations"] = self._relations(heard.relations, forward.inside[2], theirs[2], inputs)
        return {name: value for name, value in terms.items() if value is not None}

    def _readable(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs without words that only the student has."""
        ours, theirs = self.columns.sizes or (0, 0)
        return known_words(inputs, theirs) if theirs < ours else inputs

    def _ask(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the teacher's outputs by name: from memory, where there is one."""

        def ask() -> Mapping[str, Any]:
            return by_name(self.teacher, self.teacher(**inputs))

        return ask() if self.memory is None else self.memory.answers(inputs, ask)

    def restore(self) -> None:
        """Give models back the attention that they came with."""
        for model, before in self.implementations.values():
            model.set_attn_implementation(before)
        self.implementations = {}

    def _listen(self, stack: ExitStack, which: int, heard: Heard) -> Any:
        """Start to collect what is compared of the student (0) or the teacher (1): layers, maps, projections."""
        if not (heard.layers or heard.maps or heard.relations):
            return {}, {}, {}
        anatomy = self.anatomies[which]
        model: Any = anatomy.model
        if heard.maps and (before := use_eager_attention(model)):
            self.implementations[id(model)] = model, before
        layers, maps, relations = (
            {pair[which] for pair in pairs} for pairs in (heard.layers, heard.maps.items(), heard.relations.items())
        )
        paths = {key: path for key, path in anatomy.layers().items() if key in layers}
        cores = {place: one.module for place, one in anatomy.attentions().items() if place in maps}
        wanted = {one.module for place, found in anatomy.vectors().items() if place in relations for one in found}
        hidden, attention, vectors = (
            stack.enter_context(listen(model, modules, take))
            for modules, take in ((paths.values(), take_hidden), (cores.values(), take_map), (wanted, take_hidden))
        )
        return _Named(paths, hidden), _Named(cores, attention), vectors

    def _hidden(
        self, layers: Sequence[tuple[Key, Key]], ours: _Named, theirs: _Named, inputs: Mapping[str, Any]
    ) -> Any:
        students = {mine: self._projected(mine[0], ours.get(mine)) for mine, _ in layers}
        pairs = [
            (mine, student, teacher)
            for mine, its in layers
            if (student := students[mine]) is not None and (teacher := theirs.get(its)) is not None
        ]
        for (name, number), student, teacher in pairs:
            _check_alike(f"{name}.{number}", student, teacher)
        masks = {name: positions(self.student, inputs, name, student.shape) for (name, _), student, _ in pairs}
        if self.settings.layer_map == "nearest":
            lists = ([pair for pair in pairs if pair[0][0] == name] for name in masks)
            pairs = [one for pairs, mask in zip(lists, masks.values()) for one in _nearest(pairs, mask)]
        losses = [hidden_loss(student, teacher, masks[name]) for (name, _), student, teacher in pairs]
        return torch.stack(losses).mean() if losses else None

    def _projected(self, name: str, hidden: Tensor | None) -> Any:
        """Return a layer's output as wide as the teacher's."""
        matrix = self.projections_by_name.get(name)
        return hidden if matrix is None or hidden is None else matrix(hidden.float())

    def _relations(
        self, pairs: Mapping[Place, Place], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], inputs: Any
    ) -> Any:
        losses = []
        for pair in pairs.items():
            (mine, *_), (its, *_) = (anatomy.vectors()[place] for anatomy, place in zip(self.anatomies, pair))
            if mine.module not in ours or its.module not in theirs:
                continue
            check_relation_heads(self.settings.relation_heads, self.anatomies[0], pair[0], "student")
            queries = ours[mine.module]
            _check_alike(".".join(map(str, pair[0])), queries[..., :1], theirs[its.module][..., :1])
            mask = positions(self.student, inputs, pair[0][0], queries.shape)
            losses.append(relations_between(self.settings, self.anatomies, pair, (ours, theirs), mask))
        return torch.stack(losses).mean() if losses else None

    def _attention(self, maps: Mapping[Place, Place], ours: _Named, theirs: _Named, inputs: Mapping[str, Any]) -> Any:
        student, teacher = (anatomy.attentions() for anatomy in self.anatomies)
        losses = []
        for mine, its in maps.items():
            pair = self._select(mine, student[mine], teacher[its], ours.get(mine), theirs.get(its))
            if pair is not None:
                _check_alike(".".join(map(str, mine)), *pair)
                mask = positions(self.student, inputs, mine[0], (len(pair[0]), *pair[0].shape[2:]))
                losses.append(attention_loss(*pair, mask))
        if maps and not losses:
            raise PruningError(
                "Distillation.attention needs models that hand out attention maps: load both with "
                f"attn_implementation='eager'. Received none from {type(self.student).__name__}"
            )
        return torch.stack(losses).mean()

    def _select(
        self, place: Place, mine: Attention, its: Attention, ours: Tensor | None, theirs: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return both maps with the heads that are compared; ``None`` where one has no map."""
        if ours is None or theirs is None:
            return None
        alive = self.anatomies[0].alive(mine) if mine.heads else list(range(ours.shape[1]))
        if not alive:
            return None
        if self.settings.heads == "mean":
            return ours[:, alive].mean(1, keepdim=True), theirs.mean(1, keepdim=True)
        numbers = {number: live for live, number in enumerate(its.heads)}
        missing = [mine.heads[i] for i in alive if mine.heads and mine.heads[i] not in numbers]
        if missing or not mine.heads:
            raise PruningError(
                f"Distillation.heads='kept' needs a teacher with the student's heads of {'.'.join(map(str, place))}. "
                f"Received one without {missing or 'numbered heads'}"
            )
        return ours[:, alive], theirs[:, [numbers[mine.heads[i]] for i in alive]]

    def _pair_attentions(self, layers: Mapping[Key, Key]) -> dict[Place, Place]:
        student, teacher = (anatomy.attentions() for anatomy in self.anatomies)
        pairs = {place: (*layers[place[:2]], place[2]) for place in student if place[:2] in layers}
        return {mine: its for mine, its in pairs.items() if its in teacher}

    def draw(self, seed: int) -> None:
        """Draw a matrix for each list of layers that is wider or narrower than the teacher's; seeded on its own."""
        self.seed, self.projections = seed, nn.ModuleDict()
        if not self.settings.uses("hidden"):
            return
        ours, theirs = (anatomy.widths for anatomy in self.anatomies)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, width in ours.items():
                if theirs.get(name, width) != width:
                    self.projections[name.replace(".", "_")] = nn.Linear(width, theirs[name], bias=False)

    def save(self, folder: Path) -> None:
        """Write the matrices into a checkpoint."""
        if len(self.projections):
            write_part(self.projections.state_dict(), folder / PROJECTIONS)

    def load(self, folder: Path) -> None:
        """Read the matrices of a checkpoint.

        Raises:
            CheckpointError: It has none.
        """
        if not len(self.projections):
            return
        if not (folder / PROJECTIONS).is_file():
            raise CheckpointError(
                f"{folder} has no {PROJECTIONS}, the matrices between the widths of student and teacher: resume from "
                "another checkpoint, start again, or train with Distillation.hidden=0. "
                f"Received: {sorted(path.name for path in folder.glob('*'))}"
            )
        self.projections.load_state_dict(load_file(folder / PROJECTIONS))

    @property
    def projections_by_name(self) -> dict[str, nn.Module]:
        """The matrices by the name of their list of layers."""
        return {
            name: self.projections[key]
            for name in self.anatomies[0].dense
            if (key := name.replace(".", "_")) in self.projections
        }


class _Named:
    """What `listen` collects, by the keys that its paths belong to."""

    def __init__(self, paths: Mapping[Any, str], heard: Mapping[str, Tensor]) -> None:
        self.paths, self.heard = paths, heard

    def get(self, key: Any) -> Tensor | None:
        return self.heard.get(self.paths.get(key, ""))


def _nearest(pairs: Sequence[tuple[Key, Tensor, Tensor]], mask: Tensor | None) -> list[tuple[Key, Tensor, Tensor]]:
    """Return those of one list's pairs in which each layer of the teacher is with the student's nearest, in order.

    Args:
        pairs: Each layer of the teacher, in order, with each of the student's, in order.
        mask: Which positions count.
    """
    count = sum(teacher is pairs[0][2] for _, _, teacher in pairs)  # layers of the student
    students, teachers = [one[1].detach() for one in pairs[:count]], [one[2] for one in pairs[::count]]
    chosen = nearest_in_order(layer_distances(students, teachers, mask))
    return [pairs[count * row + column] for row, column in enumerate(chosen)]


def _check_alike(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise PruningError(
            f"What '{name}' of the student hands out must have the teacher's shape {tuple(teacher.shape)}: both must "
            f"read the same tokens. Received: {tuple(student.shape)}"
        )
