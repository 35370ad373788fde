"""Teacher scores on disk: they are read back unchanged, and only for the inputs that they belong to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.test_packing import make_rollout, options
from tests.unit.test_stored_files_damage import renamed
from tropd_mcore.cli.checks_of_config import ENTRY_BYTES, LOG_PROB_BYTES, ROW_BYTES
from tropd_mcore.data.packing import pack
from tropd_mcore.records.replay import ScoreKey, load_scores, mismatch, save_scores
from tropd_mcore.records.token_file import save_token_sample
from tropd_mcore.records.token_table import local_columns, merge_columns
from tropd_mcore.types import MicroBatch, RowContext, TeacherScores

K, L = 5, 3


def micro_batches(samples: int = 4) -> list[MicroBatch]:
    return pack([make_rollout(i, 3, 4, 11 + i % 4, i == 0) for i in range(samples)], **options()).micro_batches


def scores_of(batch: MicroBatch, *, own: bool, entropy: bool) -> TeacherScores:
    rows = len(batch.rows_T)
    generator = torch.Generator().manual_seed(rows)
    return TeacherScores(
        logp_T=-torch.rand(rows, generator=generator),
        topk_ids_TK=torch.randint(0, 300, (rows, K), generator=generator),
        topk_logp_TK=-torch.rand(rows, K, generator=generator),
        tail_mass_T=torch.rand(rows, generator=generator),
        entropy_T=torch.rand(rows, generator=generator) if entropy else None,
        scored_T=torch.rand(rows, generator=generator) > 0.2,
        logp_of_student_topk_TL=torch.full((rows, L), float("-inf")) if own else None,
    )


def candidates(batches: list[MicroBatch], first: int = 0) -> list[torch.Tensor]:
    return [torch.arange(first, first + L).expand(len(batch.rows_T), L) for batch in batches]


@pytest.mark.parametrize(("own", "entropy"), [(True, True), (False, False)])
def test_stored_scores_are_read_back_unchanged(tmp_path: Path, own: bool, entropy: bool) -> None:
    batches = micro_batches()
    assert len(batches) > 1
    scores = [scores_of(batch, own=own, entropy=entropy) for batch in batches]
    key = ScoreKey("teacher", batches, candidates(batches) if own else [None] * len(batches))
    save_scores(tmp_path / "scores.npz", key, scores)
    assert mismatch(tmp_path / "scores.npz", key) is None
    found = load_scores(tmp_path / "scores.npz", key)
    assert len(found) == len(scores)
    for one, two in zip(found, scores, strict=True):
        for name, value in vars(two).items():
            assert value is None if getattr(one, name) is None else torch.equal(getattr(one, name), value), name


def test_a_stored_row_has_the_bytes_that_doctor_counts(tmp_path: Path) -> None:
    sizes = []
    for samples in (4, 400):
        batches = micro_batches(samples)
        key = ScoreKey("teacher", batches, candidates(batches))
        save_scores(tmp_path / "scores.npz", key, [scores_of(batch, own=True, entropy=True) for batch in batches])
        sizes.append(((tmp_path / "scores.npz").stat().st_size, sum(len(batch.rows_T) for batch in batches)))
    (small, few), (large, many) = sizes
    each = ENTRY_BYTES * K + LOG_PROB_BYTES * L + ROW_BYTES
    assert (large - small) / (many - few) == pytest.approx(each, rel=0.01)


def test_scores_of_another_teacher_other_rows_or_other_candidates_are_not_used_and_the_reason_is_given(
    tmp_path: Path,
) -> None:
    batches = micro_batches()
    key = ScoreKey("teacher", batches, candidates(batches))
    path = tmp_path / "scores.npz"
    save_scores(path, key, [scores_of(batch, own=True, entropy=True) for batch in batches])
    assert mismatch(path, key) is None
    assert mismatch(path, replace(key, teacher="other")) == "of another teacher (teacher, here other)"
    for others in (candidates(batches, first=1), [None] * len(batches)):
        assert mismatch(path, replace(key, own_ids=others)) == "of other candidates of the student"
    others = micro_batches(5)
    reason = mismatch(path, ScoreKey("teacher", others, candidates(others)))
    assert reason == "of other rows (rollouts, layout or packs)"


def test_scores_of_a_release_that_did_not_record_their_teacher_are_not_used(tmp_path: Path) -> None:
    batches = micro_batches()
    key = ScoreKey("teacher", batches, [None] * len(batches))
    path = tmp_path / "scores.npz"
    save_scores(path, key, [scores_of(batch, own=False, entropy=True) for batch in batches])
    with np.load(path) as archive:
        old = {name: archive[name] for name in archive.files if not name.startswith("key_")}
    np.savez(path, fingerprint=np.array("0" * 64), **old)
    assert mismatch(path, key) == "of an earlier version, which did not say what they belong to"


def test_scores_of_a_version_with_other_field_names_are_read_unchanged(tmp_path: Path) -> None:
    batches = micro_batches()
    scores = [scores_of(batch, own=True, entropy=True) for batch in batches]
    key, path = ScoreKey("teacher", batches, candidates(batches)), tmp_path / "scores.npz"
    save_scores(path, key, scores)
    renamed(path, "own_logp_TL", "logp_of_student_topk_TL")
    assert mismatch(path, key) is None
    for one, two in zip(load_scores(path, key), scores, strict=True):
        assert one.logp_of_student_topk_TL is not None and two.logp_of_student_topk_TL is not None
        assert torch.equal(one.logp_of_student_topk_TL, two.logp_of_student_topk_TL)


def test_the_score_key_depends_on_how_rows_are_split_into_micro_batches(tmp_path: Path) -> None:
    """The same tokens in two micro-batches instead of one have other pack boundaries."""
    batches = micro_batches()
    whole, cut = ScoreKey("t", batches, [None] * len(batches)), ScoreKey("t", batches[:1], [None])
    assert whole.parts()["rows"] != cut.parts()["rows"]
    assert whole.parts()["candidates"] != cut.parts()["candidates"]


def test_the_token_table_has_one_row_per_epoch_and_stored_samples_only_the_first(tmp_path: Path) -> None:
    batches = micro_batches()
    outputs = [
        [{"student_logp": torch.full((len(batch.rows_T),), -1.0 - epoch)} for batch in batches] for epoch in range(2)
    ]
    before = [RowContext(old_logp_T=torch.full((len(batch.rows_T),), -9.0)) for batch in batches]
    table = merge_columns([local_columns(batches, before, outputs[epoch], epoch=epoch) for epoch in (1, 0)] + [{}])
    assert table["epoch"].tolist() == [0, 1] * (len(table["epoch"]) // 2)
    assert table["student_logp"][:2].tolist() == [-1.0, -2.0] and (table["old_logp"] == -9.0).all()
    order = list(zip(table["sample_index"].tolist(), table["token_index"].tolist(), strict=True))
    assert order == sorted(order)
    save_token_sample(tmp_path / "tokens.npz", table, samples=2)
    with np.load(tmp_path / "tokens.npz") as stored:
        assert set(stored["sample_index"].tolist()) == {0, 3} and (stored["epoch"] == 0).all()
        assert len(stored["epoch"]) == 4 + 11 + 14


def test_without_a_pass_before_the_update_the_old_log_prob_is_that_of_the_update() -> None:
    batches = micro_batches()
    outputs = [{"student_logp": torch.rand(len(batch.rows_T))} for batch in batches]
    columns = local_columns(batches, [None] * len(batches), outputs, epoch=0)
    np.testing.assert_array_equal(columns["old_logp"], columns["student_logp"])
