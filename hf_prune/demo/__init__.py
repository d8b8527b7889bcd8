"""A page in the browser: the dense model beside the pruned one, on one's own text or image."""

from .app import open_demo, serve
from .comparing import Pair, load_pair

__all__ = ["Pair", "load_pair", "open_demo", "serve"]
