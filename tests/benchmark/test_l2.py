"""The kernel that measures the L2 cache reads what it says it reads."""

import pytest
import torch

from fastdiff.benchmark.l2 import pieces, read_pieces

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("reads", [1, 8, 13])
def test_every_piece_is_added_up(gathered, reads):
    data, piece, out = pieces(DEVICE, gathered=gathered, programs=3, reads=reads, n_bytes=16 * 1024)
    assert data.shape == (16, 256) and piece.shape == (3, reads)
    read_pieces(data, piece, out)
    expected = data.double().sum(dim=1)[piece.long()].sum(dim=1)
    assert (out.double() - expected).abs().max() < 1e-3


def test_programs_in_order_begin_elsewhere_and_stay_inside():
    _, piece, _ = pieces(DEVICE, gathered=False, programs=5, reads=7, n_bytes=8 * 1024)
    assert piece.flatten().tolist() == [i % 8 for i in range(35)]
