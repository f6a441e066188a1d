"""The arguments of `thinksafe.kernels.sampling.sample`, for tests on a CPU and on a GPU."""

import torch


def row_settings(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0) -> list[torch.Tensor]:
    """Return [temperature, top_k, top_p, seed, position], [rows] each, in the order of `sample`'s arguments.

    Args:
        logits: [rows, V]; only its number of rows and its device are used.
        temperature, top_k, top_p, seed, position: one value for all rows, or a list with a value for each row.
    """
    values = [(temperature, "f"), (top_k, "i"), (top_p, "f"), (seed, "i"), (position, "i")]
    dtypes = {"f": torch.float32, "i": torch.int64}
    return [
        torch.as_tensor(value, dtype=dtypes[kind], device=logits.device).expand(len(logits)) for value, kind in values
    ]
