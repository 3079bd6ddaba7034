"""A sum over processes, one for each GPU: `python -m dmd2.doctor.one_exchange NUM nccl|gloo`."""

import os
import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT = timedelta(seconds=60)


def _add(rank: int, num: int, backend: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num))
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT)
    value = torch.full((2**20,), float(rank), device=device)
    dist.all_reduce(value)
    wanted = num * (num - 1) / 2
    if not bool((value == wanted).all()):
        raise ArithmeticError(f"the sum over {num} ranks is {float(value[0])} instead of {wanted}")
    dist.destroy_process_group()


def main(num: int, backend: str) -> None:
    """Raises if a process fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    method = "spawn" if backend == "nccl" else "fork"  # CUDA cannot be forked
    multiprocessing.start_processes(_add, (num, backend), nprocs=num, start_method=method)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
