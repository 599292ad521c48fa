"""Rows of arguments: a PackedSequence is taken apart by sequence, as if its sequences had been packed anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from elbowroom.inference.program.frozen import arguments

F64 = torch.float64


def sequences(seed: int, width: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
    return [torch.randn(int(n), width, generator=generator, dtype=F64) for n in lengths]


def same(one: PackedSequence, other: PackedSequence) -> bool:
    a, b = (pad_packed_sequence(p, batch_first=True) for p in (one, other))
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("longest_first", [False, True])
def test_some_sequences_are_those_packed_anew(seed: int, longest_first: bool) -> None:
    found = sequences(seed)
    if longest_first:
        found.sort(key=len, reverse=True)
    packed = pack_sequence(found, enforce_sorted=longest_first)
    assert arguments.sizes(packed) == (len(found),)
    assert arguments.numbers(packed) == sum(s.numel() for s in found)
    rows = torch.randint(len(found), (5,), generator=torch.Generator().manual_seed(seed))
    cell, start = nn.GRU(3, 2).double(), torch.randn(1, len(found), 2, dtype=F64)
    for chosen in (rows, torch.arange(len(found)), torch.arange(len(found)).flip(0), rows[:1]):
        part = arguments.take(packed, 0, chosen)
        anew = pack_sequence([found[i] for i in chosen.tolist()], enforce_sorted=False)
        assert same(part, anew)
        assert torch.equal(part.batch_sizes, anew.batch_sizes)
        ordered = bool((torch.tensor([len(found[i]) for i in chosen.tolist()]).diff() <= 0).all())
        assert (part.sorted_indices is None) == (longest_first and ordered)
        states = start[:, chosen].contiguous()
        for mine, theirs in zip(cell(part, states), cell(anew, states), strict=True):  # outputs and last states
            torch.testing.assert_close(*[t.data if isinstance(t, PackedSequence) else t for t in (mine, theirs)])
    twice = arguments.repeat(packed, 0, 2)
    assert same(twice, pack_sequence(found * 2, enforce_sorted=False))


@pytest.mark.parametrize("seed", range(5))
def test_taking_rows_of_rows_is_taking_them_at_once(seed: int) -> None:
    packed, generator = pack_sequence(sequences(seed), enforce_sorted=False), torch.Generator().manual_seed(seed)
    one = torch.randint(arguments.sizes(packed)[0], (6,), generator=generator)
    two = torch.randint(6, (4,), generator=generator)
    assert same(arguments.take(arguments.take(packed, 0, one), 0, two), arguments.take(packed, 0, one[two]))


def test_leaves_of_nested_arguments_come_back_in_their_places() -> None:
    packed = pack_sequence(sequences(1), enforce_sorted=False)
    tree = ({"a": packed, "b": [torch.ones(2), 3]}, None, "text")
    found = arguments.leaves(tree)
    assert sum(isinstance(leaf, PackedSequence) for leaf in found) == 1
    again = arguments.with_leaves(tree, found)
    assert again[0]["a"] is packed
    assert again[0]["b"][1] == 3
    assert again[2] == "text"
    single = arguments.mapped(lambda leaf: arguments.converted(leaf, lambda t: t.float()), tree)
    assert single[0]["a"].data.dtype == torch.float32
    assert packed.data.dtype == F64
    assert torch.equal(single[0]["a"].batch_sizes, packed.batch_sizes)
    assert single[0]["a"].batch_sizes is not packed.batch_sizes


def test_what_has_no_rows_is_left_as_it_is() -> None:
    for leaf in (torch.ones(3), "text", None, 2.0, pack_sequence(sequences(1), enforce_sorted=False)):
        assert arguments.take(leaf, None, torch.tensor([0])) is leaf
        assert arguments.repeat(leaf, None, 2) is leaf
