"""What scores are made from, and calibration data; another kind of evidence is one file (`register_evidence`)."""

from __future__ import annotations

from .adam import AdamGates, AdamMovement, SoftMovement
from .base import EVIDENCE, Aim, Evidence, MissingEvidence, register_evidence
from .calibration import Loss, backward_all
from .gates import Gates
from .gradient import Gradients
from .l0 import HardConcrete
from .movement import Movement
from .noise import Noise

__all__ = [
    "EVIDENCE",
    "AdamGates",
    "AdamMovement",
    "Aim",
    "Evidence",
    "Gates",
    "Gradients",
    "HardConcrete",
    "Loss",
    "MissingEvidence",
    "Movement",
    "Noise",
    "SoftMovement",
    "backward_all",
    "register_evidence",
]
