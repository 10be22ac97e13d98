"""What a mixture makes a run see: its proportions, each example once an epoch, the same on any number of ranks."""

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from bo import checkpoint
from integrations.domain_sampler import DomainSampler, _hash, _permuted
from search_spaces.mixture_schedule import SwitchedMixture

SIZES = {"code": 50, "docs": 20, "prose": 7}
SHARES = {"code": 0.55, "docs": 0.35, "prose": 0.1}


def sampler(num_samples=400, shares=SHARES, sizes=SIZES, seed=0, **settings):
    return DomainSampler(sizes, shares, num_samples, seed, **settings)


def domains(indices, sizes=SIZES):
    """The domain, by number, of each index in the ConcatDataset."""
    return np.searchsorted(np.cumsum(list(sizes.values())), indices, side="right")


def three_shares():
    weights = st.lists(st.sampled_from([0.0, 1e-4, 0.1, 0.5, 1.0]) | st.floats(0, 1), min_size=3, max_size=3)
    return weights.filter(lambda w: sum(w) > 0.01).map(
        lambda w: dict(zip(SIZES, (np.array(w) / np.sum(w)).tolist(), strict=True))
    )


# --------------------------------------------------------------------------------------------------------- proportions


@settings(max_examples=50, deadline=None)
@given(shares=three_shares(), block=st.integers(1, 70), seed=st.integers(0, 2**64 - 1))
def test_counts_of_every_block_are_within_one_of_their_expectation(shares, block, seed):
    drawn = domains(list(sampler(300, shares, seed=seed, block=block)))
    assert len(drawn) == 300
    for start in range(0, 300, block):
        part = drawn[start : start + block]
        counts = np.bincount(part, minlength=3)
        assert (abs(counts - len(part) * np.array(list(shares.values()))) < 1 + 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(first=three_shares(), last=three_shares(), block=st.integers(1, 70), switch=st.integers(1, 299))
def test_shares_that_change_during_the_run_are_met_on_both_sides(first, last, block, switch):
    drawn = domains(list(sampler(300, SwitchedMixture(first, last, switch / 300), block=block)))
    start = 0
    while start < 300:
        end = min(start - start % block + block, 300)
        end = switch if start < switch < end and first != last else end
        expected = (end - start) * np.array(list((first if start < switch else last).values()))
        assert (abs(np.bincount(drawn[start:end], minlength=3) - expected) < 1 + 1e-9).all()
        start = end


def test_shares_may_change_at_every_draw():
    class Drifting:
        def shares(self, step, total_steps):
            return {"code": step / total_steps, "docs": 1 - step / total_steps, "prose": 0.0}

    drawn = np.array([domains(list(sampler(40, Drifting(), seed=seed, block=16))) for seed in range(1000)])
    share = np.arange(40) / 40
    assert (abs((drawn == 0).mean(axis=0) - share) <= 4.5 * (share * (1 - share) / 1000) ** 0.5).all()


def test_each_single_draw_has_the_probability_of_its_share():
    runs, length = 2000, 12
    drawn = np.array(
        [domains(list(sampler(length, seed=seed, block=8))) for seed in range(runs)]
    )  # the last block is cut
    for number, share in enumerate(SHARES.values()):
        error = (share * (1 - share) / runs) ** 0.5
        assert (abs((drawn == number).mean(axis=0) - share) < 4.5 * error).all()


def test_the_draws_of_a_block_come_in_random_order():
    runs = 1500
    drawn = np.array(
        [domains(list(sampler(8, {"code": 0.5, "docs": 0.5, "prose": 0}, seed=s, block=8))) for s in range(runs)]
    )
    assert (drawn.sum(axis=1) == 4).all()
    together = (drawn[:, :, None] == drawn[:, None, :]).mean(axis=0)[~np.eye(8, dtype=bool)]
    assert (
        abs(together - 3 / 7) < 4.5 * (3 / 7 * 4 / 7 / runs) ** 0.5
    ).all()  # as in a shuffled block of four and four


def test_a_domain_without_a_share_is_never_drawn():
    shares = {"code": 0.3, "docs": 0.7, "prose": 0.0}  # sums to less than 1 in floating point
    assert 2 not in domains(list(sampler(5000, shares, block=7)))


def test_a_block_of_the_global_batch_balances_every_step():
    half = {"code": 0.5, "docs": 0.25, "prose": 0.25}
    for batch in torch.tensor(list(sampler(160, half, block=16))).split(16):
        assert np.bincount(domains(batch.tolist())).tolist() == [8, 4, 4]


# --------------------------------------------------------------------------------------------------------- examples


def test_each_epoch_of_a_domain_draws_every_example_once_in_an_order_of_its_own():
    indices = np.array(list(sampler(2000)))
    drawn, start = domains(indices), 0
    for number, size in enumerate(SIZES.values()):
        own = indices[drawn == number] - start
        epochs = [own[i : i + size].tolist() for i in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 10
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs)
        start += size


def test_changing_the_dictionary_of_shares_later_changes_nothing():
    shares = dict(SHARES)
    mine = sampler(shares=shares)
    shares.clear()
    assert list(mine) == list(sampler())


def test_the_sequence_is_a_function_of_the_seed():
    assert list(sampler(seed=3)) == list(sampler(seed=3))
    assert list(sampler(seed=3)) != list(sampler(seed=4))
    # These numbers may never change: a run resumed under a later version must go on with the same data.
    assert list(islice(sampler(seed=3), 8)) == [25, 50, 44, 72, 18, 59, 48, 69]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_an_order_is_a_permutation_for_every_size(size, seed):
    places = np.arange(size)
    order = _permuted(places, np.full(size, size), np.broadcast_to(_hash(seed), size))
    assert (np.sort(order) == places).all()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_examples_are_equally_likely(size):
    runs = 20_000
    keys = _hash(1, np.arange(runs))
    orders = np.stack([_permuted(np.full(runs, place), np.full(runs, size), keys) for place in range(size)], axis=1)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    possible = int(np.prod(np.arange(1, size + 1)))
    expected = runs / possible
    assert len(counts) == possible
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < (possible - 1) + 5 * (2 * (possible - 1)) ** 0.5


def test_a_domain_of_a_billion_examples_needs_no_memory_of_that_size():
    huge = {"web": 10**9, "books": 2**61}
    big = sampler(10_000, {"web": 0.5, "books": 0.5}, huge)
    indices = list(big)
    assert len(set(indices)) == 10_000
    assert all(0 <= index < 10**9 + 2**61 for index in indices)
    web = np.array([index for index in indices if index < 10**9])
    assert len(web) == 5000
    assert abs(web.mean() / 10**9 - 0.5) < 4.5 / (12 * 5000) ** 0.5


def test_datasets_may_be_given_for_their_sizes():
    data = {name: TensorDataset(torch.zeros(size)) for name, size in SIZES.items()}
    assert list(sampler(sizes=data)) == list(sampler())


# ------------------------------------------------------------------------------------------------- ranks and resuming


def test_ranks_draw_the_single_process_sequence_between_them():
    whole = list(sampler(400))
    parts = [list(sampler(400, rank=rank, world_size=4)) for rank in range(4)]
    assert [index for step in zip(*parts, strict=True) for index in step] == whole


def test_all_ranks_draw_equally_many():
    parts = [sampler(403, rank=rank, world_size=4) for rank in range(4)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts] == [100] * 4


@settings(max_examples=30, deadline=None)
@given(worlds=st.lists(st.integers(1, 5), min_size=1, max_size=5), steps=st.integers(1, 9), data=st.data())
def test_a_run_resumed_with_other_ranks_goes_on_with_the_same_sequence(worlds, steps, data):
    whole, seen, state = list(sampler(500)), [], None
    for world_size in worlds:
        ranks = [sampler(500, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        parts = [list(islice(rank, 3 * steps)) for rank in ranks]
        seen += [index for step in zip(*parts, strict=True) for index in step]
        for rank in ranks:
            rank.advance(3 * steps if len(parts[0]) == 3 * steps else len(parts[0]))
        assert len({str(rank.state_dict()) for rank in ranks}) == 1
        state = ranks[-1].state_dict()
    assert seen == whole[: len(seen)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # torch forks workers
def test_a_data_loader_resumes_behind_what_was_consumed_not_what_was_fetched(workers, tmp_path):
    data = ConcatDataset(
        [TensorDataset(torch.arange(start, start + size)) for start, size in ((0, 50), (50, 20), (70, 7))]
    )

    def batches(stopped):
        loader = DataLoader(data, 10, sampler=stopped, num_workers=workers, generator=torch.Generator())
        for (batch,) in loader:
            stopped.advance(len(batch))
            yield batch.tolist()

    whole = list(sampler(130))
    stopped = sampler(130)
    first = list(islice(batches(stopped), 4))
    checkpoint.save(tmp_path, stopped.state_dict())
    resumed = sampler(130)
    resumed.load_state_dict(checkpoint.load(tmp_path))

    assert resumed.position == 40
    assert len(resumed) == 90
    assert [index for batch in [*first, *batches(resumed)] for index in batch] == whole
    assert len(resumed) == 0


def test_epochs_say_how_often_a_domain_was_passed():
    run = sampler(400, block=20)
    run.advance(200)
    assert run.epochs == pytest.approx({"code": 110 / 50, "docs": 70 / 20, "prose": 20 / 7})
    assert run.state_dict()["counts"] == {"code": 110, "docs": 70, "prose": 20}


def test_a_loop_that_does_not_tell_what_it_consumed_is_caught_at_its_first_checkpoint():
    run = sampler()
    list(islice(run, 20))
    with pytest.raises(RuntimeError, match=r"call sampler.advance\(len\(batch\)\)"):
        run.state_dict()
    run.advance(20)
    assert run.state_dict()["position"] == 20


def test_another_sequence_cannot_take_over_a_saved_position():
    saved = sampler().state_dict()
    for other, what in (
        (sampler(seed=1), "seed=0 and this one 1"),
        (sampler(401), "num_samples=400"),
        (sampler(block=8), "block=256"),
        (sampler(sizes={**SIZES, "prose": 8}), "domains="),
        (sampler(shares={"code": 0.5, "docs": 0.4, "prose": 0.1}), "shares="),
    ):
        with pytest.raises(ValueError, match=what):
            other.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"sizes": {**SIZES, "docs": 0}}, "whole number >= 1 for the examples of 'docs', got 0"),
        ({"sizes": {}}, "between 1 and 2"),
        ({"sizes": {"code": 2**62, "docs": 1, "prose": 1}}, "between 1 and 2"),
        ({"num_samples": 0}, "num_samples, got 0"),
        ({"num_samples": 2.0}, "num_samples, got 2.0"),
        ({"block": 0}, "block, got 0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"rank": 2}, "rank and world_size together"),
        ({"shares": {"code": 0.5, "docs": 0.5}}, "'prose' is only in one of them"),
        ({"shares": {"code": 0.5, "dcos": 0.5}}, "'dcos' is only in one of them, did you mean 'docs'"),
        ({"shares": {"code": 0.5, "docs": 0.5, "prose": 0.1}}, "sum to 1"),
        ({"shares": {"code": 1.5, "docs": -0.5, "prose": 0}}, "shares >= 0"),
        ({"shares": {"code": float("nan"), "docs": 0.5, "prose": 0.5}}, "shares >= 0"),
        ({"shares": SwitchedMixture({"code": 1.0}, {"code": 1.0}, 0.9)}, "'docs' is only in one of them"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_made(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        sampler(**settings)


@pytest.mark.parametrize("shares", [None, [0.5, 0.3, 0.2]])
def test_shares_without_names_are_refused(shares):
    with pytest.raises(TypeError, match=r"needs shares by name, such as config\['data'\], got"):
        sampler(shares=shares)


@pytest.mark.parametrize("count", [-1, 401, 2.5, True])
def test_no_run_consumes_what_it_cannot(count):
    with pytest.raises(ValueError, match=r"in \[0, 400\] here, got"):
        sampler(400).advance(count)


# ------------------------------------------------------------------------------------------------- torch.distributed


def test_two_real_processes_share_the_sequence(tmp_path):
    meeting = tmp_path / "meeting"
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), meeting], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1] == f"{list(sampler(48))}\n"


def _rank(rank, meeting):
    """One of the processes above: rank and number of ranks come from torch.distributed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    data = ConcatDataset(
        [TensorDataset(torch.arange(start, start + size)) for start, size in ((0, 50), (50, 20), (70, 7))]
    )
    seen = []
    for (batch,) in DataLoader(data, 6, sampler=sampler(48)):
        both = [torch.empty_like(batch) for _ in range(2)]
        torch.distributed.all_gather(both, batch)
        seen += torch.stack(both, dim=1).flatten().tolist()
    print(seen)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
