"""Samples rollouts from an SGLang server, checks them and labels them with the weight version that sampled them.

This module does not restart servers (see `serving.supervisor`). Invariant: a `Rollout` holds exactly the tokens and
log-probs that the server returned for the expected weight version. A partial answer is requested again, never completed
by us. A sample without a usable answer is left out and counted, never filled in.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import AnswerError, DataError, ServerDied, ServerError
from tropd_mcore.rollout.uniforms import trust_uniforms
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.wire import Generation, GenerationRequest, find_outside
from tropd_mcore.types import IntArray, Rollout, SampleRequest

log = logging.getLogger(__name__)


@dataclass
class Collected:
    """The rollouts of a step collected so far, by sample id. If the server died, `died` is its error."""

    rollouts: dict[str, Rollout] = field(default_factory=dict)
    masked: dict[str, str] = field(default_factory=dict)
    """Sample ids that are left out -> what was wrong with the server's second answer."""
    died: ServerDied | None = None


class SglangSampler:
    """Samples with the temperature, top_p and top_k of `config` and stops at `eos_ids`.

    `vocab_size` is the vocabulary size of the served model; a token id outside it kills SGLang. `seed` is the run's
    seed. At most the fraction `masked_share` of the samples of a call may be left out for lack of a usable answer.
    """

    def __init__(
        self,
        client: SglangClient,
        config: RolloutConfig,
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        seed: int,
        masked_share: float,
    ) -> None:
        self.aborted = 0
        """Number of partial answers that were requested again, over the sampler's life."""
        self._client = client
        self._config = config
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._seed = seed
        self._masked_share = masked_share

    def sample(self, requests: list[SampleRequest], *, step: int, expected_version: str) -> list[Rollout]:
        """Return the rollouts in the order of the requests, without the samples that had to be left out.

        Raises ServerError if the server cannot be used, has other weights, or too many samples had to be left out;
        ServerDied if it is gone; DataError if a request holds a token id outside the vocabulary.
        """
        collected = self.collect(requests, step=step, expected_version=expected_version)
        if collected.died is not None:
            raise collected.died
        return [found for request in requests if (found := collected.rollouts.get(request.sample_id)) is not None]

    def collect(
        self, requests: list[SampleRequest], *, step: int, expected_version: str, found: Collected | None = None
    ) -> Collected:
        """Return the rollouts of `found` and sample the missing ones. If the server dies, return what it had finished.

        Raises the errors of `sample` except ServerDied, which is returned with the rollouts.
        """
        collected = Collected(rollouts=dict(found.rollouts), masked=dict(found.masked)) if found else Collected()
        self._check_ids(requests)
        try:
            self._check_server(requests, expected_version)
            for attempt in range(self._config.server.max_retries + 1):
                done = collected.rollouts.keys() | collected.masked.keys()
                missing = [request for request in requests if request.sample_id not in done]
                if not missing:
                    self._check_masked(collected, len(requests))
                    return collected
                if attempt:
                    self.aborted += len(missing)
                    log.warning("%s: asking again for %d aborted samples", self._client.key, len(missing))
                collected.died = self._round(missing, collected, step, expected_version)
                if collected.died is not None:
                    return collected
        except ServerDied as error:
            collected.died = error
            return collected
        missing_count = len(requests) - len(collected.rollouts) - len(collected.masked)
        if missing_count:
            raise ServerError(
                f"{self._client.key}: {missing_count} of {len(requests)} samples were still aborted after "
                f"max_retries={self._config.server.max_retries}"
            )
        self._check_masked(collected, len(requests))
        return collected

    def _check_masked(self, collected: Collected, asked: int) -> None:
        """Log the samples left out. Raises ServerError if they are more than `masked_share`, or all of them."""
        if not collected.masked:
            return
        sample_id, reason = next(iter(collected.masked.items()))
        count = len(collected.masked)
        what = (
            f"{self._client.key}: {count} of {asked} samples have no usable answer, asked for twice; the first is "
            f"{sample_id}: {reason}"
        )
        if count > self._masked_share * asked or count == asked:
            raise ServerError(f"{what}; at most gates.masked_share={self._masked_share:g} of a step may be left out")
        log.warning("%s; they are left out of the step", what)

    def _round(self, requests: list[SampleRequest], collected: Collected, step: int, version: str) -> ServerDied | None:
        """Send each request once and add complete answers to `collected`. If the server is gone, return its error."""
        died: ServerDied | None = None
        answers = self._client.generate([self._generation_request(request) for request in requests])
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, ServerDied):
                died = answer
            elif isinstance(answer, AnswerError):
                collected.masked[request.sample_id] = str(answer)
            elif isinstance(answer, ServerError):
                raise answer
            elif answer.finish_reason != "abort":
                collected.rollouts[request.sample_id] = self._rollout(request, answer, step, version)
        return died

    def _generation_request(self, request: SampleRequest) -> GenerationRequest:
        return GenerationRequest(
            input_ids=np.concatenate([request.prompt_ids, request.prefix_ids]).astype(np.int32),
            max_new_tokens=request.max_new_tokens,
            vocab_size=self._vocab_size,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            top_k=self._config.top_k,
            stop_token_ids=self._eos_ids,
        )

    def _rollout(self, request: SampleRequest, answer: Generation, step: int, version: str) -> Rollout:
        if set(answer.weight_versions) != {version}:
            raise ServerError(
                f"{self._client.key}: sample {request.sample_id} was drawn from weights "
                f"{list(answer.weight_versions)}; expected {version!r} alone: publish the weights first, "
                "and let nothing else update this server"
            )
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            prefix_ids=request.prefix_ids,
            response_ids=answer.output_ids,
            rollout_logp=answer.logp,
            trust_u=trust_uniforms(self._seed, step, request.sample_id, len(answer.output_ids)),
            policy_version=version,
            finish_reason=answer.finish_reason,
            carries_prefix_loss=request.carries_prefix_loss,
            answer=request.answer,
            teacher=request.teacher,
        )

    def _check_ids(self, requests: list[SampleRequest]) -> None:
        for request in requests:
            for name, ids in (("prompt", request.prompt_ids), ("prefix", request.prefix_ids)):
                check_ids(ids, self._vocab_size, what=f"the {name} of sample {request.sample_id}")

    def _check_server(self, requests: list[SampleRequest], version: str) -> None:
        info = self._client.info()
        if info.weight_version != version:
            raise ServerError(
                f"{self._client.key}: the server has weights {info.weight_version!r}; expected {version!r}: "
                "publish the weights first"
            )
        longest = max((len(r.prompt_ids) + len(r.prefix_ids) + r.max_new_tokens for r in requests), default=0)
        if longest > info.longest_sequence:
            raise ServerError(
                f"{self._client.key}: the longest sample may reach {longest} tokens but the server takes "
                f"{info.longest_sequence}: lower rollout.max_new_tokens, or raise {self._client.key}.max_total_tokens "
                f"or --context-length in {self._client.key}.extra_args"
            )


def check_ids(ids: IntArray, vocab_size: int, *, what: str) -> None:
    """Raise DataError if `ids` holds an id outside [0, vocab_size). `what` names the ids in the message."""
    outside = find_outside(ids, vocab_size)
    if outside is not None:
        raise DataError(f"{what} holds token id {outside}; expected ids in [0, {vocab_size}), the model's vocabulary")
