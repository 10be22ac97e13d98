"""A mixture drives which examples a run sees: DomainSampler, for the ConcatDataset of the domains.

    sampler = DomainSampler({"code": code, "docs": docs}, config["data"], num_samples=steps * batch, seed=trial.seed)
    loader = DataLoader(ConcatDataset([code, docs]), batch_size=batch, sampler=sampler, generator=torch.Generator())
    for x, y in loader:
        ...
        sampler.advance(len(x))

The sequence of draws is a function of (domains, shares, num_samples, block, seed) by integer hashing alone, so it is
the same for every number of ranks, on every machine, and from every position; nothing of the size of a domain is kept
in memory.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

Whole = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 16  # of the Feistel network: 4 are enough for large domains (Luby & Rackoff 1988), 12 show for 5 examples
CHUNK = 2048  # draws that are computed together, for speed alone
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ORDER, TURN, EPOCH = 0, 1, 2  # what a hash is for: order and turn of a block, order of a domain's epoch


class ChangingShares(Protocol):
    """Shares that depend on the place in the run, as the value of a MixtureSchedule does."""

    def shares(self, step: int, total_steps: int) -> Mapping[str, float]: ...


class DomainSampler(Sampler[int]):
    """Draws indices of the ConcatDataset of the domains, in the proportions of a mixture.

    domains: name -> its dataset or its number of examples, in the order of the ConcatDataset. shares: name -> share,
    non-negative and summing to 1 within 1e-9, or a value with `.shares(step, total_steps)`, such as a SwitchedMixture,
    which is asked with the number of the draw and num_samples; shares that are equal at both ends of a block have to be
    so throughout. num_samples: draws of the whole run, over all ranks. seed: in [0, 2**64).
    rank, world_size: of this process, by default those of torch.distributed where it is initialised, else 0 and 1.
    block: draws that are balanced together; the global batch size balances every step.

    - Every draw comes from a domain with exactly the probability of its share. The counts of a block (draws b * block
      to (b + 1) * block - 1) are within 1 of their expectation: the points of a block are equally spaced on a randomly
      turned circle (systematic sampling), in a random order. Where shares change inside a block it is cut there.
    - Within a domain nothing is drawn twice before everything was drawn once; each epoch has an order of its own.
    - Rank r takes draws r, r + world_size, ... from where the run stands, so the ranks' batches of a step are together
      the single process's batch. All ranks get equally many: at most world_size - 1 draws at the end of the run are
      left out.
    - The position is what the training loop says it consumed: call `advance(len(batch))` on every rank after each
      batch. The sampler cannot know by itself, because the workers of a DataLoader fetch ahead of the loop. So a state
      taken in the middle of an epoch, workers or not, resumes with the first draw that was not consumed, with any
      number of ranks. `iter(sampler)` starts at the position and does not move it.

    ValueError for what does not fit together, TypeError for what is no shares.
    """

    def __init__(
        self,
        domains: Mapping[str, int | Sized],
        shares: Mapping[str, float] | ChangingShares,
        num_samples: int,
        seed: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        block: int = 256,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"DomainSampler needs rank and world_size together, got {rank=} and {world_size=}.")
        if rank is None or world_size is None:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if ready else 0
            world_size = torch.distributed.get_world_size() if ready else 1
        sizes = {name: size if isinstance(size, (int, np.integer)) else len(size) for name, size in domains.items()}
        whole = {"num_samples": num_samples, "block": block, "world_size": world_size}
        for what, number in {**whole, **{f"examples of {name!r}": size for name, size in sizes.items()}}.items():
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
                raise ValueError(f"DomainSampler needs a whole number >= 1 for the {what}, got {number!r}.")
        if not sizes or sum(sizes.values()) >= 2**62:
            raise ValueError(f"DomainSampler needs between 1 and 2**62 examples, got the domains {sizes}.")
        if not all(isinstance(number, (int, np.integer)) for number in (seed, rank)) or not (
            0 <= seed < 2**64 and 0 <= rank < world_size
        ):
            raise ValueError(
                "DomainSampler needs seed in [0, 2**64) and rank in [0, world_size), "
                f"got {seed=}, {rank=} and {world_size=}."
            )
        if not isinstance(shares, Mapping) and not hasattr(shares, "shares"):
            raise TypeError(f"DomainSampler needs shares by name, such as config['data'], got {shares!r}.")
        super().__init__()
        self._names = list(sizes)
        self._sizes = np.array(list(sizes.values()), dtype=np.int64)  # (k,)
        self._starts = np.cumsum(self._sizes) - self._sizes  # (k,), where each begins in the ConcatDataset
        self._shares = dict(shares) if isinstance(shares, Mapping) else shares  # the caller may change theirs
        self._total, self._block, self._seed = int(num_samples), int(block), int(seed)
        self._rank, self._world = int(rank), int(world_size)
        self._position = 0
        self._counted, self._counts = 0, np.zeros(len(sizes), dtype=np.int64)  # draws of each domain before `_counted`
        self._handed_out = self._told = False
        for draw in (0, self._total - 1):
            self._checked(self._shares_at(draw))

    def __len__(self) -> int:
        """Draws that are left for this rank."""
        return (self._total - self._position) // self._world

    def __iter__(self) -> Iterator[int]:
        first, end = self._position, self._position + len(self) * self._world
        counts = self._count_to(first).copy()
        position = first
        while position < end:
            stop = min(position + CHUNK, end)
            domains = self._domains(position, stop)
            slots = self._slots(domains, counts)
            mine = slice((first + self._rank - position) % self._world, None, self._world)
            indices = self._indices(domains[mine], slots[mine]).tolist()
            self._handed_out = self._handed_out or bool(indices)
            yield from indices
            position = stop

    def advance(self, count: int) -> None:
        """Note that this rank's training has consumed `count` more draws, as every other rank has."""
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= len(self):
            raise ValueError(
                f"DomainSampler.advance needs the samples this rank consumed, a whole number in [0, {len(self)}] here, "
                f"got {count!r}."
            )
        self._position += int(count) * self._world
        self._told = True

    @property
    def position(self) -> int:
        """Draws of the whole run that were consumed, over all ranks."""
        return self._position

    @property
    def epochs(self) -> dict[str, float]:
        """How often each domain was passed so far."""
        passed = self._count_to(self._position) / self._sizes
        return dict(zip(self._names, passed.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, the same on all ranks; RuntimeError when it drew but nobody called `advance`."""
        if self._handed_out and not self._told:
            raise RuntimeError(
                "DomainSampler handed out draws and was not told what was consumed, so a resumed run would see them "
                "again; call sampler.advance(len(batch)) after each batch."
            )
        counts = dict(zip(self._names, self._count_to(self._position).tolist(), strict=True))
        return {**self._fixed(), "position": self._position, "counts": counts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict()` was taken; ValueError when it belongs to another sequence of draws."""
        for what, mine in self._fixed().items():
            if state_dict[what] != mine:
                raise ValueError(
                    f"The saved DomainSampler has {what}={state_dict[what]!r} and this one {mine!r}; "
                    "only rank and world_size may change in a run."
                )
        self._position = self._counted = state_dict["position"]
        self._counts = np.array([state_dict["counts"][name] for name in self._names], dtype=np.int64)
        self._handed_out = self._told = False

    def _fixed(self) -> dict[str, Any]:
        """What the sequence of draws follows from, in plain data; lists keep the order."""
        return {
            "domains": [[name, size] for name, size in zip(self._names, self._sizes.tolist(), strict=True)],
            "num_samples": self._total,
            "seed": self._seed,
            "block": self._block,
            "shares": [dict(self._shares_at(0)), dict(self._shares_at(self._total - 1))],
        }

    def _shares_at(self, draw: int) -> Mapping[str, float]:
        return self._shares if isinstance(self._shares, Mapping) else self._shares.shares(draw, self._total)

    def _checked(self, shares: Mapping[str, float]) -> npt.NDArray[np.float64]:
        """`shares` as (k,) in the order of the domains."""
        for name in [*shares, *self._names]:
            if name not in shares or name not in self._names:
                near = difflib.get_close_matches(name, self._names if name in shares else shares, 1)
                hint = f", did you mean {near[0]!r}" if near else ""
                raise ValueError(
                    f"DomainSampler has the domains {self._names} and shares for {list(shares)}: "
                    f"{name!r} is only in one of them{hint}; they must be the same."
                )
        w = np.array([shares[name] for name in self._names], dtype=np.float64)
        if not (w >= 0).all() or not abs(math.fsum(w) - 1) <= 1e-9:  # False for NaN
            raise ValueError(f"DomainSampler needs shares >= 0 that sum to 1 (within 1e-9), got {dict(shares)}.")
        return w

    def _count_to(self, position: int) -> Whole:
        """Draws of each domain before `position`, (k,); remembered, so that a run counts each draw once."""
        while self._counted < position:
            stop = min(self._counted + CHUNK, position)
            self._counts += np.bincount(self._domains(self._counted, stop), minlength=len(self._names))
            self._counted = stop
        return self._counts

    def _slots(self, domains: Whole, counts: Whole) -> Whole:
        """How often the domain of each draw (n,) was drawn before, (n,); adds the draws to `counts`, (k,)."""
        seen = np.cumsum(domains[:, None] == np.arange(len(self._names)), axis=0)  # n x k
        slots: Whole = counts[domains] + seen[np.arange(len(domains)), domains] - 1
        counts += seen[-1]
        return slots

    def _domains(self, start: int, stop: int) -> Whole:
        """Domains of draws start .. stop - 1: (n,)."""
        draws = np.arange(start, stop)
        firsts, lengths = self._runs(draws)
        places = _permuted(draws - firsts, lengths, _hash(self._seed, ORDER, firsts))
        turns = (_hash(self._seed, TURN, firsts) >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1), one for a run
        points = (places / lengths + turns) % 1.0
        if isinstance(self._shares, Mapping):
            return _domains_at(points, self._checked(self._shares))
        domains = np.empty_like(draws)
        for first in np.unique(firsts).tolist():
            domains[firsts == first] = _domains_at(points[firsts == first], self._checked(self._shares_at(first)))
        return domains

    def _runs(self, draws: Whole) -> tuple[Whole, Whole]:
        """Where the run of each draw begins and how long it is, (n,) each: its block, cut where the shares change."""
        firsts = draws - draws % self._block
        lengths = np.minimum(self._block, self._total - firsts)
        if isinstance(self._shares, Mapping):
            return firsts, lengths
        for first, length in np.unique(np.stack([firsts, lengths]), axis=1).T.tolist():
            if self._shares_at(first) == self._shares_at(first + length - 1):
                continue
            begin = first
            for _, run in itertools.groupby(map(self._shares_at, range(first, first + length))):
                end = begin + len(list(run))
                inside = (draws >= begin) & (draws < end)
                firsts[inside], lengths[inside] = begin, end - begin
                begin = end
        return firsts, lengths

    def _indices(self, domains: Whole, slots: Whole) -> Whole:
        """Indices in the ConcatDataset: slot s of a domain is place s % size in the order of epoch s // size."""
        sizes = self._sizes[domains]
        epochs, places = np.divmod(slots, sizes)
        keys = _hash(self._seed, EPOCH, domains, epochs)
        indices: Whole = self._starts[domains] + _permuted(places, sizes, keys)
        return indices


def _domains_at(points: npt.NDArray[np.float64], shares: npt.NDArray[np.float64]) -> Whole:
    """The domains whose arcs, as long as their shares (k,), hold the points (n,) of the circle [0, 1)."""
    positive = np.flatnonzero(shares)  # the last of them takes what rounding leaves, never one without a share
    domains: Whole = positive[np.searchsorted(np.cumsum(shares[positive])[:-1], points, side="right")]
    return domains


def _hash(*words: int | Whole) -> Words:
    """A word for each row of the words, which broadcast to (n,)."""
    state = np.zeros(1, dtype=np.uint64)  # an array: products of numpy scalars warn when they wrap around
    for word in words:
        state = _mixed(state + GOLDEN + np.asarray(word, dtype=np.uint64))
    return state


def _mixed(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a permutation of words without visible structure."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permuted(places: Whole, sizes: Whole, keys: Words) -> Whole:
    """Where each place of range(size) goes in the pseudo-random permutation of its key; all (n,).

    A Feistel network on a power of two >= size, walked until it comes back into the range, twice or less on average
    (Black & Rogaway 2002): memory does not depend on the size.
    """
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)  # may round up, to a longer walk
    low_bits = bits - bits // np.uint64(2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits // np.uint64(2))) - np.uint64(1)
    out = places.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        shift, key = low_bits[walking], keys[walking]
        high, low = out[walking] >> shift, out[walking] & low_mask[walking]
        for _ in range(ROUNDS // 2):
            high ^= _mixed(low ^ key) & high_mask[walking]
            low ^= _mixed(~high ^ key) & low_mask[walking]
            key = key + GOLDEN
        out[walking] = (high << shift) | low
        walking = walking[out[walking] >= sizes[walking].astype(np.uint64)]
    return out.astype(np.int64)
