"""What only newer versions of torch can do."""

import pytest
import torch


def skip_where_torch_cannot(name: str) -> None:
    if torch.__version__.startswith("2.6.") and any(kind in name for kind in ("RNN", "LSTM", "GRU")):
        pytest.skip("torch 2.6 does not follow what recurrent layers call")
