"""Values of the ranks reach rank 0 whole, and a rank sends no more than its own value."""

from __future__ import annotations

import numpy as np

from tests.dist.gather_ranks import ROWS, columns_of, gather_around_the_limit, gather_uneven
from tests.ranks import run_on_ranks
from tropd_mcore.mcore.collective import RECORD_BYTES

WORLD = 5


def test_a_rank_without_rows_sends_a_record_and_one_with_rows_its_exact_bytes() -> None:
    found = run_on_ranks(gather_uneven, WORLD)
    for rank, (sizes, count, parts) in enumerate(found):
        assert sizes["gather"] == [RECORD_BYTES] and count == 1
        if rank:
            assert parts == [] and sizes["recv"] == []
        data = sum(values.nbytes for values in columns_of(rank).values())
        assert len(sizes["send"]) == (rank in ROWS)
        assert all(data < size < data + 1000 for size in sizes["send"]), "names and shapes take some bytes more"
    received, sent = found[0][0]["recv"], [size for sizes, _, _ in found for size in sizes["send"]]
    assert received == sent and len(received) == len(ROWS), "rank 0 receives nothing but that"


def test_the_merged_table_of_uneven_ranks_holds_each_row_once_in_order() -> None:
    table = run_on_ranks(gather_uneven, WORLD)[0][2]
    assert table["sample_index"].tolist() == [1] * ROWS[1] + [3] * ROWS[3]
    for rank, rows in ROWS.items():
        own = table["sample_index"] == rank
        np.testing.assert_array_equal(table["token_index"][own], np.arange(rows))
        np.testing.assert_array_equal(table["loss"][own], np.arange(rows, dtype=np.float32) + rank)


def test_values_of_every_size_arrive_in_rank_order() -> None:
    found = run_on_ranks(gather_around_the_limit, 4)
    assert [len(value or "") for value in found[0]] == [0, RECORD_BYTES - 30, RECORD_BYTES - 19, RECORD_BYTES]
    assert found[0][0] is None and found[1:] == [[], [], []]
