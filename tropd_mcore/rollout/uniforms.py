"""The uniforms that decide trust, drawn once per response token on the host.

Not for sampling text or for dropout. Invariant: a draw depends on (run seed, step, sample id) alone, so that every
rank, every resume and every replay sees the same decision, whatever the layout or the order of the samples.
"""

from __future__ import annotations

import hashlib

import numpy as np

from tropd_mcore.types import FloatArray


def trust_uniforms(seed: int, step: int, sample_id: str, count: int) -> FloatArray:
    """Return `count` float32 uniforms in [0, 1) for the response tokens of one sample.

    The generator is counter-based (Philox) and keyed by a hash of the three names; a longer draw starts with the
    shorter one. Source: TrOPD section 3.2 (the Bernoulli gate).
    """
    digest = hashlib.sha256(f"{seed}\n{step}\n{sample_id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    return generator.random(count, dtype=np.float32)
