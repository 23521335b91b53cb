"""The order of samples: sample number -> source and row, a pure function of the seed.

It needs no state and no world size: the whole position of a run in its data is its step number. So a resume is exact,
in the middle of an epoch too, on any number of ranks that divides the batch. (Where a run's data were changed, what it
had read before is known from its data history: history.py.)
"""

from collections.abc import Sequence

import numpy as np

# --- the order of samples ---------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, SplitMix64's increment


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer on uint64: every input bit reaches every output bit (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_order(numbers: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Which of the n samples each sample number stands for: number i is place i % n of epoch i // n.

    Each epoch is a permutation of its own, of which nothing is stored: a Feistel network keyed by (seed, epoch)
    permutes the smallest square power of two that holds n, and what falls outside 0 .. n - 1 is encrypted again until
    it falls inside ("cycle walking": Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains). So the position of
    a run in its data is its step number alone, on any number of ranks.
    """
    numbers = np.asarray(numbers, dtype=np.uint64)
    epoch, place = numbers // np.uint64(n), numbers % np.uint64(n)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = mix(mix(np.full_like(epoch, seed) + np.uint64(GOLDEN)) ^ epoch)

    def encrypt(x, key):
        left, right = x >> half, x & mask
        for turn in range(6):
            left, right = right, left ^ (mix((key + np.uint64(turn * GOLDEN % 2**64)) ^ right) & mask)
        return left << half | right

    place = encrypt(place, key)
    while (outside := place >= n).any():
        place[outside] = encrypt(place[outside], key[outside])
    return place.astype(np.int64)


def grown_order(numbers: np.ndarray, sizes: Sequence[int], read: Sequence[int], seed: int) -> np.ndarray:
    """As ``sample_order``, of a source that grew: it has sizes[i] rows since read[i] of its samples were read.

    Nothing is read again before all has been read: the rows that are left of the epoch and the new rows, shuffled
    together, are the next samples, and then come epochs of all rows.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    if len(sizes) == 1:
        return sample_order(numbers, sizes[0], seed)
    *_, n_before, n = sizes
    n_left = left_of_epoch(read[-1], sizes[:-1], read[:-1])
    n_next = n_left + n - n_before
    place = numbers - read[-1]  # 0 for the first sample since it grew
    later, next_ = place >= n_next, (0 <= place) & (place < n_next)
    place[next_] = sample_order(place[next_], n_next, seed ^ read[-1])  # those that are left, and then the new rows
    row = place - n_left + n_before
    row[later] = sample_order(place[later] - n_next, n, seed)
    old = ~later & (place < n_left)
    row[old] = grown_order(place[old] + read[-1], sizes[:-1], read[:-1], seed)
    return row


def left_of_epoch(number: int, sizes: Sequence[int], read: Sequence[int]) -> int:
    """How many samples, from a number on, are of the epoch of ``grown_order`` that was begun before it."""
    if len(sizes) == 1:
        return -number % sizes[0] if number else sizes[0]
    n_next = left_of_epoch(read[-1], sizes[:-1], read[:-1]) + sizes[-1] - sizes[-2]
    place = number - read[-1]
    return n_next - place if place < n_next else -(place - n_next) % sizes[-1]


def step_numbers(step: int, samples_a_step: int) -> np.ndarray:
    """The numbers of a step's samples in the order of the run (steps count from 1, samples from 0)."""
    return np.arange((step - 1) * samples_a_step, step * samples_a_step)


def share_of(numbers: np.ndarray, rank: int, world_size: int, micro_batch: int) -> np.ndarray:
    """A rank's share of a step's samples: [accumulation, micro_batch]."""
    return numbers.reshape(-1, world_size, micro_batch)[:, rank]


# --- mixtures ---------------------------------------------------------------------------------------------------------

BLOCK = 16  # sample numbers whose sources are shuffled among themselves


def interleave(numbers: np.ndarray, weights: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample number, its source and its number within that source, i.e. how many earlier samples have it too.

    Fair and yet without a pattern, from two parts:

    - A line of slots in which source 0 has slot p where floor(p w / W) steps up (w its weight, W the sum of all): as
      even as whole numbers allow. The slots that are left, counted anew, are divided among the others the same way. So
      how many of the first p slots a source has is a formula; it is off its share by less than the number of sources.
    - Within each BLOCK of sample numbers the slots are shuffled, by the permutation that ``sample_order`` gives it.

    So in a window of samples, wherever it starts, a source is off its share by what the two blocks torn at its ends can
    make of it (a quarter of a block each) and by rounding. A number costs its block, whatever came before.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    blocks, which = np.unique(numbers.ravel() // BLOCK, return_inverse=True)
    first = blocks[:, None] * BLOCK
    places = first + np.arange(BLOCK)
    slots = first + sample_order(places.ravel(), BLOCK, seed).reshape(places.shape)

    source, within = np.empty_like(slots), np.empty_like(slots)
    free = np.ones(slots.shape, dtype=bool)  # not given to a source yet
    for s, weight in enumerate(weights):
        total = sum(weights[s:])
        mine = free & (_share(slots + 1, weight, total) > _share(slots, weight, total))
        source[mine] = s
        within[mine] = (_share(first, weight, total) + mine.cumsum(axis=1) - 1)[mine]
        free &= ~mine
        slots, first = slots - _share(slots, weight, total), first - _share(first, weight, total)
    place = which * BLOCK + numbers.ravel() % BLOCK
    return source.ravel()[place].reshape(numbers.shape), within.ravel()[place].reshape(numbers.shape)


def count_sources(n: int, weights: Sequence[int], seed: int) -> np.ndarray:
    """How many of the first n sample numbers ``interleave`` gives to each source."""
    slots, counts = n - n % BLOCK, np.zeros(len(weights), np.int64)
    for s, weight in enumerate(weights):  # of whole blocks by the formula
        counts[s] = _share(slots, weight, sum(weights[s:]))
        slots -= int(counts[s])
    if n % BLOCK:
        source, _ = interleave(np.arange(n - n % BLOCK, n), weights, seed)
        counts += np.bincount(source, minlength=len(weights))
    return counts


def _share(p: np.ndarray, weight: int, total: int) -> np.ndarray:
    """floor(p * weight / total), which no p overflows as long as total < 2^31."""
    return p // total * weight + p % total * weight // total
