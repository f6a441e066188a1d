"""Export of the trained student as one checkpoint: the adapter merged into the base weights.

It is for programs that cannot read adapters: transformers and serving engines load the folder like the base model. The
checkpoint has the base model's dtype; the sum is computed in fp32 and rounded once.
"""

from pathlib import Path

import torch

from thinksafe.data.atomic import export_folder
from thinksafe.errors import UserError
from thinksafe.model.lora import load_adapter, merge
from thinksafe.model.weights import checkpoint_fingerprint, load_config, load_decoder, save_decoder
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir


def export_model(run: RunDir, checkpoints: CheckpointStore, folder: Path) -> Path:
    """Write the base model with the run's adapter merged, completely or not at all, and return `folder`.

    The merge needs host memory for the whole model, and no GPU.

    Raises:
        UserError: stage `train` is not finished; it trained all weights, so there is no adapter; the base model has
            changed since the run began; the copy of its tokenizer differs; or `folder` is not empty or is a file.
    """
    if not run.is_done("train"):
        raise UserError(f"{run.path}: nothing is trained yet; run `thinksafe train` first")
    if run.recipe.training.method == "full":
        raise UserError(f"{run.path / 'model'}: is already a whole checkpoint, because training.method is full")
    run.pin_input("model", checkpoint_fingerprint(checkpoints.base))
    with export_folder(folder) as staging:
        raw_config = load_config(checkpoints.base)[1]
        decoder = load_decoder(checkpoints.base, _base_dtype(raw_config), torch.device("cpu"))
        load_adapter(decoder, run.path / "adapter")
        merge(decoder)
        save_decoder(decoder, raw_config, staging)
        checkpoints.chat.save(staging)
    return folder


def _base_dtype(raw_config: dict) -> torch.dtype:
    """Return the dtype of the weights that config.json names, or fp32 if it names no floating-point dtype."""
    dtype = getattr(torch, str(raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
