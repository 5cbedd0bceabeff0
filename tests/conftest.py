"""One thread in the test process, as in the ranks it starts: they share the cores with it, and other thread counts may cut a matrix
multiplication elsewhere and give other bits."""

import torch

torch.set_num_threads(1)
