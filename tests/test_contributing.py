"""What CONTRIBUTING.md shows works as it stands there: in a process of its own, as it registers names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_example_runs():
    told = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.splitlines()[-1] == "all ran"


def main() -> None:
    import torch
    from models import build_bert, draw_batch, take_step

    from hf_prune import HeadPruner, NeuronPruner, Pruning, PruningSettings, Schedule, WeightPruner
    from hf_prune.architectures import ARCHITECTURES
    from hf_prune.packing import pack, unpack
    from hf_prune.pruners import PRUNERS

    shown: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), shown)
    square = Schedule("square_root", begin=1, end=5, frequency=2)
    units = [HeadPruner(allocation="mean_normalised"), NeuronPruner(allocation="mean_normalised")]
    for told in (
        PruningSettings(WeightPruner(sparsity=0.5, score="weight_gradient"), square),
        PruningSettings(WeightPruner(sparsity=0.5, score="steady"), square),
        PruningSettings(shown["Exploring"](sparsity=0.5, score="l1"), square),
        PruningSettings(WeightPruner(sparsity=0.5, score="l1", pattern="rows"), square),
        PruningSettings(units, square, shown["UnitTarget"](units=0.5), guards=[shown["LossBelow"]()]),
    ):
        model = build_bert()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        pruning = Pruning(model, told, total_steps=6, optimizer=optimizer)
        for step in range(6):
            take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)
            pruning.observe({"eval_loss": 1.0})
        pruning.load_state_dict(unpack(*pack(pruning.state_dict())))
        assert pruning.finished
        sparsity = pruning.logs().get("sparsity_weight", pruning.logs().get("sparsity_neuron"))
        assert 0.4 < sparsity < 0.6, (told, pruning.logs())
    assert PRUNERS["ranks"].made(sparsity=0.5).kinds([]) == ("rank",)
    assert "my_model" in ARCHITECTURES
    print("all ran")


if __name__ == "__main__":
    main()
