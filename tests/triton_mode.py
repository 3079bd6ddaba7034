"""Whether there is a GPU for the Triton kernels; elsewhere tests run them in Triton's interpreter."""

import ctypes


def _gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


HAS_GPU = _gpu()
