"""Folders of pruned models: what is written, how it is loaded, and what is refused."""

from .classes import saved_class
from .legacy import adopt_shapes
from .loading import disable_loading, enable_loading, load_pruned
from .saving import save_pruned
from .standalone import own_code
from .telling import MARK

__all__ = [
    "MARK",
    "adopt_shapes",
    "disable_loading",
    "enable_loading",
    "load_pruned",
    "own_code",
    "save_pruned",
    "saved_class",
]
