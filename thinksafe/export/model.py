"""The trained student as one checkpoint: the adapter added into the base weights, for whatever reads no adapters.

transformers and serving engines load the folder as they load the base model. It has the base's dtype: adding is done in
fp32, and rounded once.
"""

import os
from pathlib import Path

import torch

from thinksafe.data.atomic import fresh
from thinksafe.errors import UserError
from thinksafe.model.lora import load_adapter, merge
from thinksafe.model.weights import fingerprint, load_config, load_decoder, save_decoder
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import RunDir

_HOST = torch.device("cpu")


def export_model(run: RunDir, models: Models, folder: Path) -> Path:
    """Write the base with the run's adapter merged in, all of it or nothing. It is made in host memory.

    Raises:
        UserError: nothing is trained, every weight was, the base was changed since, or the folder holds something.
    """
    if not run.is_done("train"):
        raise UserError(f"{run.path}: nothing is trained yet; run `thinksafe train` first")
    if run.recipe.training.method == "full":
        raise UserError(f"{run.path / 'model'}: is a whole checkpoint already, since every weight was trained")
    partial = fresh(folder)
    run.remember_input("model", fingerprint(models.base))
    raw_config = load_config(models.base)[1]
    decoder = load_decoder(models.base, _dtype(raw_config), _HOST)
    load_adapter(decoder, run.path / "adapter")
    merge(decoder)
    save_decoder(decoder, raw_config, partial)
    models.chat.tokenizer.save(partial)
    os.replace(partial, folder.resolve())
    return folder


def _dtype(raw_config: dict) -> torch.dtype:
    """What the base's config.json says its weights are; fp32 where it says nothing."""
    dtype = getattr(torch, str(raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
