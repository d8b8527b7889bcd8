"""A search between runs for the smallest model that is good enough; `aims` says what is tried, `trials` stores it."""

from __future__ import annotations

from .result import Candidate, SearchResult
from .running import search

__all__ = ["Candidate", "SearchResult", "search"]
