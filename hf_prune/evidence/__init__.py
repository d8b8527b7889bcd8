"""What scores are made from, and calibration data; another kind of evidence is one file (`register_evidence`)."""

from __future__ import annotations

from .activations import ActivationGradients, Activations, Inputs
from .base import EVIDENCE, Calibration, Evidence, MissingEvidence, register_evidence
from .calibration import Loss, backward_all
from .gates import Gates
from .gradient import Gradients
from .influence import BlockInfluence
from .movement import Movement
from .noise import Noise
from .perturbing import InputSensitivity
from .removing import GreedyOrder, LossWithout
from .squares import GradientSquares

__all__ = [
    "EVIDENCE",
    "ActivationGradients",
    "Activations",
    "BlockInfluence",
    "Calibration",
    "Evidence",
    "Gates",
    "GradientSquares",
    "Gradients",
    "GreedyOrder",
    "InputSensitivity",
    "Inputs",
    "Loss",
    "LossWithout",
    "MissingEvidence",
    "Movement",
    "Noise",
    "backward_all",
    "register_evidence",
]
