"""Out-of-memory errors at a chosen moment, without a GPU."""

import sys

import torch
from torch.overrides import TorchFunctionMode


class OutOfMemoryAt(TorchFunctionMode):
    """Mode in which one torch call from a file of thinksafe.kernels raises torch.OutOfMemoryError.

    A call that creates a view allocates nothing on a real device. It may fail here too, which makes the tests stricter.

    Attributes:
        failing_call: index of the call that raises, from 0, among the calls from these files inside the mode.
        has_raised: whether the call was reached.
    """

    def __init__(self, failing_call: int):
        super().__init__()
        self.failing_call, self.num_calls, self.has_raised = failing_call, 0, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if sys._getframe(1).f_globals["__name__"].startswith("thinksafe.kernels."):
            self.num_calls += 1
            if self.num_calls == self.failing_call + 1:
                self.has_raised = True
                raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))

    def wrap(self, function):
        """Return a function of positional arguments that runs `function` inside this mode."""

        def run_with_failure(*args):
            with self:
                return function(*args)

        return run_with_failure
