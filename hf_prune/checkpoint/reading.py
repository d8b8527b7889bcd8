"""Reading a stranger's folder: what its files must be before, and what must have arrived after loading."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..errors import CheckpointError, shown, visible
from ..files import check_depth, check_json_size, read_json, without_config
from ..plan import BLOCK, check_block, new_block
from .bounds import check_sizes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
_WEIGHT_TYPES = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}  # without quantization: weights, counters and masks
_PER_BYTE, _SPARE = (
    8,
    2**24,
)  # parameters a byte of the files (two, in four bits), and as many for new heads and buffers
_HALF = {"F16": "float16", "BF16": "bfloat16"}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@contextmanager
def clear_errors(path: Any) -> Iterator[None]:
    """Turn whatever a damaged folder makes others raise into a `CheckpointError` that says which folder it was."""
    try:
        yield
    except (CheckpointError, torch.cuda.OutOfMemoryError, ImportError):
        raise
    except Exception as error:  # absurd settings fail anywhere in the model's own code, with whatever they like
        why = without_config(path) or "a file is damaged, config.json is another model's, or an argument is wrong"
        raise CheckpointError(
            f"The model in '{path}' cannot be loaded: {why}. "
            f"Received: {type(error).__name__}: {visible(str(error)[:500])}"
        ) from error


def written_config(path: Any, config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a folder's config.json; empty where there is none, or where loading it is not our business.

    Args:
        path: A folder or a name on the Hub.
        config: What `from_pretrained` was given; a config object without our block is nobody's business.
        arguments: Those of `from_pretrained`.
    """
    from transformers import PretrainedConfig

    given = isinstance(config, PretrainedConfig)
    if path is None or arguments.get("gguf_file") or (given and not states_plan(config.to_dict())):
        return {}
    check_json_size(Path(str(path), str(arguments.get("subfolder") or ""), CONFIG))
    try:
        told, _ = PretrainedConfig.get_config_dict(path if given or not config else config, **hub_arguments(arguments))
    except RecursionError:
        raise CheckpointError(f"{CONFIG} must not be nested so deeply. Received: '{path}'") from None
    except (OSError, ValueError):  # stock loading says it better
        return dict(vars(config)) if given else {}
    except TypeError:
        told = None
    if not isinstance(told, dict):
        raise CheckpointError(f"{CONFIG} must be a mapping. Received: '{path}'")
    check_depth(told, CONFIG)
    return dict(told)


def states_plan(config: Mapping[str, Any]) -> bool:
    """Whether a written config, or that of a part inside of it, holds a plan."""
    return BLOCK in config or any(states_plan(one) for one in config.values() if isinstance(one, Mapping))


