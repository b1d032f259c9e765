"""The CRF's loops, compiled by Numba where it is installed.

Written with tensors, each step of :mod:`deconvnet.permutohedral` and of the mean field in
:mod:`deconvnet.crf` passes over memory once, and there are dozens. A compiled loop takes some
points through all of the steps while they are in the processor's cache. The loops here compute
what is written with tensors there, which is also what runs without Numba, on a GPU, and where
there are gradients: both ask :func:`deconvnet.hardware.compiled_kernels` for this module.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from deconvnet.gaussian import NEGLIGIBLE
from deconvnet.openmp import HAS_OPENMP, in_parallel, threads_for

BLOCK = 64
"""Points at a time: enough for a processor to work on eight or sixteen neighbours together."""

SHARES_WORK = HAS_OPENMP
"""Whether these loops run on as many threads as PyTorch's operations; on one they would lose."""

# Without Python's lock; the machine code is kept on disk.
_loop = numba.njit(nogil=True, cache=True, error_model="numpy")
_sums = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
_products = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


# --- the mean field ----------------------------------------------------------------------------

# All that follows is float32: with a number of another type Numba would widen the sums.
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_LEAST, _MOST = np.float32(-80), np.float32(80)  # exponents whose powers stay clear of its ends
_LOWEST_SUM, _HIGHEST_SUM = np.float32(1e-4), np.float32(1e30)
_NEGLIGIBLE = np.float32(NEGLIGIBLE)
_PER_LOG_2 = np.float32(1 / math.log(2))
_LOG_2_COARSE = np.float32(0.693359375)  # nine bits: its product with a whole number is exact
_LOG_2_REST = np.float32(math.log(2) - 0.693359375)
_TAYLOR = tuple(np.float32(1 / math.factorial(k)) for k in range(8))


def add_and_softmax(votes: Tensor, logits: Tensor) -> Tensor:
    """The softmax of ``votes + logits`` over the last dimension, written over ``votes``.

    Powers are taken of the sums as they are, without looking for the largest first. Only where
    that leaves float32's range is it done again with more care.

    Args:
        votes: contiguous float32 ``[N, C]`` on the CPU.
        logits: likewise.

    Returns:
        ``votes``, where what is below ``NEGLIGIBLE`` of :mod:`deconvnet.gaussian` is 0.

    Raises:
        ValueError: The shapes differ.
    """
    if votes.shape != logits.shape:
        raise ValueError(f"votes {tuple(votes.shape)} and logits {tuple(logits.shape)} differ")
    _add_and_softmax(len(votes), threads_for(votes.numel()), votes.numpy(), logits.numpy())
    return votes


@_products  # in this order: the rest is what the first of two products has left
def _power(x):
    """``exp(x)`` from ``_LEAST`` to ``_MOST``: ``2^n * exp(rest)`` with a rest near 0."""
    whole = np.floor(x * _PER_LOG_2 + _HALF)
    rest = x - whole * _LOG_2_COARSE - whole * _LOG_2_REST
    series = _TAYLOR[7]
    series = series * rest + _TAYLOR[6]
    series = series * rest + _TAYLOR[5]
    series = series * rest + _TAYLOR[4]
    series = series * rest + _TAYLOR[3]
    series = series * rest + _TAYLOR[2]
    series = series * rest + _TAYLOR[1]
    series = series * rest + _TAYLOR[0]
    exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return series * np.int32(exponent).view(np.float32)


@_sums
def _softmax_block(values, logits, sums, factors):
    """One block of :func:`add_and_softmax`; the last two are room for what lies in between."""
    rows, labels = values.shape
    flat, others = values.reshape(-1), logits.reshape(-1)
    for k in range(len(flat)):
        x = flat[k] + others[k]
        sums[k] = x
        x = _MOST if x > _MOST else x
        power = _power(_LEAST if x < _LEAST else x)
        flat[k] = _ZERO if x < _LEAST else power
    for i in range(rows):
        total = _ZERO
        for k in range(labels):
            total += values[i, k]
        factors[i] = _ONE / total if _LOWEST_SUM < total < _HIGHEST_SUM else _ZERO
    for i in range(rows):
        factor = factors[i]
        for k in range(labels):
            belief = values[i, k] * factor
            values[i, k] = belief if belief >= _NEGLIGIBLE else _ZERO
    for i in range(rows):
        if factors[i] == _ZERO:
            values[i] = sums[i * labels : (i + 1) * labels]
            _softmax_row(values[i])


@_loop
def _softmax_row(row):
    """The softmax as it is always right; also a row of NaN for a row with NaN."""
    largest = row[0]
    for x in row:
        largest = x if x > largest or x != x else largest
    total = _ZERO
    for k in range(len(row)):
        row[k] = np.exp(row[k] - largest)
        total += row[k]
    row /= total


