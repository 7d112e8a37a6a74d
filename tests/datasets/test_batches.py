import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets.batches import EpochBatches, Locality, Repeat
from detpipe.support.errors import DataError

SIZES = st.lists(st.sampled_from([(40, 60), (60, 40), (48, 64), (50, 50)]), min_size=1, max_size=60).map(
    lambda sizes: np.array(sizes, dtype=np.int32)
)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 9), epoch=st.integers(0, 5), training=st.booleans())
def test_every_image_comes_once(sizes: np.ndarray, batch_size: int, epoch: int, training: bool) -> None:
    batches = EpochBatches(sizes, batch_size, seed=3, training=training)
    batches.set_epoch(epoch)
    keys = list(batches)
    assert len(keys) == len(batches)
    assert {key[0] for batch in keys for key in batch} == {epoch}
    assert sorted(key[1] for batch in keys for key in batch) == list(range(len(sizes)))
    assert all(1 <= len(batch) <= batch_size for batch in keys)
    if training:
        assert sum(len(batch) < batch_size for batch in keys) <= 1
    else:
        assert all(len({tuple(sizes[index]) for _, index in batch}) == 1 for batch in keys)


def test_training_batches_are_a_function_of_seed_and_epoch() -> None:
    sizes = np.full((40, 2), 50, dtype=np.int32)
    first, again, other = EpochBatches(sizes, 4, 1), EpochBatches(sizes, 4, 1), EpochBatches(sizes, 4, 2)
    list(first)  # iterating leaves no state behind
    for epoch in range(3):
        assert first.batches(epoch) == again.batches(epoch)
        assert first.batches(epoch) != other.batches(epoch)
    assert first.batches(0) != first.batches(1)


def test_keys_are_made_a_batch_at_a_time_and_the_epoch_is_that_of_the_start() -> None:
    batches = EpochBatches(np.ones((8, 2), dtype=np.int32), 4)
    keys = iter(batches)
    assert not isinstance(keys, list)
    batches.set_epoch(3)
    assert {epoch for batch in keys for epoch, _ in batch} == {0}
    assert {epoch for batch in batches for epoch, _ in batch} == {3}


def test_evaluation_is_the_same_in_every_epoch() -> None:
    batches = EpochBatches(np.full((10, 2), 50, dtype=np.int32), 4, training=False)
    assert batches.batches(0) == batches.batches(7) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_images_of_like_shape_share_a_training_batch() -> None:
    sizes = np.array([(480, 640), (640, 480)] * 64, dtype=np.int32)
    batches = EpochBatches(sizes, 8)
    mixed = [len({tuple(sizes[index]) for index in batch}) > 1 for batch in batches.batches(0)]
    assert sum(mixed) <= 1
    starts = [sizes[batch[0], 0] for batch in batches.batches(0)]
    assert starts != sorted(starts)  # but batches of one shape do not follow each other in order


@pytest.mark.parametrize(("images", "sizes"), [(9, [4, 4]), (8, [4, 4]), (10, [2, 4, 4]), (1, [])])
def test_a_last_batch_that_is_too_small_is_left_out_of_training(images, sizes):
    batches = EpochBatches(np.full((images, 2), 16, dtype=np.int32), 4, smallest=2)
    assert sorted(map(len, batches)) == sizes
    assert len(batches) == len(sizes)
    alone = EpochBatches(np.full((images, 2), 16, dtype=np.int32), 1, smallest=2)
    assert len(list(alone)) == len(alone) == images


def dealt(monkeypatch: pytest.MonkeyPatch, batches: EpochBatches, size: int, epoch: int = 0) -> list[list[list[int]]]:
    """The batches of each of several processes."""
    parts = []
    for rank in range(size):
        monkeypatch.setattr("detpipe.datasets.batches.rank_and_size", lambda rank=rank: (rank, size))
        parts.append(batches.batches(epoch))
        assert len(batches) == len(parts[-1])
    monkeypatch.undo()
    return parts


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES,
    batch_size=st.integers(1, 5),
    size=st.integers(2, 4),
    smallest=st.integers(1, 2),
    window=st.integers(0, 4),
)
def test_several_processes_share_each_step_of_one(
    sizes: np.ndarray, batch_size: int, size: int, smallest: int, window: int
) -> None:
    shard = np.random.default_rng(window).integers(7, size=len(sizes)).astype(np.int32)
    locality = Locality(shard, window) if window else None
    least = smallest * size if smallest > 1 else 1
    one = EpochBatches(sizes, batch_size * size, seed=3, smallest=least, locality=locality)
    several = EpochBatches(sizes, batch_size, seed=3, smallest=smallest, locality=locality)
    with pytest.MonkeyPatch.context() as monkeypatch:
        parts = dealt(monkeypatch, several, size, epoch=2)
    steps = one.batches(2)
    assert {len(part) for part in parts} == {len(steps)}  # nobody waits for another at the end
    for step, whole in enumerate(steps):
        mine = [part[step] for part in parts]
        assert sorted({index for batch in mine for index in batch}) == sorted(whole)
        assert all(1 <= len(batch) <= batch_size for batch in mine)
        if len(whole) >= size:
            assert sum(map(len, mine)) == len(whole)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 5), size=st.integers(2, 4), window=st.integers(0, 4))
