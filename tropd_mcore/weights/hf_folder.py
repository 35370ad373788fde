"""Hugging Face model folders: lazy reading of safetensors, and writing a complete folder.

This module does not rename or shard tensors (`mapping`). Invariants: a reader has checked the header of every shard
before it returns a tensor. Every program that loads an accepted folder takes the same tensors from the same files. A
written folder has every tensor of its architecture and the tokenizer files of its source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tropd_mcore.errors import ModelError
from tropd_mcore.file_kinds import in_the_way
from tropd_mcore.files import shown
from tropd_mcore.weights.architecture import Architecture, read_architecture
from tropd_mcore.weights.families import check_hf_names, hf_weight_plan, is_derived, listed
from tropd_mcore.weights.json_file import read_json_object
from tropd_mcore.weights.mapping import Sliceable
from tropd_mcore.weights.publish import check_new_folder, fsync_tree, new_folder

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Size of one safetensors file. Source: the default of transformers' `save_pretrained`."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files that determine the token ids of a text."""
COMPANION_FILES = ("generation_config.json", *TOKENIZER_FILES, "chat_template.jinja", "chat_template.json")
"""Files that are copied unchanged, if the source has them."""
COMPANION_FOLDERS = ("additional_chat_templates",)
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Abbreviations of safetensors -> dtype names."""
_PLAIN_DTYPES = {*_DTYPE_NAMES, "F64"}
"""Dtypes whose numbers are the weights themselves. Narrower dtypes need scales."""
_OTHER_MODEL_FILES = {
    "adapter_config.json": "transformers would load the adapter and its base model instead; merge the adapter first",
    "hf_quant_config.json": "SGLang would load the folder as a quantised model; convert it to bfloat16 first",
}
_ORIGINAL_FILE = "consolidated.safetensors"
"""The publisher's own format, stored beside model.safetensors. SGLang ignores it too."""


_FOREIGN_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"}
"""Suffixes of weights in other formats. The first four are pickles, which can run code when they are read."""


