"""Megatron's `torch_dist` checkpoint format, written without child processes and read without running pickled code.

This module does not decide what is saved (`checkpoint`). Both strategies keep Megatron's format and its resharding.
They replace Megatron's own strategies for two reasons. Its writer starts a Manager and one forked process per file,
and these outlive a killed run. Its reader unpickles `.metadata` and object shards without restriction. Invariant:
nothing in a checkpoint can name a function to call. Tensors and `common.pt` are read by torch's `weights_only` loader,
`.metadata` by an unpickler with a list of allowed classes, and object shards are refused.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

# Megatron's format is built on ShardedTensor, so torch would print this warning on every load and every rank.
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)

_INDEX_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
}


class InProcessSave(SaveShardedStrategy):
    """Writes one file per rank from the calling thread and flushes it. A failure on any rank is raised on all ranks.

    `group` contains all ranks (gloo). Its first rank writes `.metadata`.
    """

    can_handle_sharded_objects = True

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__("torch_dist", 1)
        self._group = group

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Write the main replicas of `sharded_state_dict`; collective over the group."""
        flat, _, _ = torch_strategies._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        dcp.save(
            torch_strategies.mcore_to_pyt_state_dict(flat, is_loading=False),
            # More threads would write more files, but torch loses an exception that is raised in one of them.
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=1, sync_files=True),
            planner=torch_strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=self._group,
        )


class RestrictedLoad(torch_strategies.TorchDistLoadShardedStrategy):
    """Megatron's reader with a restricted unpickler. `group` contains all ranks (gloo)."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        """Fill the tensors of `sharded_state_dict` in place and return them unwrapped; collective over the group."""
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        original = sharded_state_dict
        flat, flat_mapping, renamed = torch_strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = torch_strategies.mcore_to_pyt_state_dict(flat, is_loading=True)
        dcp.load(
            state,
            storage_reader=_RestrictedReader(checkpoint_dir),
            planner=_TensorPlanner(
                shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
            ),
            process_group=self._group,
        )
        unwrapped = {name: torch_strategies._unwrap_pyt_sharded_tensor(value) for name, value in state.items()}
        loaded = torch_strategies._replace_sharded_keys_with_state_dict_keys(unwrapped, flat_mapping, renamed)
        torch_strategies._restore_dict_types(loaded, original)
        return loaded


class _TensorPlanner(torch_strategies.MCoreLoadPlanner):
    """Reads tensors only, because an object shard would be unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise RuntimeError(f"checkpoint holds the pickled object {read_item.dest_index.fqn}; only tensors are read")


class _RestrictedReader(dcp.FileSystemReader):
    """torch's reader with a restricted unpickler for the index `.metadata`, which it reads on construction."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with open(self.fs.concat_path(self.path, ".metadata"), "rb") as stream:
            self._metadata = _RestrictedUnpickler(stream).load()

    def read_metadata(self) -> Metadata:  # torch's has a parameter `rank`; here one index serves all ranks
        """Return the index."""
        return self._metadata


class _RestrictedUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for every global that is not allowed."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and (module == "torch" or module == _INDEX_MODULE or (module, name) in _ALLOWED_NAMES):
            found = super().find_class(module, name)
            defined_there = isinstance(found, type) and found.__module__ == _INDEX_MODULE
            if isinstance(found, torch.dtype) or defined_there or (module, name) in _ALLOWED_NAMES:
                return found
        raise pickle.UnpicklingError(f"checkpoint index names {module}.{name}, which is not allowed in an index")
