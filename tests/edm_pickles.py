"""Pickles in the format of EDM's published networks, written by a stand-in for its `torch_utils.persistence`."""

import io
import math
import pickle
import sys
import types
from collections import OrderedDict
from typing import IO, Any
from unittest import mock

import numpy as np
from torch import nn


def fake_persistence() -> types.ModuleType:
    """The module whose function EDM's pickles call, as something that a pickle can name."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
        raise AssertionError("the embedded source would have been executed")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    return module


class Persistent(nn.Module):
    """Pickles as EDM's persistent objects do: a call with the class's source and the module's attributes."""

    def __init__(self, module: nn.Module, children: dict[str, nn.Module | None], source: str):
        super().__init__()
        self._parameters, self._buffers = OrderedDict(module._parameters), OrderedDict(module._buffers)
        self._modules = OrderedDict(children)
        self._init_args, self._init_kwargs = (), {"init_weight": np.sqrt(1 / 3), "shape": (1, 2)}
        self.source, self.class_name = source, type(module).__name__

    def __reduce__(self) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k not in ("source", "class_name")}
        reconstruct = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        return reconstruct, ({**meta, "state": state},)


def wrap(module: nn.Module, source: str, done: dict[nn.Module, nn.Module]) -> nn.Module | None:
    """The module as EDM would have pickled it: a ModuleDict stays torch's own, an absent skip is None."""
    if isinstance(module, nn.Identity):
        return None
    if module not in done:
        children = {name: wrap(child, source, done) for name, child in module._modules.items()}
        plain = isinstance(module, nn.ModuleDict)
        done[module] = nn.ModuleDict(children) if plain else Persistent(module, children, source)
    return done[module]


def write_edm_pickle(network: nn.Module, file: IO[bytes], source: str = "", protocol: int = 4, **others: Any) -> None:
    """Writes {"ema": network, ...}, with `source` as the code that EDM's loader would run."""
    module = fake_persistence()
    names = {"torch_utils": types.ModuleType("torch_utils"), module.__name__: module}
    with mock.patch.dict(sys.modules, names):
        pickle.dump({"ema": wrap(network, source, {}), "loss_fn": math.pi, **others}, file, protocol)


def edm_pickle(network: nn.Module, source: str = "", protocol: int = 4, **others: Any) -> bytes:
    """The bytes that `write_edm_pickle` writes."""
    file = io.BytesIO()
    write_edm_pickle(network, file, source, protocol, **others)
    return file.getvalue()
