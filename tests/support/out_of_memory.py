"""A device that runs out of memory at a chosen moment."""

import sys

import torch
from torch.overrides import TorchFunctionMode


class OutOfMemoryAt(TorchFunctionMode):
    """Inside `during(f)`, call number `call` (from 0) of torch from a kernel's own file raises, once; `fired` says
    whether it came to that. A view allocates nothing, but failing there too asks for no less."""

    def __init__(self, call: int):
        super().__init__()
        self.call, self.seen, self.fired = call, 0, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if sys._getframe(1).f_globals["__name__"].startswith("thinksafe.kernels."):
            self.seen += 1
            if self.seen == self.call + 1:
                self.fired = True
                raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))

    def during(self, f):
        def run(*args):
            with self:
                return f(*args)

        return run
