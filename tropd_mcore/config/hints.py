"""Lines that name a better objective, with the number that they follow from (docs/choosing.md).

This module judges numbers that others measured. Invariants: a hint changes nothing; an objective of which nothing is
known gets none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tropd_mcore.config.schema import Config


def of_first_step(metrics: Mapping[str, float], config: Config) -> Iterator[str]:
    """Yield a line if the two models are far apart and the objective will not bring them together soon."""
    bound, distance = config.monitor.hint_distance, metrics.get("trust/tv", float("nan"))
    objective = config.objective
    why = None
    if objective.leaves_confident_mistakes is False:
        why = "is slow to leave confident mistakes"
    elif objective.leaves_confident_mistakes and objective.keeps_rare_mistakes:
        why = "leaves confident mistakes but hardly trains what remains of them"
    if bound is not None and why is not None and distance > bound:  # False for NaN
        yield (
            f"hint: trust/tv is {distance:.2f} at step 0, so student and teacher disagree on most tokens, and "
            f"objective.kind={objective.kind} {why}; sft on the teacher's responses first, or gkd with "
            f"divergence=fkl, is faster (docs/choosing.md; the bound is monitor.hint_distance={bound:g})"
        )


def of_evaluation(greedy: float, sampled: float, config: Config) -> Iterator[str]:
    """Yield a line if sampled answers are right much less often than greedy ones and the objective leaves that so."""
    bound = config.monitor.hint_gap
    if bound is not None and config.objective.keeps_rare_mistakes and greedy - sampled > bound:
        yield (
            f"hint: sampled accuracy is {100 * (greedy - sampled):.0f} points below greedy, so rare mistakes are left, "
            f"and objective.kind={config.objective.kind} hardly trains them; opd or gkd remove them faster "
            f"(docs/choosing.md; the bound is monitor.hint_gap={bound:g})"
        )
