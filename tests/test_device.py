"""--device resolves or is refused."""

import pytest
import torch

from fastdiff.device import resolve_device
from fastdiff.errors import OptionError


def test_cpu_and_auto():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("spec", ["tpu", "cuda:999", "meta", ""])
def test_what_is_not_there_is_refused_in_one_line(spec):
    with pytest.raises(OptionError, match=f"--device {spec}: ") as error:
        resolve_device(spec)
    assert "\n" not in str(error.value)
