"""The moments of a step at which the fault suite can act: before or after a function of the product.

This module does not act (`startup/sitecustomize.py` does in the job's processes, `launch` outside). Invariant: a name
that the product lacks is an error in the job's process, so that no fault waits for a moment that never comes.
"""

from __future__ import annotations

PHASES = {
    "read rollouts": "tropd_mcore.rollout.rollout_source:RolloutSource.at_step",
    "store rollouts": "tropd_mcore.rollout.rollout_source:RolloutSource.save",
    "sample": "tropd_mcore.rollout.policy_server:PolicyServer.sample",
    "publish": "tropd_mcore.rollout.fleet_publisher:FleetPublisher.publish",
    "update weights": "tropd_mcore.serving.client:SglangClient.update_weights",
    "label weights": "tropd_mcore.serving.client:SglangClient.label_weights",
    "generate": "tropd_mcore.serving.client:generate_on",
    "answer": "tropd_mcore.serving.wire:read_generation",
    "served score": "tropd_mcore.serving.client:score_on",
    "score": "tropd_mcore.teacher.score_source:ScoreSource.at_step",
    "forward and backward": "tropd_mcore.train.trainer:Trainer.forward_backward",
    "optimizer": "tropd_mcore.train.trainer:Trainer.update",
    "metrics": "tropd_mcore.monitor.monitor:Monitor.log",
    "keep": "tropd_mcore.train.trainer:Trainer.keep",
    "checkpoint": "tropd_mcore.mcore.checkpoint:write",
    "checkpoint info": "tropd_mcore.mcore.checkpoint:_publish",
    "prune": "tropd_mcore.mcore.checkpoint:_prune",
    "export": "tropd_mcore.mcore.weights_io:export_hf",
    "publish export": "tropd_mcore.weights.publish:replace_folder",
    "load model": "tropd_mcore.mcore.weights_io:load_hf",
    "start": "tropd_mcore.train.job:run_job",
}
"""Name -> module and function. An edge is `before <name>` or `after <name>`."""


def edges() -> list[str]:
    """All moments by name."""
    return [f"{edge} {name}" for name in PHASES for edge in ("before", "after")]
