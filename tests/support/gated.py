"""A model that stops before a step until a test lets it go."""

import threading
from typing import Any

from torch import Tensor

from tests.support.scripted import ScriptedModel

_LONGEST_S = 60.0  # then the test has gone wrong


class GatedModel(ScriptedModel):
    """A scripted model that computes `free_steps` steps, and more once `gate` is set."""

    def __init__(self, *args: Any, free_steps: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.free_steps = free_steps
        self.gate = threading.Event()
        self.stopped = threading.Event()  # set while the model waits, and ever after

    def forward(self, *args: Any) -> Tensor:
        if self.free_steps == 0:
            self.stopped.set()
            assert self.gate.wait(_LONGEST_S)
        else:
            self.free_steps -= 1
        return super().forward(*args)
