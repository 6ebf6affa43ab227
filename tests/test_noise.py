"""Noise with an address: the same address gives the same bits, another gives other noise."""

from __future__ import annotations

import hashlib
import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from entroflow.noise import Address, Stream, gaussian, generator

ADDRESS = {"seed": 3, "stream": Stream.STEP, "iteration": 5, "group": 7, "row": 11, "step": 2}
BASE = tuple(ADDRESS.values())
places = st.tuples(st.integers(0, 2**40), st.integers(-1, 2**40), st.integers(0, 2**40))


def philox(seed, stream, iteration, group, row, step):
    """numpy's Philox with the 128-bit hash of the address, six little-endian 64-bit integers."""
    packed = struct.pack("<6q", seed, stream, iteration, group, row, step)
    key = int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def draw(shape, seed, stream, iteration, places):
    """Noise at several (group, row, step)."""
    columns = torch.tensor(places).reshape(-1, 3).unbind(1)
    return gaussian(shape, Address(seed, iteration), stream, *columns)


def test_noise_is_the_one_of_numpy_at_the_hashed_address():
    for stream, place in itertools.product(Stream, [(0, 0, 0), (7, 11, 2), (1, -1, 9)]):
        found = draw((3, 2), 3, stream, 5, [place])[0]
        wanted = philox(3, stream, 5, *place).standard_normal((3, 2), dtype=np.float32)
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), wanted)


def test_noise_is_what_it_always_was():
    """Stored numbers of `philox` above: a change would change every run that is resumed."""
    wanted = [1.225637674331665, 0.0012128762900829315, 0.517211377620697, -1.765429139137268]
    assert philox(*BASE).standard_normal(4, dtype=np.float32).tolist() == pytest.approx(
        wanted, rel=1e-6
    )
    assert draw((4,), 3, Stream.STEP, 5, [(7, 11, 2)])[0].tolist() == pytest.approx(
        wanted, rel=1e-6
    )
    assert generator(0, Stream.WINDOW).integers(1000, size=4).tolist() == [620, 309, 401, 159]


@pytest.mark.parametrize("coordinate", ADDRESS)
def test_every_coordinate_of_the_address_matters(coordinate):
    """A change of one of them, however small or large, changes every number."""
    first = generator(**ADDRESS).standard_normal(16)
    others = [s for s in Stream if s != Stream.STEP] if coordinate == "stream" else [0, 1, 2**62]
    for value in others:
        other = generator(**{**ADDRESS, coordinate: value}).standard_normal(16)
        assert not np.isin(first, other).any()


def test_coordinates_are_not_interchangeable():
    """Noise at (group, row, step) = (1, 2, 3) is not that of any other order, and so on."""
    drawn = {
        tuple(draw((4,), seed, Stream.STEP, iteration, [place])[0].tolist())
        for seed, iteration, *place in itertools.permutations((1, 2, 3, 4, 5))
    }
    assert len(drawn) == 120


def test_streams_do_not_share_numbers():
    drawn = np.concatenate([generator(0, stream).standard_normal(200) for stream in Stream])
    assert len(np.unique(drawn)) == 200 * len(Stream)
    table = drawn.reshape(len(Stream), 200)
    correlations = np.corrcoef(table)[np.triu_indices(len(Stream), 1)]
    assert np.abs(correlations).max() < 5 / 200**0.5


@settings(max_examples=50, deadline=None, derandomize=True)
@given(places=st.lists(places, min_size=1, max_size=8), data=st.data())
def test_batch_layout_does_not_matter(places, data):
    """Any order, repetition and split of a batch gives the same bits for the same address."""
    together = draw((2, 3), 1, Stream.STEP, 4, places)
    order = data.draw(st.lists(st.integers(0, len(places) - 1), min_size=1, max_size=12))
    mixed = draw((2, 3), 1, Stream.STEP, 4, [places[i] for i in order])
    assert torch.equal(mixed, together[order])
    for place, noise in zip(places, together, strict=True):
        assert torch.equal(draw((2, 3), 1, Stream.STEP, 4, [place])[0], noise)


def test_the_shape_only_folds_the_numbers():
    flat, folded = (draw(shape, 0, Stream.INITIAL, 0, [(0, 0, 0)]) for shape in ((12,), (3, 2, 2)))
    assert torch.equal(flat, folded.flatten(1))


def test_nothing_drawn_before_matters():
    torch.manual_seed(0)
    np.random.seed(0)
    before = draw((5,), 0, Stream.STEP, 0, [(0, 0, 0)])
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw((5,), 0, Stream.STEP, 0, [(0, 0, 1)])
    assert torch.equal(draw((5,), 0, Stream.STEP, 0, [(0, 0, 0)]), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_no_addresses_are_no_noise():
    assert draw((3, 2), 0, Stream.STEP, 0, []).shape == (0, 3, 2)


@pytest.mark.parametrize("axis", ["group", "row", "step"])
def test_noise_over_addresses_is_standard_normal(axis):
    """Kolmogorov-Smirnov over 4000 neighbouring addresses, and no correlation of neighbours."""
    places = [
        tuple(n if name == axis else 0 for name in ("group", "row", "step")) for n in range(4000)
    ]
    drawn = draw((2,), 0, Stream.STEP, 0, places).double()
    for column in drawn.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    neighbours = np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]
    within = np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]
    assert abs(neighbours) < 5 / 4000**0.5
    assert abs(within) < 5 / 4000**0.5


@pytest.mark.parametrize("stream", [Stream.INITIAL, Stream.STEP, Stream.EVALUATION])
def test_noise_within_an_address_is_standard_normal(stream):
    drawn = draw((20_000,), 1, stream, 2, [(3, 4, 5)])[0].double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
