"""What scores are made from, and calibration data; another kind of evidence is one file (`register_evidence`)."""

from __future__ import annotations

from .base import EVIDENCE, Aim, Evidence, MissingEvidence, register_evidence
from .calibration import Loss, backward_all
from .gates import Gates
from .gradient import Gradients
from .movement import Movement
from .noise import Noise

__all__ = [
    "EVIDENCE",
    "Aim",
    "Evidence",
    "Gates",
    "Gradients",
    "Loss",
    "MissingEvidence",
    "Movement",
    "Noise",
    "backward_all",
    "register_evidence",
]
