"""Samples rollouts from SGLang servers, checks them and labels them with the weight version that sampled them.

This module does not restart servers (see `policy_server`). Invariants: a `Rollout` holds exactly the tokens and
log-probs that servers with the expected weight version returned. Which server sampled it changes no id, no order and no
random number of ours. An answer that was aborted from outside goes on from its tokens. A sample without a usable answer
is left out and counted, never filled in.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tropd_mcore.config.schema import RolloutConfig
from tropd_mcore.errors import AnswerError, DataError, ServerDied, ServerError
from tropd_mcore.rollout.uniforms import decode_seed, trust_uniforms
from tropd_mcore.serving.background import at_once
from tropd_mcore.serving.client import SglangClient, generate_on
from tropd_mcore.serving.dispatch import SLOW
from tropd_mcore.serving.router_lane import RouterLane
from tropd_mcore.serving.wire import Generation, GenerationRequest, find_outside
from tropd_mcore.serving.work import Dispatched, Speeds
from tropd_mcore.types import IntArray, Rollout, SampleRequest

log = logging.getLogger(__name__)


@dataclass
class Collected:
    """The rollouts of a step collected so far, by sample id, and the servers that were lost meanwhile."""

    rollouts: dict[str, Rollout] = field(default_factory=dict)
    masked: dict[str, str] = field(default_factory=dict)
    """Sample ids that are left out -> what was wrong with the server's second answer."""
    lost: dict[str, ServerError] = field(default_factory=dict)
    """Configuration section of a server that cannot be used any more -> why"""
    may_return: set[str] = field(default_factory=set)
    """Those of `lost` that need no new start: they are very slow, or have other weights"""
    keeps_up: dict[str, bool] = field(default_factory=dict)
    """Configuration section of a server that sampled -> whether it was about as fast as the others"""

    def misses(self, requests: Sequence[SampleRequest]) -> list[SampleRequest]:
        """Return the requests without a rollout that are not left out either."""
        return [each for each in requests if each.sample_id not in self.rollouts and each.sample_id not in self.masked]