@_loop
def _softmax_rows(start, stop, votes, logits):
    sums, factors = np.empty(BLOCK * votes.shape[1], np.float32), np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        rows = slice(first, min(first + BLOCK, stop))
        _softmax_block(votes[rows], logits[rows], sums, factors)


@_loop
def _add_and_softmax(rows, threads, votes, logits):
    in_parallel(_softmax_rows, rows, threads, (votes, logits))


# --- the permutohedral lattice -----------------------------------------------------------------


def place_points(features: Tensor, matrix: Tensor, paths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where points lie in the lattice, and their weights at the corners around them.

    Args:
        features: float32 ``[N, d]`` on the CPU.
        matrix: float64 ``[d + 1, d]``, from :func:`deconvnet.permutohedral.embedding`.
        paths: float32 ``[d + 1, d + 1]``, what blurring carries from one corner to another.

    Returns:
        float32 ``[d + 1, N]``, the multiples of the first corner; int32 ``[d + 1, N]``, the
        coordinate that each step reduces; float32 ``[N, d + 1]``, the weights, such that a point
        weighs 1 in its own sum.
    """
    number, side = len(features), len(matrix)
    multiples, weights = features.new_empty(side, number), features.new_empty(number, side)
    order = torch.empty_like(multiples, dtype=torch.int32)
    columns = features.T.contiguous()
    arrays = [x.numpy() for x in (columns, matrix, paths, multiples, order, weights)]
    _place(number, threads_for(multiples.numel()), *arrays)
    return multiples, order, weights


@_loop
def _place_some(start, stop, features, matrix, paths, multiples, order, weights):
    """The steps of ``_place_points`` and ``_round_down`` in :mod:`deconvnet.permutohedral`."""
    side = len(matrix)
    bits = 0
    while 2**bits <= side:
        bits += 1
    one = np.float32(2 ** (31 - bits))
    below_one, last_bits = np.int32(2 ** (31 - bits) - 1), np.int32(2**bits - 1)
    place = np.empty(BLOCK, np.float64)
    rest = np.empty((side, BLOCK), np.int32)  # with the coordinate's number in the last bits
    share = np.empty((side, BLOCK), np.float32)
    first_share, own = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        for k in range(side):  # embed the points, round down, keep what remains
            place[:] = 0
            for j in range(max(k - 1, 0), side - 1):  # the others are zeros
                factor, column = matrix[k, j], features[j]
                for p in range(count):
                    place[p] += factor * column[first + p]
            line, whole = rest[k], multiples[k]
            for p in range(count):
                scaled = np.float32(np.float32(place[p]) / np.float32(side))
                whole[first + p] = np.floor(scaled)
                remainder = np.int32((scaled - np.floor(scaled)) * one)
                line[p] = min(remainder, below_one) << bits | k
        for turn in range(side):  # odd-even transposition sort
            for k in range(turn % 2, side - 1, 2):
                lower, upper = rest[k], rest[k + 1]
                for p in range(count):
                    a, b = lower[p], upper[p]
                    lower[p], upper[p] = min(a, b), max(a, b)
        for k in range(side):  # take the sorted remainders and their coordinates apart
            line, turns, shares = rest[k], order[k], share[k]
            for p in range(count):
                turns[first + p] = line[p] & last_bits
                shares[p] = np.float32(line[p] >> bits) / one
        for p in range(count):  # the gaps between remainders are the weights
            first_share[p] = 1 + share[0, p] - share[side - 1, p]
        for k in range(side - 1, 0, -1):
            upper, lower = share[k], share[k - 1]
            for p in range(count):
                upper[p] -= lower[p]
        share[0] = first_share
        own[:] = 0
        for k in range(side):  # what of a point's weight would come back to it
            for j in range(side):
                here, there, factor = share[k], share[j], paths[k, j]
                for p in range(count):
                    own[p] += factor * here[p] * there[p]
        for p in range(count):
            own[p] = 1 / np.sqrt(own[p])
        for p in range(count):
            for k in range(side):
                weights[first + p, k] = share[k, p] * own[p]


@_loop
def _place(rows, threads, features, matrix, paths, multiples, order, weights):
    arguments = (features, matrix, paths, multiples, order, weights)
    in_parallel(_place_some, rows, threads, arguments)


def corner_keys(
    multiples: Tensor, order: Tensor, least: Tensor, places: Tensor, steps: Tensor, first: int
) -> Tensor:
    """A number for every corner of every point's simplex, the same for the same vertex.

    Args:
        multiples: float32 ``[d + 1, N]``, see :func:`place_points`.
        order: int32 ``[d + 1, N]``, likewise.
        least: ``[d]``, the least differences of multiples that follow each other.
        places: int64 ``[d]``, what each of these differences counts.
        steps: ``[d + 1]``, of the dtype of the keys: what a step along each coordinate adds.
        first: The key of a corner with the least differences.

    Returns:
        ``[N, d + 1]``.
    """
    keys = steps.new_empty(multiples.shape[1], len(multiples))
    arrays = [x.numpy() for x in (multiples, order, least, places, steps)]
    _key(len(keys), threads_for(keys.numel()), *arrays, first, keys.numpy())
    return keys


@_loop
def _key_some(start, stop, multiples, order, least, places, steps, first, keys):
    side = len(steps)
    for p in range(start, stop):
        key = first
        for k in range(side - 1):
            difference = multiples[k + 1, p] - multiples[k, p]
            key += np.int64(difference - least[k]) * places[k]
        keys[p, 0] = key
        for k in range(side - 1):
            key += steps[order[k, p]]
            keys[p, k + 1] = key


@_loop
def _key(rows, threads, multiples, order, least, places, steps, first, keys):
    arguments = (multiples, order, least, places, steps, first, keys)
    in_parallel(_key_some, rows, threads, arguments)


def vertices_of_runs(
    keys: Tensor, origin: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What sorted keys tell: each run of equal ones is a vertex and the points that touch it.

    Args:
        keys: ``[E]``, ascending.
        origin: int64 ``[E]``, where each stood before, in ``weights`` row by row.
        weights: ``[N, d + 1]``, with ``E`` entries.

    Returns:
        int64 ``[M]``, where each run starts; int32 ``[N, d + 1]``, the vertices at each point;
        int32 ``[E]``, the points, run by run; ``[E]``, their weights there.
    """
    points = torch.empty_like(keys, dtype=torch.int32)
    corners = torch.empty_like(weights, dtype=torch.int32)
    touching = weights.new_empty(len(keys))
    threads = threads_for(len(keys))
    found = origin.new_empty(threads)
    _count_runs(threads, keys.numpy(), found.numpy())
    vertices = torch.cat([found.new_zeros(1), found.cumsum(0)])  # before each thread's part
    starts = origin.new_empty(int(vertices[-1]))
    arrays = [x.numpy() for x in (keys, origin, weights, starts, corners, points, touching)]
    _list_runs(threads, vertices.numpy(), *arrays)
    return starts, corners, points, touching


@_loop
def _count_some(start, stop, keys, found):
    for part in range(start, stop):
        first, last = len(keys) * part // len(found), len(keys) * (part + 1) // len(found)
        count = 1 if first == 0 and last > 0 else 0  # the very first entry
        for entry in range(max(first, 1), last):
            count += keys[entry] != keys[entry - 1]
        found[part] = count


@_loop
def _count_runs(threads, keys, found):
    in_parallel(_count_some, threads, threads, (keys, found))


@_loop
def _list_some(start, stop, vertices, keys, origin, weights, starts, corners, points, touching):
    share, parts = 1 / weights.shape[1], len(vertices) - 1
    flat_weights, flat_corners = weights.reshape(-1), corners.reshape(-1)
    for part in range(start, stop):
        vertex = vertices[part] - 1
        for entry in range(len(keys) * part // parts, len(keys) * (part + 1) // parts):
            if entry == 0 or keys[entry] != keys[entry - 1]:
                vertex += 1
                starts[vertex] = entry
            place = origin[entry]
            flat_corners[place] = vertex
            points[entry] = np.int32((place + 0.5) * share)  # rounded down, without a division
            touching[entry] = flat_weights[place]


@_loop
def _list_runs(threads, vertices, *arrays):
    in_parallel(_list_some, threads, threads, (vertices, *arrays))


def one_step_away(keys: Tensor, steps: Tensor) -> Tensor:
    """The vertices next to each vertex of a lattice along each of its directions.

    What :mod:`deconvnet.permutohedral` otherwise looks up key by key. But keys in order, all
    moved by the same step, are still in order: one walk along both finds all that are equal.

    Args:
        keys: integer ``[M]``, ascending, on the CPU.
        steps: integer ``[d + 1]``, how far the key of the next vertex is away.

    Returns:
        int32 ``[d + 1, M + 1, 3]``: the vertex before, the vertex itself and the vertex after;
        ``M``, and so is all of the last row, stands for none.
    """
    found = keys.new_empty(len(steps), len(keys) + 1, 3, dtype=torch.int32)
    threads = threads_for(found.numel())
    _walk(len(steps), threads, keys.numpy(), steps.numpy(), found.numpy())
    return found


@_loop
def _walk_some(start, stop, keys, steps, found):
    missing = len(keys)
    for direction in range(start, stop):
        line, step = found[direction], steps[direction]
        for i in range(missing + 1):
            line[i] = missing, i, missing
        j = 0
        for i in range(missing):
            wanted = keys[i] + step
            while j < missing and keys[j] < wanted:
                j += 1
            if j < missing and keys[j] == wanted:
                line[i, 2] = j
                line[j, 0] = i


@_loop
def _walk(rows, threads, keys, steps, found):
    in_parallel(_walk_some, rows, threads, (keys, steps, found))