class TensorReader:
    """Reads the tensors of one folder of any architecture. Use it as a context manager, or call `close`."""

    def __init__(self, folder: Path) -> None:
        """Open every shard and read its header. No tensor is read.

        Raises ModelError for a missing or truncated shard, or an index that does not match its shards.
        """
        self.folder = Path(folder)
        self._shards: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = self.folder / INDEX_FILE
        _check_kinds(self.folder)
        if index.is_file():
            self._open_indexed(_read_index(index))
        elif (self.folder / SINGLE_FILE).is_file():
            shard = self._open(SINGLE_FILE)
            self._file_of = dict.fromkeys(shard.keys(), SINGLE_FILE)
        else:
            others = _other_weights(self.folder)
            raise ModelError(f"model folder {shown(folder)}: neither {SINGLE_FILE} nor {INDEX_FILE} found{others}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the open files. Tensors that were already read stay valid."""
        self._shards.clear()

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor. Raises ModelError if the folder lacks it."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return one whole tensor on the CPU. Raises ModelError if the folder lacks it or its file cannot be read."""
        return self[name][:]

    def __getitem__(self, name: str) -> Sliceable:
        """Return a lazy view; slicing it reads from the file. Raises ModelError if the folder lacks the tensor."""
        return self._slice(name)

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelError(f"model folder {self.folder}: tensor {name} not found")
        return self._shards[self._file_of[name]].get_slice(name)

    def _open(self, file: str) -> Any:
        path = self.folder / file
        try:
            self._shards[file] = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise ModelError(f"{path}: not found, but {INDEX_FILE} names it") from error
        except (SafetensorError, OSError) as error:
            found = in_the_way(path)
            if found is not None:
                raise ModelError(f"{shown(path)}: expected a safetensors file; {found}") from error
            raise ModelError(
                f"{shown(path)}: damaged or truncated safetensors file ({error}); fetch it again"
            ) from error
        framework = (self._shards[file].metadata() or {}).get("format", "pt")
        if framework in ("tf", "flax"):  # their matrices are transposed
            raise ModelError(f"{path}: holds tensors of {framework}; expected the format pt")
        return self._shards[file]

    def _open_indexed(self, weight_map: dict[str, str]) -> None:
        held = {file: set(self._open(file).keys()) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise ModelError(f"{self.folder / file}: tensor {name} not found, but {INDEX_FILE} lists it there")
        for file, names in held.items():
            # transformers and SGLang load every tensor of a shard, whatever the index says.
            stray = sorted(name for name in names if weight_map.get(name) != file and not is_derived(name))
            if stray:
                there = weight_map.get(stray[0], "no file")
                raise ModelError(
                    f"{self.folder / file}: holds {listed(stray)}, but {INDEX_FILE} says {there}; remove the stale "
                    "tensors or write the folder anew"
                )
        self._file_of = weight_map


class HfReader(TensorReader):
    """Reads the tensors of one folder of a supported family slice by slice."""

    def __init__(self, folder: Path) -> None:
        """Open every shard and read its header. No tensor is read.

        Raises ModelError for a missing folder or config.json, an unsupported architecture, a missing or truncated
        shard, an index that does not match its shards, or files that different programs would load differently.
        """
        self.arch: Architecture = read_architecture(folder)
        _check_files(Path(folder))
        super().__init__(folder)

    def dtypes(self) -> set[str]:
        """Return the dtype names of all weights of the architecture. Other tensors of old files are not included."""
        stored = {self._slice(name).get_dtype() for name, _ in hf_weight_plan(self.arch) if name in self._file_of}
        return {_DTYPE_NAMES.get(code, code) for code in stored}

    def check(self) -> None:
        """Raise ModelError if a name or shape does not match config.json, or if a tensor is quantised."""
        check_hf_names(self._file_of, self.arch, source=str(self.folder))
        for name, expected in hf_weight_plan(self.arch):
            found = self.shape(name)
            if found != expected:
                raise ModelError(
                    f"{self.folder / self._file_of[name]}: {name} has shape {found}, config.json asks for {expected}"
                )
            code = self._slice(name).get_dtype()
            if code not in _PLAIN_DTYPES:
                raise ModelError(
                    f"{self.folder / self._file_of[name]}: {name} is stored as {code} and config.json has no "
                    f"quantization_config; expected {', '.join(sorted(_PLAIN_DTYPES))}"
                )


def write_hf_folder(
    out: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    source_folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers and SGLang load: safetensors, config.json, tokenizer and chat template.

    `weights` yields CPU tensors of one dtype, which is written into config.json. At most `max_shard_bytes` of them are
    held at a time. Everything except the weights comes from `source_folder`. Raises ModelError if `out` is not new or
    empty, if it cannot be written, or if names and shapes do not match the config.json of `source_folder`.
    """
    out, source_folder = Path(out), Path(source_folder)
    arch = read_architecture(source_folder)
    check_new_folder(out)
    with new_folder(out) as partial:
        try:
            written = _write_shards(partial, _checked(weights, arch, source_folder), max_shard_bytes)
            copy_companions(source_folder, partial)
            _write_config(source_folder, partial, written)
        except (OSError, SafetensorError) as error:
            problem = f"output {shown(out)}: writing failed ({error})"
            raise ModelError(f"{problem}; make room there and run it again") from error


class FolderWriter:
    """Writes a Hugging Face folder in pieces: one safetensors file per piece, then an index and everything else.

    `folder` exists and is empty. Everything except the weights comes from `source`. Whoever reads the folder must wait
    for `finish`. Names and shapes are not checked.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self._source = source
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._dtype: torch.dtype | None = None

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write contiguous CPU tensors that share no storage as one file. Raises ModelError."""
        file = f"model-{len(set(self._weight_map.values())) + 1:05d}.safetensors"
        try:
            save_file(tensors, self.folder / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{shown(self.folder / file)}: writing failed ({error}); make room there") from error
        self._weight_map |= dict.fromkeys(tensors, file)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._dtype = next(iter(tensors.values())).dtype

    def finish(self) -> None:
        """Write the index, config.json and the files of the tokenizer, and flush all. Raises ModelError."""
        assert self._dtype is not None, "a folder without weights"
        try:
            _write_json(
                self.folder / INDEX_FILE, {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
            )
            copy_companions(self._source, self.folder)
            _write_config(self._source, self.folder, self._dtype)
            fsync_tree(self.folder)
        except OSError as error:
            raise ModelError(f"{shown(self.folder)}: writing failed ({error}); make room there") from error


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings, as far as `source` has them."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in COMPANION_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def _check_kinds(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        if not path.is_file():  # for example a pipe: opening it would wait for ever
            raise ModelError(f"{shown(path)}: expected a safetensors file; {in_the_way(path)}")


def _check_files(folder: Path) -> None:
    """Refuse files that make transformers, SGLang and this project load different weights."""
    _check_kinds(folder)
    for name, reason in _OTHER_MODEL_FILES.items():
        if (folder / name).exists():
            raise ModelError(f"model folder {folder}: has {name} beside its weights: {reason}")
    if not (folder / SINGLE_FILE).is_file():
        return
    if (folder / INDEX_FILE).is_file():
        if set(_read_index(folder / INDEX_FILE).values()) != {SINGLE_FILE}:
            raise ModelError(
                f"model folder {folder}: has both {SINGLE_FILE}, which transformers reads, and {INDEX_FILE}, which "
                "SGLang reads; remove the stale one"
            )
        return
    others = sorted({path.name for path in folder.glob("*.safetensors")} - {SINGLE_FILE})
    if others and others != [_ORIGINAL_FILE]:
        raise ModelError(
            f"model folder {folder}: has {listed(others)} beside {SINGLE_FILE}: SGLang would load them all; move them "
            "away"
        )


def _other_weights(folder: Path) -> str:
    """Return the end of a message that names the weights found instead of safetensors."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _FOREIGN_WEIGHTS)
    if not names:
        return "; expected the weights there"
    cure = "load it with transformers and save it with save_pretrained(..., safe_serialization=True)"
    return f", but {listed(names)}: weights of another format are not read; {cure}"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{path}: weight_map is not an object of tensor name to file name")
    outside = sorted(file for file in set(weight_map.values()) if Path(file).name != file)
    if outside:
        raise ModelError(f"{path}: weight_map names files outside the folder ({', '.join(outside)})")
    return weight_map


def _checked(
    weights: Iterable[tuple[str, Tensor]], arch: Architecture, source_folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield `weights` unchanged; raise at the first one that does not fit, or at the end if one is missing."""
    plan = dict(hf_weight_plan(arch))
    seen: set[str] = set()
    dtypes: set[torch.dtype] = set()
    for name, tensor in weights:
        if name not in plan:
            raise ModelError(f"{name}: not a weight of {source_folder / 'config.json'} ({arch.family})")
        if tuple(tensor.shape) != plan[name]:
            raise ModelError(f"{name}: expected shape {plan[name]}, found {tuple(tensor.shape)}")
        if name in seen:
            raise ModelError(f"{name}: given twice")
        dtypes.add(tensor.dtype)
        if len(dtypes) > 1:
            raise ModelError(f"{name}: weights have several dtypes ({', '.join(sorted(map(str, dtypes)))})")
        seen.add(name)
        yield name, tensor
    check_hf_names(seen, arch, source=f"weights to write with the config.json of {source_folder}")


def _write_shards(folder: Path, weights: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Write the shards and, if there are several, their index; returns the dtype."""
    # Phase 1: stream the tensors into shards with temporary names, because the final names contain the shard count.
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        save_file(held, folder / _temporary_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > max_shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.contiguous()
        held_bytes, total_bytes, dtype = held_bytes + size, total_bytes + size, tensor.dtype
    flush()
    assert dtype is not None, "the check of names has passed, so there are tensors"
    # Phase 2: final names, then the index.
    if len(shards) == 1:
        (folder / _temporary_name(0)).rename(folder / SINGLE_FILE)
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _temporary_name(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return dtype


def _temporary_name(number: int) -> str:
    return f"shard-{number:05d}.tmp"


def _write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the source's config.json with the new dtype, under the dtype keys that the source uses."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    config |= dict.fromkeys(keys or ["dtype"], str(dtype).removeprefix("torch."))
    _write_json(target / "config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
