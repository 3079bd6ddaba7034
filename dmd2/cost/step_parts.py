"""The parts of a training step, seen from outside: whose pass it is, in which turn, and what moves weights.

An observer is called where a part begins and ends; what it reads there (a clock, a count of operations, a high-water
mark) is its business. The step is not changed: module hooks tell the passes, wrappers the backward passes and updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import nn

from dmd2.method.distillation import Distillation
from dmd2.training import optimizer

GENERATOR, REAL, FAKE, GAN = "generator", "real score", "fake score", "generator's GAN term"
CRITIC, GENERATOR_BACKWARD, CRITIC_BACKWARD = "critic", "generator's backward", "critic's backward"
OPTIMIZERS, AVERAGE, DATA = "optimizers", "weight average", "data"
PARTS = (DATA, GENERATOR, REAL, FAKE, GAN, GENERATOR_BACKWARD, CRITIC, CRITIC_BACKWARD, OPTIMIZERS, AVERAGE)
"""In the order of a step; what is outside of them is the rest."""
GENERATOR_TURN, CRITIC_TURN = (GENERATOR, REAL, FAKE, GAN, GENERATOR_BACKWARD), (CRITIC, CRITIC_BACKWARD)

Place = tuple[Any, str, str]
"""(owner, name of a function of its, part)."""


class Observer(Protocol):
    """Is called for the outermost parts only, so that what it adds up is counted once."""

    def begin(self, part: str) -> None: ...
    def end(self, part: str) -> None: ...


class StepTracer:
    """Decides from the passes which part is on, and tells the observer."""

    def __init__(self, observer: Observer):
        self._observer = observer
        self._open: list[str] = []
        self._generator_turn = False

    def begin(self, part: str) -> None:
        if not self._open:
            self._observer.begin(part)
        self._open.append(part)

    def end(self, *_: Any) -> None:
        part = self._open.pop()
        if not self._open:
            self._observer.end(part)

    def generator_pass(self, *_: Any) -> None:
        self._generator_turn = self._generator_turn or torch.is_grad_enabled()
        self.begin(GENERATOR)

    def critic_pass(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The generator's turn wants the gradient at the images, the critic's only at the weights."""
        if not torch.is_grad_enabled():
            self.begin(FAKE)
        elif inputs[0].requires_grad:
            self.begin(GAN)
        else:
            self._generator_turn = False
            self.begin(CRITIC)

    def backward_part(self) -> str:
        return GENERATOR_BACKWARD if self._generator_turn else CRITIC_BACKWARD

    def gradient_part(self) -> str:
        return GAN if self._generator_turn else CRITIC_BACKWARD

    def wrapped(self, function: Callable[..., Any], part: Callable[[], str]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.begin(part())
            try:
                return function(*arguments, **options)
            finally:
                self.end()

        return call


@contextmanager
def observed(run: Distillation, observer: Observer, more: Sequence[Place] = ()) -> Iterator[None]:
    """Within the block, `observer` is called for the parts of `run.step` and for calls of the functions in `more`."""
    teller = StepTracer(observer)
    named: list[Place] = [
        (optimizer.Optimizer, "step", OPTIMIZERS),
        (optimizer.EMA, "update", AVERAGE),
        (run.teacher.denoiser, "denoise_and_tap", REAL),  # one of the two, which a pass of it always calls
        (run.teacher.denoiser, "predict_and_tap", REAL),
        *more,
    ]
    places: list[tuple[Any, str, Callable[[], str]]] = [(o, name, partial(str, part)) for o, name, part in named]
    places += [
        (torch.Tensor, "backward", teller.backward_part),
        (torch.autograd, "backward", teller.backward_part),
        (torch.autograd, "grad", teller.gradient_part),
    ]
    passes: list[tuple[nn.Module, Callable[..., None]]] = [
        (run.generator, teller.generator_pass),
        (run.critic, teller.critic_pass),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, teller.wrapped(getattr(owner, name), part)))
        for module, begin in passes:
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(teller.end, always_call=True).remove)
        yield
