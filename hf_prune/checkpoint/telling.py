"""A folder that plain `save_pretrained` has written says how it loads, where stock transformers alone cannot."""

from __future__ import annotations

import inspect
import logging
from functools import wraps
from pathlib import Path
from typing import Any

from ..plan import read_block

logger = logging.getLogger(__name__)
CARD = "README.md"
MARK = "written by hf_prune where save_pretrained has left no card; `hf-prune card` writes a whole one over it"
_TEXT = """---
library_name: transformers
tags:
- pruned
- hf_prune
---

# {name}, pruned

The layers differ in size, which stock `transformers` cannot describe: it refuses these weights. Install `hf_prune` and
import it first.

```bash
pip install hf_prune
```

```python
import hf_prune  # lets from_pretrained build the smaller shape
from transformers import {name}

model = {name}.from_pretrained("path/to/folder")
```

<!-- {mark}: remove this comment when you change the text -->
"""


def tell_how_to_load(owner: Any) -> None:
    """Let a class's `save_pretrained` write a short card beside a model that needs us, where there is no card."""
    stock = owner.save_pretrained

    @wraps(stock)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        told = inspect.signature(stock).bind(self, save_directory, *args, **kwargs).arguments
        result = stock(self, save_directory, *args, **kwargs)
        if not told.get("safe_serialization", True) and read_block(self) is not None:
            logger.warning(
                f"The weights in {save_directory} are a pickle, which hf_prune never reads: save the model again "
                "without safe_serialization=False (of TrainingArguments: save_safetensors=False)."
            )
        card = Path(save_directory) / CARD
        if told.get("is_main_process", True) and card.parent.is_dir() and (not card.exists() or _is_ours(card)):
            card.unlink(missing_ok=True)
            if needs_us(self):
                card.write_text(_TEXT.format(name=type(self).__name__, mark=MARK), "utf-8")
        return result

    owner.save_pretrained = save_pretrained


def _is_ours(card: Path) -> bool:
    return MARK in card.read_text("utf-8", errors="replace")


def needs_us(model: Any) -> bool:
    """Whether stock transformers cannot build a model's shape from its config."""
    block = read_block(model)
    return isinstance(block, dict) and bool(block.get("kept")) and not block.get("stock")
