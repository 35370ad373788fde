"""The objectives of the matrix: every kind of the configuration, in every variant with its own path to a gradient.

Invariant: every kind of `ObjectiveConfig` is here (tests/unit/test_conformance_oracle.py). The support sizes are small,
because the vocabulary of the cases is small.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from tropd_mcore.config.objectives import KINDS, ObjectiveConfig

TOPK = 5
"""Teacher candidates per token, more than the width of the narrowest shard"""
STUDENT_TOPK = 4
"""Student candidates per token"""


@dataclass(frozen=True)
class Entry:
    """One row of the matrix."""

    name: str
    """kind, or kind/variant"""
    objective: ObjectiveConfig
    progress: float
    """step / run.steps"""


def select(patterns: tuple[str, ...]) -> tuple[Entry, ...]:
    """Return the entries that match one of `patterns` (a kind, a full name or a shell pattern); all without patterns.

    Raises KeyError with the pattern that matches nothing.
    """
    if not patterns:
        return ENTRIES
    for pattern in patterns:
        if not any(_matches(entry.name, pattern) for entry in ENTRIES):
            raise KeyError(pattern)
    return tuple(entry for entry in ENTRIES if any(_matches(entry.name, pattern) for pattern in patterns))


def _matches(name: str, pattern: str) -> bool:
    return name.partition("/")[0] == pattern or fnmatch.fnmatchcase(name, pattern)


def _entries() -> tuple[Entry, ...]:
    parse = TypeAdapter[ObjectiveConfig](ObjectiveConfig).validate_python
    entries = []
    for name, (keys, progress) in _SETTINGS.items():
        kind = name.partition("/")[0]
        kind = "custom" if kind in ("log_prob", "entropy") else kind
        entries.append(Entry(name, parse({"kind": kind, **_sizes(kind), **keys}), progress))
    return tuple(entries)


def _sizes(kind: str) -> dict[str, Any]:
    """Small numbers of candidates, for kinds that have such a key with a default other than 0."""
    fields, sizes = KINDS[kind].model_fields, {"topk": TOPK, "student_topk": STUDENT_TOPK}
    return {name: size for name, size in sizes.items() if name in fields and fields[name].default}


def _tropd(trust: str, outlier: str, norm: str, prefix: str, **more: Any) -> dict[str, Any]:
    return {
        "trust": {"mode": trust},
        "outlier": {"mode": outlier, "norm": norm, "topk": TOPK, "weight": 0.7},
        "guidance": {"loss": prefix, "beta": 0.3},
        **more,
    }


def _policy(**keys: Any) -> dict[str, Any]:
    return {"policy_gradient": keys}


_CUSTOM = "tropd_mcore.conformance.elementary"

_SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "log_prob": ({"function": f"{_CUSTOM}:negative_log_prob"}, 0.0),
    "entropy": ({"function": f"{_CUSTOM}:negative_entropy"}, 0.0),
    "opd": ({}, 0.0),
    "opd/importance": (_policy(ratio="importance"), 0.0),
    "opd/ppo": (_policy(ratio="ppo_clip", dual_clip=1.2), 0.0),
    "opd/ppo-no-dual": (_policy(ratio="ppo_clip", dual_clip=None, clip_low=0.1, clip_high=0.3), 0.0),
    "opd/tis": (_policy(mismatch="tis", tis_cap=1.3), 0.0),
    "opd/icepop": (_policy(mismatch="icepop", icepop_low=0.8, icepop_high=1.4, ratio="importance"), 0.0),
    "opd/mask": (_policy(mismatch="mask", mask_below=-0.05), 0.0),
    "opd/advantage-clip": (_policy(advantage_clip=0.5), 0.0),
    "tropd": (_tropd("bernoulli", "fkl_direct", "truncated", "nll"), 0.0),
    "tropd/soft-tail": (_tropd("soft", "fkl_direct", "tail", "none", **_policy(ratio="ppo_clip")), 0.0),
    "tropd/threshold-renorm": (_tropd("threshold", "fkl_direct", "renorm", "topk_fkl"), 0.0),
    "tropd/teacher-renorm": (_tropd("none", "fkl_direct", "teacher_renorm", "topk_fkl"), 0.0),
    "tropd/scalar": (_tropd("bernoulli", "fkl_scalar", "truncated", "scalar_adv", **_policy(mismatch="tis")), 0.0),
    "tropd/clip": (_tropd("bernoulli", "clip", "truncated", "nll", **_policy(ratio="importance")), 0.0),
    "tropd/mask": (_tropd("bernoulli", "mask", "truncated", "nll"), 0.0),
    "tropd_aopd": (_tropd("bernoulli", "fkl_direct", "truncated", "nll", aopd_weight=0.4), 0.0),
    "reopold": ({}, 0.0),
    "reopold/stage-1-of-2": ({"stages": 2, "entropy_fraction": 0.3}, 0.25),
    "reopold/stage-2-of-2": ({"stages": 2, "entropy_fraction": 0.3}, 0.75),
    "entropy_opd": ({"fraction": 0.3}, 0.0),
    "entropy_opd/all": ({"fraction": 0.3, "denominator": "all"}, 0.0),
    "exopd": ({}, 0.0),
    "topd": ({}, 0.0),
    "topd/plain": ({"future_mean": False, "normalise": False, "mixing": 0.2}, 0.0),
    "vopd": ({}, 0.0),
    "iw_opd": ({}, 0.0),
    "power_opd": ({}, 0.0),
    "kdrl": ({"beta_start": 0.5, "beta_end": 0.1}, 0.25),
    "rlad": ({}, 0.0),
    "rlad/reference": ({"reference_weight": 0.2, "anchor": 0.8}, 0.0),
    "rethinking/student": ({}, 0.0),
    "rethinking/teacher": ({"support": "teacher"}, 0.0),
    "rethinking/intersection": ({"support": "intersection"}, 0.0),
    "rethinking/union": ({"support": "union"}, 0.0),
    "rethinking/xor": ({"support": "xor"}, 0.0),
    "sft": ({}, 0.0),
    "eopd": ({"entropy_threshold": 2.1}, 0.0),
    "eopd/tail": ({"entropy_threshold": 2.1, "norm": "tail"}, 0.0),
    "aopd": ({}, 0.0),
    "aopd/renorm": ({"norm": "renorm", "threshold": 0.05}, 0.0),
    "jsd": ({"beta": 0.3}, 0.0),
    "gkd/fkl-truncated": ({"norm": "truncated"}, 0.0),
    "gkd/fkl-tail": ({}, 0.0),
    "gkd/fkl-renorm": ({"norm": "renorm"}, 0.0),
    "gkd/rkl-tail": ({"divergence": "rkl"}, 0.0),
    "gkd/rkl-renorm": ({"divergence": "rkl", "norm": "renorm"}, 0.0),
    "gkd/jsd-truncated": ({"divergence": "jsd", "beta": 0.3, "norm": "truncated"}, 0.0),
    "gkd/jsd-tail": ({"divergence": "jsd", "beta": 0.3}, 0.0),
    "gkd/jsd-renorm": ({"divergence": "jsd", "beta": 0.3, "norm": "renorm"}, 0.0),
    "gkd/fkl-full": ({"full_vocabulary": True}, 0.0),
    "gkd/rkl-full": ({"divergence": "rkl", "full_vocabulary": True}, 0.0),
    "gkd/jsd-full": ({"divergence": "jsd", "beta": 0.3, "full_vocabulary": True}, 0.0),
    "lsm": ({}, 0.0),
    "lsm/sampled-tail": ({"sampled_tail": True}, 0.0),
    "lsm/clipped": ({"clip_log_ratio": 0.5}, 0.0),
    "sdpo": ({"ratio_cap": 1.1}, 0.0),
    "sdpo/forward": ({"alpha": 0.0}, 0.0),
    "sdpo/reverse": ({"alpha": 1.0, "norm": "renorm"}, 0.0),
    "sdpo/renorm": ({"alpha": 0.3, "norm": "renorm"}, 0.0),
    "opsd": ({}, 0.0),
    "opsd/truncated": ({"norm": "truncated", "entry_clip": 0.1}, 0.0),
    "opsd/unclipped": ({"entry_clip": 100.0}, 0.0),
}

ENTRIES = _entries()
BY_NAME = {entry.name: entry for entry in ENTRIES}
