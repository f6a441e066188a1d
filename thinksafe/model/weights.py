"""Reading and writing Hugging Face checkpoints: config.json and safetensors only.

No other file knows Hugging Face's parameter names. Pickled weights are never opened, and code from a checkpoint is
never run.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thinksafe.errors import UserError
from thinksafe.kernels.fp8 import E4M3, quantize
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.tensor_parallel import UNSHARDED, TensorShard
from thinksafe.paths import expand_path

WeightDtype = Literal["auto", "fp8"]
"""Dtype of the layers' projections: the model's dtype (`auto`) or e4m3 (`fp8`)."""

_MIB = 2**20
_MAX_SHARD_BYTES = 5 * 2**30
_INDEX = "model.safetensors.index.json"
_TOP_LEVEL = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_LAYER_NORMS = {
    "input_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}


def projection_path(name: str) -> str:
    """Return a projection's path within a layer of transformers: 'q_proj' -> 'self_attn.q_proj', 'up_proj' ->
    'mlp.up_proj'."""
    return f"{'self_attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}"


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name of a decoder's parameter: 'layers.3.q_proj_bias' ->
    'model.layers.3.self_attn.q_proj.bias'. Adapters are not supported."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    _, layer, parameter = name.split(".")
    if parameter in _LAYER_NORMS:
        return f"model.layers.{layer}.{_LAYER_NORMS[parameter]}"
    projection = parameter.removesuffix("_bias")
    return f"model.layers.{layer}.{projection_path(projection)}.{'bias' if projection != parameter else 'weight'}"


def resolve_checkpoint(model: str, key: str = "model") -> Path:
    """Return the checkpoint's folder. A model of the Hugging Face hub is downloaded, unless the hub's cache has it,
    without pickles and code.

    Args:
        model: a folder, or a name on the hub.
        key: recipe key that holds `model`, for error messages.

    Raises:
        UserError: the folder does not exist, or the hub does not provide the model.
    """
    path = expand_path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"{key}: no folder {model!r}; use a checkpoint folder or a hub name such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: {model!r} is not a local folder, and the hub did not provide it: {reason}") from error


def checkpoint_fingerprint(folder: Path) -> str:
    """Return a hex digest that identifies a checkpoint. It covers name, size, and first and last MiB of each *.json,
    *.jinja and *.safetensors file; a change in the middle of a larger file does not change it."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode() + stream.read(_MIB))
            stream.seek(max(0, size - _MIB))
            digest.update(stream.read(_MIB))
    return digest.hexdigest()


