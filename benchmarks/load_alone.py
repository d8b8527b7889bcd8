"""What the loading matrix needs where hf_prune is not installed, and the process that loads standalone folders there.

    python benchmarks/load_alone.py ROOT MODEL ...

One JSON line for each cell under ROOT/LANE/MODEL/KIND. The interpreter is one that has transformers and lacks hf_prune.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

LANE = "optimum" if version("transformers").startswith("4.") else "v5"
ACROSS_LANES = 1e-5  # of the largest output; on one lane outputs are equal bit for bit
CELL = "cell.pt"  # what the live model was and answered
REASON = "reason.txt"  # instead of it, where nothing could be saved


def digest(model: Any) -> str:
    """Return a digest of all tensors' names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def own_memory(model: Any) -> None:
    """Copy all tensors to memory of their own.

    Which kernel adds up odd widths depends on where a loaded tensor lies in its file.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def environment_without_us(folder: Path) -> Path:
    """Make a virtualenv that sees this lane's packages but hf_prune, and return its interpreter.

    Packages installed in editable form are found by a file in the lane's folder that only the lane itself reads.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    (packages / "lane.pth").write_text(str(Path(torch.__file__).parent.parent))
    return next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())


def load_standalone(folder: Path, told: dict[str, Any]) -> float | str:
    """Load one folder by its Auto class and its own code; return the difference, or what went wrong."""
    if isinstance(told["standalone"], str):
        return f"not applicable: {told['standalone']}"
    auto = getattr(transformers, told["auto"])
    model = auto.from_pretrained(folder / "standalone", trust_remote_code=True, dtype=torch.float32).eval()
    if type(model).__name__ != told["class"]:
        return f"failed: is a {type(model).__name__}, and a {told['class']} was saved"
    if told["lane"] == LANE and digest(model) != told["digest"]:
        return "failed: tensors differ from those that were saved"
    own_memory(model)
    with torch.no_grad():
        got = model(**told["inputs"]).logits.float()
    value = float((got - told["output"]).abs().max() / told["output"].abs().max())
    return value if value <= (0.0 if told["lane"] == LANE else ACROSS_LANES) else f"failed: differs by {value:.1e}"


def main(root: Path, names: list[str]) -> None:
    """Load every standalone folder, and print one line of JSON for each."""
    if getattr(importlib.util.find_spec("hf_prune"), "origin", None):  # a folder of data files has none
        raise SystemExit("hf_prune is installed here, so that loading would prove nothing")
    for folder in sorted(path for name in names for path in root.glob(f"*/{name}/*")):
        try:
            reason = folder / REASON
            value = reason.read_text() if reason.is_file() else load_standalone(folder, torch.load(folder / CELL))
        except Exception as error:  # a cell of the matrix, not the end of it
            value = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps([*folder.relative_to(root).parts, "standalone", value]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
