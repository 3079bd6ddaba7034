"""One frozen network in three roles: the teacher, and a student and a critic that each train low-rank adapters on it.

The adapters are peft's (Hu et al. 2022). A role is a denoiser of its own, whose parameters are its adapters alone, so
that optimizers, averages, checkpoints and exports hold nothing else. Switching roles avoids what peft does silently:

1. `set_adapter` and `enable_adapters` change `requires_grad`, and autograd drops the gradient of a weight that is
   frozen when backward runs: a switch leaves the flags alone.
2. `set_adapter` does not undo `enable_adapters(False)`: a critic would be the teacher. A switch sets both.
3. Activation checkpointing recomputes with whatever adapter is active in backward: a block recomputes in the role
   that ran it.
4. A file of adapters without their alpha is loaded with a scale of 1: see `export.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dmd2.config import LoRA
from dmd2.errors import UserError
from dmd2.method.denoiser import Cond, Denoiser, Prediction
from dmd2.teachers.diffusers_layers import Recomputed, replace_layers
from dmd2.teachers.diffusers_unet import DiffusersDenoiser, Precision
from dmd2.teachers.weights import check_state

TEACHER = "teacher"


class SharedNetwork:
    """A frozen denoiser with the adapters of several roles, of which one is active; outside `role` it is the teacher.

    `adapters` maps the names of roles to their adapters. Their first factors are drawn from `seed` (peft's default,
    Kaiming), the second are zero: every role starts equal to the teacher. Raises UserError if no module is adapted.
    """

    def __init__(self, network: DiffusersDenoiser, adapters: Mapping[str, LoRA], *, seed: int = 0):
        self.network = network.requires_grad_(False)
        self.adapters = dict(adapters)
        self._active = TEACHER
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, lora in self.adapters.items():
                _inject(network, name, lora)
        replace_layers(network)  # of the adapters: they compute in their input's dtype too
        self.layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
        for layer in self.layers:
            layer.cast_input_dtype_enabled = False
        for name in self.adapters:
            for _, part in self.parts(name):
                part.float().requires_grad_(True)
        self._switch(self.layers, TEACHER)
        for block in network.blocks():
            own = [module for module in block.modules() if isinstance(module, LoraLayer)]
            assert isinstance(block, Recomputed)
            block.at_recompute = partial(self._recomputing, own)

    def parts(self, role: str) -> Iterator[tuple[str, nn.Module]]:
        """The two factors of each adapter of a role, by their names in a file: `conv_in.lora_A`, `conv_in.lora_B`."""
        for name, module in self.network.named_modules():
            if isinstance(module, LoraLayer) and role in module.lora_A:
                yield f"{name}.lora_A", module.lora_A[role]
                yield f"{name}.lora_B", module.lora_B[role]

    @contextmanager
    def role(self, name: str) -> Iterator[DiffusersDenoiser]:
        """The network in the given role; afterwards it is in the role it was in before."""
        with self._in(self.layers, name):
            previous, self._active = self._active, name
            try:
                yield self.network
            finally:
                self._active = previous

    @contextmanager
    def _in(self, layers: Sequence[LoraLayer], name: str) -> Iterator[None]:
        previous = self._active
        self._switch(layers, name)
        try:
            yield
        finally:
            self._switch(layers, previous)

    def _recomputing(self, layers: Sequence[LoraLayer]) -> Any:
        """The context in which backward recomputes the layers of a block that runs now."""
        return self._in(layers, self._active)

    def _switch(self, layers: Sequence[LoraLayer], name: str) -> None:
        """Sets what the layers' forward reads, for the 788 layers of SDXL in some milliseconds.

        peft's public functions take a quarter of a second, since they set `requires_grad` too.
        """
        for layer in layers:
            layer._disable_adapters = name == TEACHER
            if name != TEACHER:
                layer._active_adapter = [name]
        if layers and (layers[0].disable_adapters, name in layers[0].active_adapters) != (
            name == TEACHER,
            name != TEACHER,
        ):
            raise RuntimeError("this version of peft keeps its active adapter elsewhere")


class Role(Denoiser):
    """The shared network in one role: a denoiser with that role's adapters as its only parameters.

    Names of parameters are those of peft without the adapter's name: `down_blocks.0.(...).to_q.lora_A.weight`. The
    teacher has none. A copy of the teacher's role is an independent network without adapters; other roles cannot be
    copied. Moving one role moves the shared network. Layout "shard" is not supported.
    """

    predicts_x0 = False
    shardable = False

    def __init__(self, shared: SharedNetwork, name: str):
        super().__init__()
        self.shared, self.name = shared, name
        self.feature_shapes, self.sample_shape = shared.network.feature_shapes, shared.network.sample_shape
        self.precision = shared.network.precision
        for path, part in shared.parts(name):
            _attach(self, path, part)

    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Denoiser`."""
        with self.shared.role(self.name) as network:
            network.precision = self.precision
            return network.denoise_and_tap(x, sigma, cond, num_denoise, num_taps)

    def predict_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Prediction, list[Tensor]]:
        """See `Denoiser`."""
        with self.shared.role(self.name) as network:
            network.precision = self.precision
            return network.predict_and_tap(x, sigma, cond, num_denoise, num_taps)

    def output(self, scaled: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See `DiffusersDenoiser`."""
        with self.shared.role(self.name) as network:
            network.precision = self.precision
            return network.output(scaled, time, cond)

    def store(self, precision: Precision) -> Role:
        """See `Denoiser`: the shared weights, for all roles; adapters stay float32."""
        self.shared.network.store(precision)
        return self

    def prepare(
        self, *, compile: bool = False, activation_checkpointing: bool = False, backend: str = "inductor"
    ) -> None:
        """See `Denoiser`; once for all roles."""
        self.shared.network.prepare(compile=compile, activation_checkpointing=activation_checkpointing, backend=backend)

    def _apply(self, fn: Any, recurse: bool = True) -> Role:
        self.shared.network._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusersDenoiser:
        if self.name != TEACHER:
            raise TypeError(f"the role {self.name} of a shared network cannot be copied")
        return _without_adapters(self.shared.network)


def roles(network: DiffusersDenoiser, adapters: Mapping[str, LoRA], *, seed: int = 0) -> dict[str, Role]:
    """A role for the teacher and for each name of `adapters`, on one shared network, which `network` becomes."""
    shared = SharedNetwork(network, adapters, seed=seed)
    return {name: Role(shared, name) for name in (TEACHER, *adapters)}


def load_adapter(role: Role, state: Mapping[str, Tensor], where: str) -> None:
    """Copies the adapters of a file into a role.

    Raises UserError naming `where` if they have another rank, or are of another network or other modules.
    """
    wanted = role.state_dict()
    rank, own = _rank(state), role.shared.adapters[role.name].rank
    if rank is not None and rank != own:
        raise UserError(f"{where}: adapters of rank {rank}, but rank {own} is configured; correct `rank` or the file")
    check_state(state, wanted, where)
    role.load_state_dict(dict(state))


def merged(role: Role) -> dict[str, Tensor]:
    """The state dict of the U-Net with a role's adapters added to its weights: W + alpha / rank * B A, float32."""
    network = _without_adapters(role.shared.network)
    state = network.state_dict()
    for name, layer in role.shared.network.named_modules():
        if isinstance(layer, LoraLayer) and role.name in layer.lora_A:
            with torch.no_grad():
                weight = state[f"{name}.weight"]
                state[f"{name}.weight"] = weight.float() + layer.get_delta_weight(role.name).float()
    return state


def merged_with(role: Role, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`merged` with the adapters `state` (an average) in place of the role's own, which stay as they are."""
    own = {name: value.detach().clone() for name, value in role.state_dict().items()}
    role.load_state_dict(dict(state))
    try:
        return merged(role)
    finally:
        role.load_state_dict(own)


def _inject(network: DiffusersDenoiser, name: str, lora: LoRA) -> None:
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    try:
        with warnings.catch_warnings():  # of a second adapter, which is wanted
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(settings, network, adapter_name=name)
    except ValueError as error:
        raise UserError(f"train.{name}_lora.targets: {error}") from None


def _attach(root: nn.Module, path: str, part: nn.Module) -> None:
    """Registers `part` below `root` under a dotted path, with empty modules on the way."""
    *parents, last = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, part)


def _without_adapters(network: DiffusersDenoiser) -> DiffusersDenoiser:
    """A copy of the network without adapters, with the names of a plain U-Net."""
    blocks = network.blocks()
    hooks = [block.__dict__.pop("at_recompute", None) for block in blocks]  # they refer to the shared network
    try:
        plain = copy.deepcopy(network)
    finally:
        for block, hook in zip(blocks, hooks, strict=True):
            if hook is not None:
                block.at_recompute = hook
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, module.get_base_layer())
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def _rank(state: Mapping[str, Tensor]) -> int | None:
    """The rank of the adapters in a file: the rows of their first factors."""
    return next((value.shape[0] for name, value in state.items() if name.endswith(".lora_A.weight")), None)