def projections_digest(folder: Path) -> str:
    """Return a hex digest of the weights that adapters apply to, from the first row of every projection. Fine-tuning
    changes it; another split of the weights into files, or other files in the folder, do not.

    Raises:
        UserError: a file with weights is missing or corrupt.
    """
    rows = ((name, weight[:1]) for name, weight in _stored_tensors(folder) if name.endswith("_proj.weight"))
    digest = hashlib.sha256()
    for name, row in sorted(rows, key=lambda pair: pair[0]):
        digest.update(name.encode() + row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_config(folder: Path) -> tuple[ModelConfig, dict]:
    """Return the configuration of a checkpoint's decoder, and the contents of its config.json.

    Raises:
        UserError: config.json is missing or invalid, or describes a model that the decoder does not support.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: missing; a checkpoint folder needs config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: not a JSON object")
    return ModelConfig.from_hugging_face(raw, str(file)), raw


def load_decoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    shard: TensorShard = UNSHARDED,
    weight_dtype: WeightDtype = "auto",
) -> Decoder:
    """Return the decoder of a checkpoint, or this process's part of it, read directly to a device. All parameters are
    frozen, and the decoder is in evaluation mode.

    Args:
        folder: holds config.json and model.safetensors, or several safetensors files with their index.
        dtype: dtype of the loaded parameters; stored weights of another dtype are converted.
        device: where the parameters go; only one tensor at a time is in host memory.
        shard: the part to load; nothing else is read from disk.
        weight_dtype: `fp8` quantizes the layers' projections while they are loaded, with one scale per output. Such
            projections are never trained, merged or saved. Embedding, language-model head, norms and biases stay in
            `dtype`: an e4m3 head alone would add more error than all projections together (0.024 against 0.014 nats per
            token with the model organism's student).

    Raises:
        UserError: a file is missing or corrupt, a tensor is missing or has the wrong shape, or the model cannot be
            split evenly.
    """
    config, _ = load_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config, shard)
    decoder = decoder.to(dtype)
    fp8_projections = {}  # name -> (layer, projection), for weights in e4m3
    if weight_dtype == "fp8":
        fp8_projections = {
            hugging_face_name(f"layers.{layer.index}.{projection}"): (layer, projection)
            for layer in decoder.layers
            for projection in config.projections
        }
        for layer, projection in fp8_projections.values():
            layer._parameters[projection] = nn.Parameter(layer._parameters[projection].to(E4M3), requires_grad=False)
    decoder = decoder.to_empty(device=device)
    for layer, projection in fp8_projections.values():
        out_features = len(layer._parameters[projection])
        layer.weight_scales[projection] = torch.empty(out_features, dtype=torch.uint8, device=device)
    decoder.fuse_projections()
    unread = {hugging_face_name(name): parameter for name, parameter in decoder.named_parameters()}
    with torch.no_grad():
        for name, tensor_slice in _stored_tensors(folder):
            parameter = unread.pop(name, None)
            if parameter is None:
                continue
            tensor = tensor_slice[shard.slices(name, tensor_slice.get_shape())]
            if parameter.shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, but config.json requires {list(parameter.shape)}"
                raise UserError(f"{folder}: tensor {name} has shape {shapes}")
            if shard.is_zeroed(name):
                parameter.zero_()
            elif name in fp8_projections:
                layer, projection = fp8_projections[name]
                values, scales = quantize(tensor.to(device))
                parameter.copy_(values)
                layer.weight_scales[projection].copy_(scales)
            else:
                parameter.copy_(tensor)
    if unread:
        raise UserError(f"{folder}: weights are missing: {_abbreviated(sorted(unread))}")
    return decoder.requires_grad_(False).eval()


def _abbreviated(names: list[str]) -> str:
    """Return the first three names, and the number of the others if there are more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and safetensors slice of every stored tensor; indexing the slice reads only that part from disk.

    Raises:
        UserError: the index is invalid, or a file with weights is missing or corrupt.
    """
    index = folder / _INDEX
    if index.exists():
        try:
            files = sorted({folder / shard for shard in json.loads(index.read_text())["weight_map"].values()})
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: not a valid weight index") from None
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            has_pickles = any(folder.glob("*.bin"))
            hint = "the folder has only pickled weights; convert them to safetensors" if has_pickles else ""
            raise UserError(f"{file}: weights are missing{'; ' + hint if hint else ''}")
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    yield name, shard.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: corrupt safetensors ({error})") from None


def save_decoder(decoder: Decoder, raw_config: dict, folder: Path) -> None:
    """Write config.json and safetensors that transformers can load. The decoder must carry no adapters: merge them
    first.

    Args:
        raw_config: contents of the loaded checkpoint's config.json; only the dtype is changed.
        folder: created if missing; weights of an earlier save are replaced.

    Raises:
        ValueError: the projections are in e4m3.
    """
    decoder.check_not_fp8()
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(decoder.embedding.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**raw_config, "dtype": dtype}, indent=2) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in decoder.named_parameters():
        tensor = parameter.detach().cpu().contiguous()
        if size + tensor.nbytes > _MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][hugging_face_name(name)] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _save_atomically(shards[0], folder / "model.safetensors")
        _remove_other_weights(folder, {"model.safetensors"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_atomically(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _remove_other_weights(folder, {_INDEX, *weight_map.values()})


def _remove_other_weights(folder: Path, kept_files: set[str]) -> None:
    """Remove the index and weight files of an earlier save, which would otherwise be read instead of the new ones.

    Args:
        kept_files: names of the files of this save.
    """
    for file in sorted(folder.glob("model*.safetensors*"), key=lambda file: file.name != _INDEX):
        if file.name not in kept_files:
            file.unlink()


def _save_atomically(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file under a temporary name and rename it, so that a kill leaves no torn file."""
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors lets only the owner read
    os.replace(partial, file)
