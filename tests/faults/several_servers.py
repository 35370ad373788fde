"""The part of docs/faults.md about jobs with several rollout servers: what each fault of `fleet-*` must end in.

The table is written by hand, from the code and from the tests that it names. It has no verdicts.
"""

from __future__ import annotations

INTRO = """\
## Several servers

Faults of a job with `rollout.servers`. Their ids begin with the words of the first column. The last column names tests
that play such a fault on real servers ("stand-ins": on stubs only). [servers.md](servers.md#several-rollout-servers)
has the log lines. `python -m tests.faults fleet` plays all of them on whole jobs; no complete pass is recorded yet.
"""
OUTRO = """\
In the rows in which samples are drawn anew, and only there, short responses are favoured a little.
"""
ROWS = (
    (
        "fleet-killed-sampling",
        "SIGKILL one of three servers while it samples",
        "the others draw its open samples anew; it is started again (`max_restarts`) and takes part in a later step",
        "`tests/sglang/test_fleet.py`",
    ),
    (
        "fleet-killed-update",
        "SIGKILL one before or in an update",
        "the others get the weights in the same update and sample; it is started again",
        "`tests/sglang/test_fleet_weights.py`",
    ),
    (
        "fleet-killed-between",
        "SIGKILL one between two steps",
        "left out of the next step, with one line that names it; started again",
        "`tests/glue/test_policy_server.py` (stand-ins)",
    ),
    (
        "fleet-stopped",
        "SIGSTOP one",
        "killed and started again after `hang_timeout_s`, or as soon as it does not end a request that it is told "
        "to abort; meanwhile the same",
        "`tests/sglang/test_fleet.py`, `test_fleet_weights.py`",
    ),
    (
        "fleet-slow",
        "one works a tenth of the time",
        "its open samples go on at the others from their tokens, counted in the log; it is not started again, and is "
        "left out of the next steps",
        "`tests/sglang/test_fleet.py`",
    ),
    (
        "fleet-url-restarted",
        "somebody restarts a server at a `url`, so it has the weights of its folder and another label",
        "nothing that it answers under that label is used; it gets the weights at the next step",
        "`tests/sglang/test_fleet_faults.py`",
    ),
    (
        "fleet-url-restarted-label",
        "the same, between the proof of the weights and their label",
        "exit code 2 and one line that names its section: its checksum has changed (`gates.weight_sync`)",
        "`tests/sglang/test_fleet.py`",
    ),
    (
        "fleet-lies",
        "a server answers success to an update, takes the label and loads nothing",
        "exit code 2 and one line that names its section; no server gets the label and nothing is trained on it",
        "`tests/sglang/test_fleet_weights.py`",
    ),
    (
        "fleet-job-killed",
        "SIGKILL the job in an update",
        "its own servers end with it. Those at a `url` stay paused under a label that no step accepts; the same "
        "command resumes them and closes the open update. One that waits in a broadcast may wait for up to 30 "
        "minutes: restart it",
        "`tests/sglang/test_publishing.py`",
    ),
    (
        "fleet-router-killed",
        "SIGKILL the router",
        "it is started again with the same servers (`rollout.server.max_restarts`); only the missing samples are "
        "asked for",
        "`tests/sglang/test_router.py`",
    ),
    (
        "fleet-node",
        "SIGKILL all servers of the second node",
        "the step goes on with those of the first; the first rank of that node starts them again. If the node "
        "itself is lost, the job ends with exit code 75 ([launch.md](launch.md))",
        "`tests/glue/test_policy_server.py` (stand-ins)",
    ),
    (
        "fleet-all-killed",
        "SIGKILL all servers",
        "all are started again; the first that is ready gets the weights and the missing samples. With no restart "
        "left, exit code 2 and one line with the section and `max_restarts`",
        "`tests/glue/test_policy_server.py` (stand-ins)",
    ),
)
"""Beginning of the ids, what is done, what you must get, and the tests."""


def section() -> str:
    """The part as Markdown."""
    rows = [f"| {' | '.join(cells)} |" for cells in ROWS]
    head = ["| fault | what is done | what you must get | shown by |", "|---|---|---|---|"]
    return "\n".join([INTRO, *head, *rows, "", OUTRO])