class SglangSampler:
    """Samples from `clients` with the temperature, top_p and top_k of `config`, and stops at `eos_ids`.

    `vocab_size` is the vocabulary size of the served model; a token id outside it kills SGLang. `seed` is the run's
    seed. At most the fraction `masked_share` of the samples of a call may be left out for lack of a usable answer. With
    a `lane`, samples go through a router, behind which are the clients and no other servers.
    """

    def __init__(
        self,
        clients: Sequence[SglangClient],
        config: RolloutConfig,
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        seed: int,
        masked_share: float,
        lane: RouterLane | None = None,
    ) -> None:
        self.aborted = 0
        """Number of answers that somebody else has aborted, over the sampler's life."""
        self.clients = list(clients)
        """The servers of the next call."""
        self.lane = lane
        """The way through a router, if there is one."""
        self._config = config
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._seed = seed
        self._masked_share = masked_share
        self._speeds = Speeds()

    def sample(self, requests: list[SampleRequest], *, step: int, expected_version: str) -> list[Rollout]:
        """Return the rollouts in the order of the requests, without the samples that had to be left out.

        Raises ServerError if no server can be used, or too many samples had to be left out; ServerDied if all are gone;
        DataError if a request holds a token id outside the vocabulary.
        """
        collected = self.collect(requests, step=step, expected_version=expected_version)
        if collected.misses(requests):
            raise next(iter(collected.lost.values()))
        return [found for request in requests if (found := collected.rollouts.get(request.sample_id)) is not None]

    def collect(
        self, requests: list[SampleRequest], *, step: int, expected_version: str, found: Collected | None = None
    ) -> Collected:
        """Return the rollouts of `found` and sample the missing ones. If all servers are lost, return what they had.

        Raises the errors of `sample`, except that ServerDied is returned with the rollouts. With one server, any other
        error of it is raised; with several, it is `lost`.
        """
        collected = (
            Collected(dict(found.rollouts), dict(found.masked), keeps_up=dict(found.keeps_up)) if found else Collected()
        )
        self._check_ids(requests)
        servers = self._usable(requests, expected_version, collected)
        attempts = self._config.server.max_retries + 1
        for attempt in range(attempts):
            missing = collected.misses(requests)
            if not missing or not servers:
                break
            if attempt:
                log.warning("%s: asking again for %d aborted samples", self._key, len(missing))
            self._round(missing, collected, step, expected_version, servers)
            servers = [client for client in servers if client.key not in collected.lost]
        missing = collected.misses(requests)
        if missing and not servers:
            others = [error for error in collected.lost.values() if not isinstance(error, ServerDied)]
            if len(others) == len(collected.lost):
                raise others[0]
            return collected
        if missing:
            raise ServerError(
                f"{self._key}: {len(missing)} of {len(requests)} samples were still aborted after "
                f"max_retries={attempts - 1}"
            )
        self._check_masked(collected, len(requests))
        return collected

    @property
    def _key(self) -> str:
        """The section that messages name."""
        return self.clients[0].key if len(self.clients) == 1 else "rollout.servers"

    def _check_masked(self, collected: Collected, asked: int) -> None:
        """Log the samples left out. Raises ServerError if they are more than `masked_share`, or all of them."""
        if not collected.masked:
            return
        sample_id, reason = next(iter(collected.masked.items()))
        count = len(collected.masked)
        what = (
            f"{self._key}: {count} of {asked} samples have no usable answer, asked for twice; the first is "
            f"{sample_id}: {reason}"
        )
        if count > self._masked_share * asked or count == asked:
            raise ServerError(f"{what}; at most gates.masked_share={self._masked_share:g} of a step may be left out")
        log.warning("%s; they are left out of the step", what)

    def _round(
        self,
        requests: list[SampleRequest],
        collected: Collected,
        step: int,
        version: str,
        servers: Sequence[SglangClient],
    ) -> None:
        """Send each request once, and add complete answers and lost servers to `collected`."""
        questions = [self._generation_request(request, step) for request in requests]
        if self.lane is not None:
            self._round_through(self.lane, requests, questions, collected, step, version)
            return
        # a slow server that is tried again must get a sample, to show whether it still is
        speeds = [max(self._speeds.of(client.key), SLOW) for client in servers]
        sampled = generate_on(servers, questions, speeds=speeds, refuses=lambda answer: self._stale(answer, version))
        self._note_servers(sampled, servers, collected)
        for request, answer in zip(requests, sampled.answers, strict=True):
            if isinstance(answer, AnswerError):
                collected.masked[request.sample_id] = str(answer)
            elif isinstance(answer, ServerError):
                if not collected.lost:
                    raise answer
            elif answer.finish_reason != "abort":
                collected.rollouts[request.sample_id] = self._rollout(request, answer, step, version)

    def _round_through(
        self,
        lane: RouterLane,
        requests: list[SampleRequest],
        questions: list[GenerationRequest],
        collected: Collected,
        step: int,
        version: str,
    ) -> None:
        """Like `_round`, through a router, which chooses the servers. Raises ServerDied if the router is gone."""
        keys = {client.url: client.key for client in self.clients}
        for request, answer in zip(requests, lane.generate(questions), strict=True):
            if isinstance(answer, AnswerError):
                collected.masked[request.sample_id] = str(answer)
            elif isinstance(answer, ServerDied):
                if lane.servers:
                    raise answer
            elif isinstance(answer, ServerError):
                raise answer
            elif (stale := self._stale(answer, version)) is not None:
                raise ServerError(f"{self._key}: {stale}")
            elif answer.finish_reason != "abort":
                collected.rollouts[request.sample_id] = self._rollout(request, answer, step, version)
        collected.lost |= {keys[url]: error for url, error in lane.lost.items() if url in keys}

    def _note_servers(
        self, sampled: Dispatched[Generation], servers: Sequence[SglangClient], collected: Collected
    ) -> None:
        """Remember how fast the servers were, and which were lost."""
        for place, error in sampled.lost.items():
            collected.lost[servers[place].key] = error
            if place in sampled.may_return:
                collected.may_return.add(servers[place].key)
        self._speeds.note({servers[place].key: speed for place, speed in sampled.speeds.items()})
        collected.keeps_up |= {
            servers[place].key: place not in sampled.slow for place in sampled.speeds.keys() | sampled.slow
        }
        self.aborted += sampled.cut
        if sampled.cut:
            log.warning("%s: somebody else aborted %d samples, which go on from their tokens", self._key, sampled.cut)
        if sampled.moved or sampled.again:
            log.info(
                "%s: %d samples went on at another server, %d were sampled anew", self._key, sampled.moved,
                sampled.again,
            )  # fmt: skip

    def _generation_request(self, request: SampleRequest, step: int) -> GenerationRequest:
        return GenerationRequest(
            input_ids=np.concatenate([request.prompt_ids, request.prefix_ids]).astype(np.int32),
            max_new_tokens=request.max_new_tokens,
            vocab_size=self._vocab_size,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            top_k=self._config.top_k,
            stop_token_ids=self._eos_ids,
            seed=decode_seed(self._seed, step, request.sample_id),
        )

    def _stale(self, answer: Generation, version: str) -> str | None:
        """Say why an answer shows that its server must not be used; None if it was drawn from the right weights."""
        if set(answer.weight_versions) == {version} or not len(answer.output_ids):
            return None
        return (
            f"a sample was drawn from weights {list(answer.weight_versions)}; expected {version!r} alone: publish the "
            "weights first, and let nothing else update this server"
        )

    def _rollout(self, request: SampleRequest, answer: Generation, step: int, version: str) -> Rollout:
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

    def _usable(self, requests: list[SampleRequest], version: str, collected: Collected) -> list[SglangClient]:
        """The servers that have the expected weights. Those that are gone, and of several also others, are `lost`."""
        longest = max((len(r.prompt_ids) + len(r.prefix_ids) + r.max_new_tokens for r in requests), default=0)
        usable = []
        infos, silent = at_once({client.key: client.info for client in self.clients})
        for client in self.clients:
            try:
                if client.key in silent:
                    raise silent[client.key]
                info = infos[client.key]
                if info.weight_version != version:
                    raise ServerError(
                        f"{client.key}: the server has weights {info.weight_version!r}; expected {version!r}: publish "
                        "the weights first"
                    )
            except ServerError as error:
                if len(self.clients) == 1 and not isinstance(error, ServerDied):
                    raise
                collected.lost[client.key] = error
                if not isinstance(error, ServerDied):
                    collected.may_return.add(client.key)
                if self.lane is not None:
                    self.lane.take_out(client.url)
                continue
            if longest > info.longest_sequence:
                raise ServerError(
                    f"{client.key}: the longest sample may reach {longest} tokens but the server takes "
                    f"{info.longest_sequence}: lower rollout.max_new_tokens, or raise {client.key}.max_total_tokens "
                    f"or --context-length in {client.key}.extra_args"
                )
            usable.append(client)
        return usable


def check_ids(ids: IntArray, vocab_size: int, *, what: str) -> None:
    """Raise DataError if `ids` holds an id outside [0, vocab_size). `what` names the ids in the message."""
    outside = find_outside(ids, vocab_size)
    if outside is not None:
        raise DataError(f"{what} holds token id {outside}; expected ids in [0, {vocab_size}), the model's vocabulary")
