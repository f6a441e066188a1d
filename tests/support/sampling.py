"""The arguments of `thinksafe.kernels.sampling.sample`, for tests on a CPU and on a GPU."""

import torch


def row_settings(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0) -> list[torch.Tensor]:
    """Return the arguments of `sample` after the logits. A setting is one value for all rows or one value per row."""
    values = [(temperature, "f"), (top_k, "i"), (top_p, "f"), (seed, "i"), (position, "i")]
    dtypes = {"f": torch.float32, "i": torch.int64}
    return [
        torch.as_tensor(value, dtype=dtypes[kind], device=logits.device).expand(len(logits)) for value, kind in values
    ]
