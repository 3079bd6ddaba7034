"""Shared settings of all tests: one torch thread, so that timings and reductions do not depend on the machine."""

import torch

torch.set_num_threads(1)
