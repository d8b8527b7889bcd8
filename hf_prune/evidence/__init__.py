"""What scores are made from, and calibration data; another kind of evidence is one file (`register_evidence`)."""

from __future__ import annotations

from .activations import ActivationGradients, Activations, Inputs
from .adam import AdamGates, AdamMovement, SoftMovement
from .base import EVIDENCE, Aim, Calibration, Evidence, MissingEvidence, register_evidence
from .calibration import Loss, backward_all
from .gates import Gates
from .gradient import Gradients
from .influence import BlockInfluence
from .l0 import HardConcrete
from .movement import Movement
from .noise import Noise
from .perturbing import InputSensitivity
from .removing import GreedyOrder, LossWithout
from .squares import GradientSquares

__all__ = [
    "EVIDENCE",
    "ActivationGradients",
    "Activations",
    "AdamGates",
    "AdamMovement",
    "Aim",
    "BlockInfluence",
    "Calibration",
    "Evidence",
    "Gates",
    "GradientSquares",
    "Gradients",
    "GreedyOrder",
    "HardConcrete",
    "InputSensitivity",
    "Inputs",
    "Loss",
    "LossWithout",
    "MissingEvidence",
    "Movement",
    "Noise",
    "SoftMovement",
    "backward_all",
    "register_evidence",
]
