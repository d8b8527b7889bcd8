"""Masked units that may come back are computed where evidence sees batches, behind shut gates, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..evidence import Evidence
from ..live import LiveModel, Masking


class Seeing:
    """Masked units are computed in those forwards from which scores are read, and never saved or stepped so.

    Args:
        live: The live model.
        masking: What is masked of it.
        evidence: What scores are made from.
        hooked: Whether training batches are seen: then the model's own forward shows masked units.
    """

    def __init__(self, live: LiveModel, masking: Masking, evidence: Iterable[Evidence], *, hooked: bool) -> None:
        self._live, self._masking = live, masking
        self._evidence = [one for one in evidence if one.sees_masked]
        self._gone = masking.gone([])
        self._hooks: list[Any] = []
        self._hooked = hooked and bool(set(masking.returning) & set(masking.chosen))

    def start(self) -> None:
        """Hook the model, where training batches are seen."""
        if self._hooked:
            model: Any = self._live.model
            hook = torch.compiler.disable(self._before_forward)  # type: ignore[no-untyped-call]
            self._hooks.append(model.register_forward_pre_hook(hook, prepend=True))
            self._hooks.append(model.register_state_dict_pre_hook(self._before_saving))

    def look(self) -> None:
        """Find out what is masked and may come back: masks have changed."""
        self._gone = self._masking.gone({name for one in self._evidence for name in one.groups})

    def show(self) -> None:
        """Put masked units that may come back to work, behind shut gates."""
        if self._gone and not self._masking.shown:
            self._masking.show()
            for one in self._evidence:
                one.shut(self._gone)

    def hide(self) -> None:
        """Let masked units be zeros again, before an optimizer's step, an evaluation or a checkpoint sees them."""
        if self._masking.shown:
            for one in self._evidence:
                one.shut({})
            self._masking.hide()

    def stop(self) -> None:
        """Hide masked units, and take the hooks away."""
        self.hide()
        for hook in self._hooks:
            hook.remove()

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and any(one.active for one in self._evidence):
            self.show()

    def _before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.hide()
