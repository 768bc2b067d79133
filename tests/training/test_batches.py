"""The rows of the steps of offline stages."""

import pytest

from rlhf_fast.data.padding import epoch_batches
from rlhf_fast.training.batches import OfflineBatches


def test_the_passes_in_turn():
    batches = OfflineBatches(11, 3, 4, seed=5)
    whole = [batch for epoch in range(4) for batch in epoch_batches(11, 3, 5, epoch)]
    assert (batches.steps, batches.per_epoch) == (12, 3) == (len(whole), len(whole) // 4)
    assert [batches(step) for step in range(1, 13)] == whole
    assert batches(2) == whole[1] and batches(12) == whole[11]  # as a resumed run does


def test_any_number_of_epochs_takes_no_memory():
    batches = OfflineBatches(8, 4, 10**12, seed=0)
    assert batches.steps == 2 * 10**12
    assert sorted(batches(batches.steps - 1) + batches(batches.steps)) == list(range(8))


def test_fewer_rows_than_a_batch():
    with pytest.raises(ValueError, match="^batch_size: expected at most the number of rows, 3, got 4$"):
        OfflineBatches(3, 4, 1, seed=0)
