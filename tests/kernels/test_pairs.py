"""Pairs of rows: whatever is shared out among tasks, every row is in one pair, or beyond the end."""

import pytest

from minigemma.kernels import pairs
from minigemma.kernels.parallel import chunk


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("streams", [1, 2])
def test_pairs_and_their_partners_are_all_rows(streams, alone, monkeypatch):
    monkeypatch.setattr(pairs, "STREAMS", streams)
    monkeypatch.setattr(pairs, "chunk", chunk.py_func)
    for name in ("pairs_of", "some_pairs"):
        monkeypatch.setattr(pairs, name, getattr(pairs, name).py_func)
    for count in (0, 1, 2, 7, 40):
        for per_thread in (1, 3, 8):
            for threads in (1, 2, 5):
                found = []
                for task in range(per_thread * threads):
                    own = pairs.pairs_of_task.py_func(task, per_thread * threads, per_thread, count, alone)
                    rows = [own.first + i * own.step for i in range(own.length)]
                    found += rows
                    found += {pairs.partner_of.py_func(own, row) for row in rows} - set(found)
                assert sorted(found) == list(range(count))
