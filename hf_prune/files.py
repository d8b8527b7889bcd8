"""Where the files that travel with the library lie: recipes and card templates."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import PruningError

_PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """Return a folder of shipped files: inside the installed package, or beside it in a checkout.

    Args:
        folder: ``"recipes"`` or ``"model_cards"``.

    Raises:
        PruningError: The folder is in neither place, so the installation is incomplete.
    """
    for home in (_PACKAGE, _PACKAGE.parent):
        if (home / folder).is_dir():
            return home / folder
    raise PruningError(f"The folder '{folder}' did not come with this installation of hf_prune; install it again.")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text, without holding the file in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
