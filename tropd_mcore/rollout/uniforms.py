"""Draws the uniform random numbers of the trust decision, one per response token, on the host.

They are not used for sampling text or for dropout. Invariant: a draw depends only on (run seed, step, sample id). So
every rank, every resume and every replay sees the same decision, for any layout and any order of the samples.
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
    digest = hashlib.sha256(f"{seed}\n{step}\n{sample_id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    return generator.random(count, dtype=np.float32)
