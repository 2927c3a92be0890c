"""One thread a worker: the suite runs in parallel processes."""

import torch

torch.set_num_threads(1)