def test_in_evaluation_each_image_is_one_process_only(
    sizes: np.ndarray, batch_size: int, size: int, window: int
) -> None:
    shard = np.random.default_rng(window).integers(7, size=len(sizes)).astype(np.int32)
    batches = EpochBatches(sizes, batch_size, training=False, locality=Locality(shard, window) if window else None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if len(sizes) < size:
            with pytest.raises(DataError, match=f"{len(sizes)} images cannot be shared among {size} processes"):
                dealt(monkeypatch, batches, size)
            return
        parts = dealt(monkeypatch, batches, size)
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(len(sizes)))
    whole = batches.batches(0)
    if len(whole) >= size:
        assert sorted(batch for part in parts for batch in part) == sorted(whole)
    assert all(set(batch) <= set(next(w for w in whole if batch[0] in w)) for p in parts for batch in p)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert min(map(len, parts)) >= 1  # or a process would not come to what all do together


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES,
    batch_size=st.integers(1, 5),
    shards=st.integers(1, 9),
    window=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_with_a_locality_every_image_still_comes_once(sizes, batch_size, shards, window, seed):
    locality = Locality(np.random.default_rng(seed).integers(shards, size=len(sizes)).astype(np.int32), window)
    for training in (True, False):
        batches = EpochBatches(sizes, batch_size, seed, training, locality=locality)
        assert sorted(index for batch in batches.batches(3) for index in batch) == list(range(len(sizes)))
        assert len(batches.batches(3)) == len(batches) or not training
        if not training:
            assert all(len({tuple(sizes[index]) for index in batch}) == 1 for batch in batches.batches(3))
            order = [int(locality.windows()[batch[0]]) for batch in batches.batches(3)]
            assert order == sorted(order)


def test_a_locality_of_one_window_changes_nothing():
    sizes = np.array([(480, 640), (640, 480), (333, 500)] * 30, dtype=np.int32)
    locality = Locality(np.arange(90, dtype=np.int32) % 4, 4)
    for training in (True, False):
        plain, local = (EpochBatches(sizes, 4, 1, training, locality=where) for where in (None, locality))
        assert plain.batches(2) == local.batches(2)


@pytest.mark.parametrize(("images", "sizes"), [(9, [4, 4]), (8, [4, 4]), (10, [2, 4, 4]), (1, [])])
def test_a_last_batch_that_is_too_small_is_left_out_with_a_locality_too(images, sizes):
    locality = Locality(np.arange(images, dtype=np.int32), 1)
    batches = EpochBatches(np.full((images, 2), 16, dtype=np.int32), 4, smallest=2, locality=locality)
    assert sorted(map(len, batches)) == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize(("images", "repeats"), [(1, [0, 1, 1]), (4, [0, 1, 1]), (5, [0, 0, 0]), (7, [0, 1, 1])])
def test_an_image_that_only_keeps_a_process_busy_is_marked(
    images: int, repeats: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = EpochBatches(np.full((images, 2), 16, dtype=np.int32), 1 if images == 4 else 2)
    marked, counted = [], []
    for rank in range(3):
        monkeypatch.setattr("detpipe.datasets.batches.rank_and_size", lambda rank=rank: (rank, 3))
        keys = [key for batch in batches for key in batch]
        marked.append(sum(isinstance(key, Repeat) for key in keys))
        counted += [index for key in keys if not isinstance(key, Repeat) for index in key[1:]]
        assert all(len(batch) == 1 for batch in batches if isinstance(batch[0], Repeat))
    assert sorted(counted) == list(range(images))  # each image counts once
    assert marked == repeats
