"""Building blocks of objectives: trust gate, divergences, policy gradient, mismatch correction, batch statistics."""
