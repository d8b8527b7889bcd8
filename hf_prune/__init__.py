"""Make any Hugging Face transformer smaller and really faster, from the Trainer you already use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from wrapt import when_imported

__version__ = "0.1.0"

# Public name -> module; a module is imported when a name of it is first used, so that `import hf_prune` stays cheap.
_PUBLIC = {
    **dict.fromkeys(["Kind", "register_kind"], "kinds"),
    **dict.fromkeys(["Kept", "Slice", "Counter", "Group"], "structure"),
    **dict.fromkeys(["PruningError", "UnsupportedModelError", "CheckpointError", "RecipeError"], "errors"),
    **dict.fromkeys(["find_groups", "register_architecture"], "architectures"),
    **dict.fromkeys(["mask_units", "shrink"], "removal"),
    **dict.fromkeys(["verify", "VerifyReport"], "selfcheck"),
    "register_score": "scores",
    **dict.fromkeys(["Schedule", "register_schedule"], "schedules"),
    "register_allocation": "allocation",
    "register_rule": "rules",
    "register_pattern": "patterns",
    **dict.fromkeys(["Evidence", "register_evidence"], "evidence"),
    "adopt_torch_masks": "masks",
    "merge_adapters": "adapters",
    **dict.fromkeys(["Pruner", "HeadPruner", "NeuronPruner", "LayerPruner", "ExpertPruner"], "pruners"),
    **dict.fromkeys(["ChannelPruner", "WeightPruner", "register_pruner"], "pruners"),
    "Target": "targets",
    **dict.fromkeys(["Pruning", "PruningSettings", "prune"], "session"),
    **dict.fromkeys(["AccuracyGuard", "Guard", "register_guard", "register_budget"], "session"),
    **dict.fromkeys(["Regularisation", "register_regularisation"], "session"),
    **dict.fromkeys(["Rewinding", "rewind"], "rewinding"),
    **dict.fromkeys(["Sensitivity", "sensitivity"], "layerwise"),
    "PruningCallback": "callback",
    "PruningArguments": "arguments",
    "latest_checkpoint": "resume",
    **dict.fromkeys(["Distillation", "DistillationMixin", "DistillationTrainer"], "distillation"),
    **dict.fromkeys(["Report", "Measurement", "measure"], "report"),
    **dict.fromkeys(["save_pruned", "load_pruned", "adopt_shapes", "disable_loading"], "checkpoint"),
    **dict.fromkeys(["push_pruned", "model_card"], "hub"),
    **dict.fromkeys(["export", "export_onnx", "Exported", "OnnxExport"], "exporting"),
    **dict.fromkeys(["Recipe"], "recipe"),
    **dict.fromkeys(["run"], "workflow"),
    **dict.fromkeys(["SearchResult", "search"], "searching"),
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_prune' has no attribute '{name}'")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)


def _teach_from_pretrained(modeling_utils: Any) -> None:
    from .checkpoint import enable_loading
    from .checkpoint.telling import tell_how_to_load
    from .checkpoint.with_base import save_base_with_adapters

    enable_loading(modeling_utils)
    save_base_with_adapters(modeling_utils.PreTrainedModel)
    tell_how_to_load(modeling_utils.PreTrainedModel)


def _teach_quantizers(base: Any) -> None:
    from .checkpoint.quantizing import spare_empty_modules

    spare_empty_modules(base)


def _teach_optimum(convert: Any) -> None:
    from .exporting.past import follow_heads

    follow_heads(convert)


def _teach_peft(peft_model: Any) -> None:
    from .checkpoint.with_base import teach_peft

    teach_peft(peft_model)


# Cheap, and in whichever order the two are imported: runs when (or if already) transformers' models are imported.
when_imported("transformers.modeling_utils")(_teach_from_pretrained)
when_imported("transformers.quantizers.base")(_teach_quantizers)
when_imported("optimum.exporters.onnx.convert")(_teach_optimum)
when_imported("peft.peft_model")(_teach_peft)
