"""One thread a worker: the suite runs in parallel processes. Slow tests run if `-m` asks for them, or say so."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes 8 GB of memory: run with -m slow"))
