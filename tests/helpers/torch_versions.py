"""What only newer versions of torch can do."""

import pytest
import torch

_CANNOT = {  # in torch 2.6, what has these words in its name
    ("RNN", "LSTM", "GRU"): "torch 2.6 does not follow what recurrent layers call",
    ("deque",): "torch 2.6 reads no deque without running code",
    ("compile subclasses",): "torch 2.6 does not follow the making of a module",
    ("by chunks",): "torch 2.6 traces no concatenation of a list that is a value itself",
}


def skip_where_torch_cannot(name: str) -> None:
    for words, reason in _CANNOT.items():
        if torch.__version__.startswith("2.6.") and any(word in name for word in words):
            pytest.skip(reason)
