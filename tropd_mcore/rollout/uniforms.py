"""Draws the uniform random numbers of the trust decision, one per response token, and the seed of each sample's text.

Dropout does not use them. Invariant: a draw depends only on (run seed, step, sample id). So every rank, every resume
and every replay sees the same decision, for any layout, any order of the samples and any number of servers.
"""

from __future__ import annotations

import hashlib

import numpy as np

from tropd_mcore.types import FloatArray


def trust_uniforms(seed: int, step: int, sample_id: str, count: int) -> FloatArray:
    """Return `count` float32 uniforms in [0, 1) for the response tokens of one sample.

    The generator is counter-based (Philox); its key is a hash of seed, step and sample id. A longer draw starts with
    the numbers of a shorter one. Source: TrOPD section 3.2 (the Bernoulli gate).
    """
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, step, sample_id)[:16], "big")))
    return generator.random(count, dtype=np.float32)


def decode_seed(seed: int, step: int, sample_id: str) -> int:
    """Return the seed in [0, 2^63) with which an engine that takes one per request samples the text of one sample."""
    return int.from_bytes(_digest(seed, step, sample_id)[16:24], "big") >> 1


def _digest(seed: int, step: int, sample_id: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{step}\n{sample_id}".encode()).digest()
