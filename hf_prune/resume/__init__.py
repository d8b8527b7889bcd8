"""Checkpoints that survive a kill: which of them are whole, what joins them, and which one a Trainer resumes from."""

from __future__ import annotations

from .frames import fit_shapes, resumed_folder
from .joining import STATE, join_checkpoints, leave_checkpoints, read_state, seal, write_part, write_state
from .whole import ASIDE, check_resumable, fault_of, latest_checkpoint, resume_from_whole_ones, state_fault_of

__all__ = [
    "ASIDE",
    "STATE",
    "check_resumable",
    "fault_of",
    "fit_shapes",
    "join_checkpoints",
    "latest_checkpoint",
    "leave_checkpoints",
    "read_state",
    "resume_from_whole_ones",
    "resumed_folder",
    "seal",
    "state_fault_of",
    "write_part",
    "write_state",
]
