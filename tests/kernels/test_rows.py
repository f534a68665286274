"""Strided tensors as rows, by an outer and an inner index."""

import torch
from fastgen.kernels.rows import rows_of


def test_rows_of_contiguous_tensors_are_one_row_after_the_other():
    tensor = torch.empty(2, 3, 4, 8)
    assert rows_of(tensor) == (1, 24, [(0, 8)])


def test_rows_of_a_slice_of_heads_have_two_strides():
    merged = torch.empty(5, 6, 16)[:, 2:4]
    assert rows_of(merged) == (5, 2, [(96, 16)])


def test_dimensions_are_joined_only_where_all_tensors_allow_it():
    plain, sliced = torch.empty(5, 2, 16), torch.empty(5, 6, 16)[:, 2:4]
    assert rows_of(plain, sliced) == (5, 2, [(32, 16), (96, 16)])


def test_what_has_no_such_rows():
    assert rows_of(torch.empty(4, 8).T) is None
    assert rows_of(torch.empty(2, 3, 4, 5, 8).permute(3, 0, 2, 1, 4)) is None


def test_one_element_and_one_row():
    assert rows_of(torch.empty(1, 1, 1)) == (1, 1, [(0, 1)])
    assert rows_of(torch.empty(7)) == (1, 1, [(0, 7)])
