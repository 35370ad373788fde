"""The keys of supervised fine-tuning, which learns from stored responses of the teacher alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from tropd_mcore.config.objectives.base import Objective


class SftObjective(Objective):
    """Supervised fine-tuning on data.teacher_responses: no rollouts, no teacher scores, no servers.

    A step trains rollout.prompts_per_step * rollout.samples_per_prompt responses, each of another prompt.
    """

    kind: Literal["sft"] = "sft"
    samples: ClassVar[bool] = False
    reads_teacher: ClassVar[bool] = False

    @property
    def teacher_topk(self) -> int:
        return 0

    @property
    def has_prefix_loss(self) -> bool:
        return True

    @property
    def leaves_confident_mistakes(self) -> bool:
        return True

    def description(self) -> str:
        return "negative log-likelihood of the teacher's responses"

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False
