"""What objectives are made of: gate, divergences, policy gradient, correction of the engines' mismatch, statistics."""