def check_files(path: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[float, int]:
    """Check a folder's plan and weight files before any tensor is loaded.

    Returns:
        How many parameters the model may have at most, so that a damaged config cannot ask for gigabytes, and how many
        tensors with entries the files hold.

    Raises:
        CheckpointError: A file's name leads elsewhere, a header is damaged, a tensor has a type that no weight has, a
            digest differs, or the config states sizes that the weights are too few for.
    """
    _check_blocks(config)
    _check_kernels(config)
    _check_name(config.get("transformers_weights") or WEIGHTS)
    files = _weight_files(path, config, arguments)
    quantized = bool(arguments.get("quantization_config")) or is_quantized(config)
    _check_makers(files)
    types = {name: kind for file in files for name, kind in _tensor_types(file).items()}
    if not quantized:
        _check_types(types, str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch."))
    if config.get(BLOCK, {}).get("digests"):
        _check_digests(files, json.loads(Path(_local(path, CONFIG, arguments)).read_text("utf-8")))
    if not files:
        if arguments.get("use_safetensors") and not (arguments.get("variant") or config.get("transformers_weights")):
            raise CheckpointError(
                f"A pruned model needs {WEIGHTS}, or {INDEX} and the files that it names. Received: none"
            )
        return math.inf, 0
    return _check_room(config, files)


def check_config(path: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Check the sizes in a folder's config before even a config object is made: some make a list as long as they say.

    Raises:
        CheckpointError: A file's name leads elsewhere, or the weights are too few for the sizes.
    """
    files = _weight_files(path, config, arguments)
    if files:
        _check_room(config, files)


def _check_room(config: Mapping[str, Any], files: list[str]) -> tuple[float, int]:
    room, tensors = _SPARE + _PER_BYTE * sum(Path(file).stat().st_size for file in files), _filled(files)
    check_sizes(config, tensors, room)
    return room, tensors


def _filled(files: list[str]) -> int:
    """Return how many tensors have entries: an empty one costs its maker a line, and us a layer."""
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            count += sum(all(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config states a quantization that transformers knows: any other, it leaves out, with a warning."""
    from transformers.quantizers.auto import AutoHfQuantizer

    stated: Any = config.get("quantization_config")
    stated = stated.to_dict() if hasattr(stated, "to_dict") else stated
    if not isinstance(stated, dict):
        return False
    try:
        return bool(AutoHfQuantizer.supports_quant_method(stated))
    except (ValueError, TypeError):  # no method, or one that is no text
        return False


def _check_blocks(config: Mapping[str, Any]) -> None:
    if BLOCK in config:
        check_block(config[BLOCK])
    for one in config.values():
        if isinstance(one, Mapping):
            _check_blocks(one)


def _check_kernels(config: Mapping[str, Any], *, chosen: bool = False) -> None:
    """Refuse a config that names code on the Hub for a part of the model: transformers would fetch and run it."""
    for key, value in config.items():
        chooses = chosen or "_implementation" in key
        if isinstance(value, Mapping):
            _check_kernels(value, chosen=chooses)
        elif chooses and "/" in str(value):
            raise CheckpointError(
                f"{CONFIG} must not choose code that is run: take '{key:.80}' out of it, and hand it to "
                f"from_pretrained where you trust that repository. Received: {shown(value)}"
            )


def check_arrived(model: Any, saved: Any, info: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check that everything a pruned model needs came out of the files: stock loading only warns, and draws it anew.

    Args:
        model: The loaded model.
        saved: ``config.architectures``.
        info: Stock loading's `output_loading_info`.
        config: The written config.

    Raises:
        CheckpointError: Tensors are missing, or the class that was saved has no use for some.
    """
    if is_quantized(config):
        return
    tables = {name for name, one in model.named_buffers() if not one.is_floating_point()}  # made by the constructor
    missing, unexpected = sorted({*info["missing_keys"]} - tables), sorted(info["unexpected_keys"])
    kind = type(model).__name__
    if kind not in (saved or ()):  # another head: it is drawn anew, and the old one is left out
        missing, unexpected = [name for name in missing if _is_shared(model, name, missing)], []
    if missing:
        raise CheckpointError(
            f"The weights must hold every tensor of {kind}. Received: none of {missing[:4]}{_more(missing)}"
        )
    if unexpected:
        raise CheckpointError(
            f"Every tensor of the weights must have a place in {kind}. Received: {unexpected[:4]}{_more(unexpected)}"
        )


def check_places(model: Any, path: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Check that no tensor of the files has taken another's place, and that whole numbers have filled no weight.

    transformers 5 reads ``bert.bert.pooler`` as ``bert.pooler``, and ``gamma`` as ``weight``: the last one wins.

    Raises:
        CheckpointError: Two tensors are for one place, or one is of a type that no weight has.
    """
    if is_quantized(config) or arguments.get("quantization_config"):
        return
    types = {
        name: kind for file in _weight_files(path, config, arguments) for name, kind in _tensor_types(file).items()
    }
    live, prefix = model.state_dict(), f"{model.base_model_prefix}."
    for name, kind in types.items():
        plain = re.sub(r"\bbeta$", "bias", re.sub(r"\bgamma$", "weight", name))
        places = {plain, prefix + plain, plain.removeprefix(prefix)} - {name}
        twice = next((place for place in places if place in types), None) if name not in live else None
        if twice is not None:
            raise CheckpointError(f"Each tensor must be there once. Received: '{name:.80}' beside '{twice:.80}'")
        if kind in ("I64", "BOOL") and name in live and live[name].is_floating_point():
            raise CheckpointError(f"Weights must be of a floating type. Received: {name:.80} is {kind}")


def write_digests(folder: Path) -> None:
    """Add the SHA-256 of each tensor, and of the config itself, to the block of a written folder's config.json."""
    path = folder / CONFIG
    config = json.loads(path.read_text("utf-8"))
    config[BLOCK] = {**new_block(), **config.get(BLOCK, {})}
    digests = {name: text for file in sorted(folder.glob("*.safetensors")) for name, text in _digests(file)}
    config[BLOCK]["digests"] = {CONFIG: _config_digest(config), **digests}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of `from_pretrained` that say where files lie."""
    return {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}


def refuse_pickle(path: Any) -> None:
    """Refuse what other pruning tools leave: a pickle of a whole model, which runs code when it is read.

    Raises:
        CheckpointError: `path` is such a file, or a folder of such files; it says how to convert it.
    """
    place = Path(str(path))
    inside = sorted(one for one in place.iterdir() if one.suffix in _PICKLES) if place.is_dir() else []
    readable = place.is_dir() and (place / "config.json").is_file()
    pickle = place if place.is_file() and place.suffix in _PICKLES else inside[0] if inside and not readable else None
    if pickle is not None:
        raise CheckpointError(
            "A pickle runs code when it is read: we never do. Where you trust it, convert it in the environment that "
            "made it: model = torch.load(file, weights_only=False) (LLM-Pruner: take ['model']), then "
            f"hf_prune.adopt_shapes(model) and hf_prune.save_pruned(model, folder). Received: {pickle.name}"
        )


def _weight_files(path: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Return the local paths of the safetensors files that will be read; none where a folder has others."""
    given = arguments.get("transformers_weights", getattr(arguments.get("config"), "transformers_weights", None))
    named = config.get("transformers_weights") if given is None else given
    if named is not None:  # transformers reads these, whatever else is there
        _check_name(named)
        file = _local(path, named, arguments, must=True)
        return _shards(path, file, arguments) if named.endswith(".json") else [file]
    variant = f".{arguments['variant']}" if arguments.get("variant") else ""
    single = _local(path, WEIGHTS.replace(".", f"{variant}.", 1), arguments)
    if single is not None:
        return [single]
    index = _local(path, INDEX.replace(".json", f"{variant}.json"), arguments)
    return [] if index is None else _shards(path, index, arguments)


def _shards(path: Any, index: str, arguments: Mapping[str, Any]) -> list[str]:
    stated = read_json(index)["weight_map"]
    for name in stated.values():
        _check_name(name)
    files = {name: _local(path, name, arguments, must=True) for name in sorted(set(stated.values()))}
    held = {tensor: name for name, file in files.items() for tensor in _tensor_types(file)}
    odd = next((name for name in sorted({*stated, *held}) if stated.get(name) != held.get(name)), None)
    if odd is not None:  # transformers 4 believes the index, and leaves at random what is not there
        raise CheckpointError(f"{INDEX} must say of each tensor which file holds it. Received: '{odd:.80}'")
    return list(files.values())


def _local(path: Any, name: str, arguments: Mapping[str, Any], *, must: bool = False) -> Any:
    from transformers.utils import cached_file

    return cached_file(path, name, _raise_exceptions_for_missing_entries=must, **hub_arguments(arguments))


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors(\.index\.json)?", name):
        raise CheckpointError(f"Weight files must be safetensors files of the folder itself. Received: {shown(name)}")


def _tensor_types(file: str) -> dict[str, str]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118


def _check_makers(files: list[str]) -> None:
    """Check that files say they are torch's: transformers 4 would look for TensorFlow, where they name it."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stated = (tensors.metadata() or {}).get("format", "pt")
        if stated not in ("pt", "mlx"):
            raise CheckpointError(
                "Weight files must be torch's: where they are, write them again with "
                "safetensors.torch.save_file(tensors, file, metadata={'format': 'pt'}). "
                f"Received: format {shown(stated)} in {Path(file).name}"
            )


def _check_types(types: Mapping[str, str], stated: str) -> None:
    """Check tensors' types: read as another type of the same size, weights would be other numbers."""
    halves = {kind for kind in types.values() if kind in _HALF}
    wrong = set(types.values()) - _WEIGHT_TYPES
    if stated in _HALF.values():
        wrong |= {kind for kind in halves if _HALF[kind] != stated}
    elif len(halves) > 1 or stated == "float32":
        wrong |= halves
    if stated and stated != "float64":
        wrong |= {"F64"}
    odd = next((name for name, kind in types.items() if kind in wrong), None)
    if odd is not None:
        raise CheckpointError(
            f"Weights must be of one floating type, as config.dtype says. Received: {odd} is {types[odd]}"
        )


def _digests(file: str | Path) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name and the SHA-256 of its type, its shape and its bytes."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            view, tensor = tensors.get_slice(name), tensors.get_tensor(name).contiguous()
            told = hashlib.sha256(f"{view.get_dtype()} {view.get_shape()}\n".encode())
            told.update(tensor.flatten().view(torch.uint8).numpy().data)
            yield name, told.hexdigest()


def _config_digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a written config without its digests, whatever the order of its keys."""
    block = {key: value for key, value in config[BLOCK].items() if key != "digests"}
    return hashlib.sha256(json.dumps({**config, BLOCK: block}, sort_keys=True).encode()).hexdigest()


def _check_digests(files: list[str], config: Mapping[str, Any]) -> None:
    found = {name: text for file in files for name, text in _digests(file)}
    found[CONFIG], stated = _config_digest(config), config[BLOCK]["digests"]
    different = sorted(name for name in {*found, *stated} if found.get(name) != stated.get(name))
    if different:
        raise CheckpointError(
            f"Each tensor, and the config, must have the SHA-256 of {BLOCK}.digests. Received: {len(different)} "
            f"others, first '{different[0]:.80}'"
        )


def _is_shared(model: Any, name: str, missing: list[str]) -> bool:
    """Whether a missing tensor belongs to what all heads share, rather than to a new head or pooler."""
    prefix = f"{model.base_model_prefix}."
    base = getattr(model, model.base_model_prefix, model)
    if base is not model and not name.startswith(prefix):
        return False
    child = name.removeprefix(prefix).split(".")[0]
    module = getattr(base, child, None)
    if not isinstance(module, nn.Module):
        return True
    tensors = [f"{child}.{one}" for one, _ in module.named_parameters()]
    if any(one not in missing and prefix + one not in missing for one in tensors):
        return "cross" not in name
    return any(isinstance(one, (nn.Embedding, nn.ModuleList)) for one in module.modules())


def _more(names: list[str]) -> str:
    return " …" if len(names) > 4 else ""
