"""One thread in the test process: the ranks it starts share the cores with it."""

import torch

torch.set_num_threads(1)
