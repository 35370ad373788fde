"""Write docs/configuration.md and docs/metrics.md from the code that reads the keys and computes the metrics.

    python docs/make_references.py

tests/unit/test_reference_pages.py checks that the pages are up to date.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from tropd_mcore.config.reference import Key, reference
from tropd_mcore.monitor.catalogue import DESCRIBED, METRICS

DOCS = Path(__file__).parent

CONFIGURATION = """# Configuration: every key

A configuration is one YAML file. `tropd config FILE.yaml` prints every key, its value and where it was set.
`tropd config --explain KEY` prints a row of this page. On the command line, write a key as `section.key=value`. An
unknown key is an error. `python docs/make_references.py` makes this page from the code: {count} keys.
"""
METRICS_PAGE = """# Metrics: every number of metrics.jsonl

Each step appends one line to `metrics.jsonl` in the run directory. `tropd metrics NAME` prints a row of this page. A
metric that has nothing to measure is null in the file. p is the student, q is the teacher, x is the sampled token, and
r = log q(x) - log p(x) in nats: positive if the teacher gives the token more probability than the student.
`python docs/make_references.py` makes this page from the code: {count} metrics.

**Distance and force.** `tv` of a token is the total variation distance of the two models' distributions of the next
token: 0 if they are equal, 1 if they have no token in common. It is computed on the teacher's top-k candidates, with
all other tokens taken together as one. That is a lower bound, which is too low by at most the smaller of the two tails.
The *force* of a token is the L1 norm of the gradient of its loss in the logits (divided by the temperature), with the
tokens outside the candidates again taken together. For losses of log-probs this is the norm over the whole vocabulary.
With an entropy term or a divergence over the whole vocabulary it is a lower bound. The force belongs to single sampled
tokens, so noise that averages out over many tokens counts too. `force/tv_50_90` is the share of the summed force of a
step that belongs to tokens with a distance from 0.5 to 0.9. Neither needs another pass over the vocabulary. They cost a
sort of the candidates per token, 8 bytes per token in the step's table, and for a divergence over the whole vocabulary
one more all-reduce per chunk. `monitor.force=false` turns both off. An objective without a teacher (`sft`) has neither.

**Held-out responses.** `held_out/forward_kl` is KL(q || p) per token on stored responses of the teacher, at the
rollout temperature of the student. It is computed on the teacher's `held_out.topk` candidates, with all other tokens
as one. So it is a lower bound of KL(q || p), and `held_out/teacher_mass` says how much probability the candidates
hold. `held_out/sampled_kl` uses the stored tokens alone. That is noisier. It has no bias if the responses were sampled
at temperature 1, as `tropd prefixes` does. `held_out/nll` needs no teacher. The teacher scores the responses once,
before the first measurement. A served teacher (`teacher.kind=sglang`) is asked by requests, one in the job runs a
forward pass, and for an objective that does not read the teacher it is loaded for that pass and freed. A served
teacher with a wider vocabulary can lack candidates for a token; `held_out/unscored` counts such tokens, which are left
out of the KL. The scores stay in `scores/held_out.*.npz`. Only `held_out/nll` is measured for an objective that
teaches itself, and for `sft` with `teacher.kind=sglang`.

**Several teachers.** With the section `teachers`, each teacher has the metrics with NAME in their names, with its own
name in that place ([teachers.md](teachers.md)). A run with one teacher has none of them.
"""


def configuration() -> str:
    """The page of the keys, a table per section."""
    keys = reference()
    parts = [CONFIGURATION.format(count=len(keys))]
    for section, found in groupby(keys, key=lambda key: key.dotted.partition(".")[0]):
        rows = "\n".join(_row(key) for key in found)
        parts.append(f"## {section}\n\n| key | accepts | default | meaning |\n|---|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def metrics() -> str:
    """The page of the metrics, a table per group."""
    groups: dict[str, list[str]] = {}
    for metric in DESCRIBED:
        cells = [f"`{_cell(metric.name)}`", _cell(metric.unit), _cell(metric.over), _cell(metric.description)]
        groups.setdefault(metric.name.partition("/")[0], []).append(f"| {' | '.join(cells)} |")
    parts = [METRICS_PAGE.format(count=len(METRICS))]
    for group, rows in groups.items():
        head = "| metric | unit | taken over | meaning |\n|---|---|---|---|"
        parts.append(f"## {group}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    kinds = f" (kind: {', '.join(key.kinds)})" if key.kinds else ""
    default = key.default.removeprefix("default ")
    return f"| `{_cell(key.dotted)}`{kinds} | {_cell(key.accepts)} | {_cell(default)} | {_cell(key.meaning)} |"


def _cell(text: str) -> str:
    """Text that means the same inside a cell of a table: no bars, no tags, pages of docs/ as links."""
    escaped = text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", escaped)


if __name__ == "__main__":
    for name, text in {"configuration.md": configuration(), "metrics.md": metrics()}.items():
        (DOCS / name).write_text(text, encoding="utf-8")
