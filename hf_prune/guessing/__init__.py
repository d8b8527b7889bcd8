"""A recipe from a model and its data: what nobody says is guessed, and it is said what was guessed and why."""

from .guess import Guess, Wish, guess

__all__ = ["Guess", "Wish", "guess"]
