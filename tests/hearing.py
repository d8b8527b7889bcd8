"""Sounds made on the spot, and tiny models that hear them: each letter of what is said is a tone of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from scipy.io import wavfile

RATE = 16000
TONES = {"a": 400, "b": 900, "c": 1600}  # Hz
LETTER = 0.05  # seconds


def tones(text: str, rate: int = RATE) -> Any:
    """Return a sound of one tone a letter, as whole numbers of 16 bits."""
    times = np.arange(round(LETTER * rate)) / rate
    silence = np.zeros_like(times)
    parts = [np.sin(2 * np.pi * TONES[one] * times) if one in TONES else silence for one in text]
    return (np.concatenate(parts) * 20000).astype(np.int16)


def write_sound(path: Path, text: str, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, tones(text, rate))
    return path


def of_classes(folder: Path, rows: int = 40) -> str:
    """Write a folder for each class, one of them at half the rate."""
    for number in range(rows):
        name, rate = (("low", RATE), ("high", RATE // 2))[number % 2]
        write_sound(folder / name / f"{number}.wav", "aa" if name == "low" else "bb", rate)
    return str(folder)


def with_texts(folder: Path, texts: Iterable[str]) -> str:
    """Write sounds, and what is said in them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,text"]
    for number, text in enumerate(texts):
        write_sound(folder / f"{number}.wav", text)
        lines.append(f"{number}.wav,{text}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def save_wav2vec2(folder: Path, made: str = "Wav2Vec2Model", **settings: Any) -> str:
    """Write a tiny model of frames, its extractor and its tokenizer of capital letters."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    ears = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (20, 16), "num_feat_extract_layers": 2}
    ears["feat_extract_norm"] = "layer"  # a group norm averages over time, padding too: such models take no mask
    still = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    words = {"vocab_size": 8, "pad_token_id": 0, "classifier_proj_size": 16}
    config = transformers.Wav2Vec2Config(**{**sizes, **ears, **still, **words, **settings})
    getattr(transformers, made)(config).save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate(["<pad>", "<unk>", "|", *"ABCDE"])}
    (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(Path(folder) / "vocab.json"), bos_token=None, eos_token=None)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


def save_whisper(folder: Path, **settings: Any) -> str:
    """Write a tiny Whisper that hears a second, with a tokenizer of single bytes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(Path(folder))
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    ids = {"pad_token_id": 256, "eos_token_id": 256, "bos_token_id": 257, "decoder_start_token_id": 257}
    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 24}
    both = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    ends = {"max_source_positions": 50, "max_target_positions": 32, "num_mel_bins": 8, "vocab_size": 260}
    free = {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = transformers.WhisperConfig(**{**ids, **both, **ends, **free, "d_model": 16, **settings})
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config._from_model_config = False  # or what further it says is dropped when it is read
    model.generation_config.no_timestamps_token_id = 259
    model.save_pretrained(folder)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


def byte_tokenizer(folder: Path) -> Any:
    """Return Whisper's tokenizer with 256 bytes, and its special tokens behind them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]
    vocabulary = {one: number for number, one in enumerate([*bytes_to_unicode().values(), *special])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = transformers.WhisperTokenizer(*files, pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    return tokenizer
