"""Hugging Face checkpoints in and out: config.json and safetensors, nothing else. The one place that knows their names.

Pickled weights are never opened, and no code from a checkpoint is ever run.
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
from thinksafe.kernels.fp8 import E4M3, quantise
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.tensor_parallel import WHOLE, Shard
from thinksafe.paths import expand

WeightDtype = Literal["auto", "fp8"]

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
    """'q_proj' -> 'self_attn.q_proj', 'up_proj' -> 'mlp.up_proj'."""
    return f"{'self_attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}"


def hugging_face_name(name: str) -> str:
    """Our parameter name -> theirs: 'layers.3.q_proj_bias' -> 'model.layers.3.self_attn.q_proj.bias'."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    _, layer, parameter = name.split(".")
    if parameter in _LAYER_NORMS:
        return f"model.layers.{layer}.{_LAYER_NORMS[parameter]}"
    projection = parameter.removesuffix("_bias")
    return f"model.layers.{layer}.{projection_path(projection)}.{'bias' if projection != parameter else 'weight'}"


def resolve(model: str, key: str = "model") -> Path:
    """A folder as it is, or a name on the Hugging Face hub, fetched once without pickles or code.

    Args:
        key: the recipe's key that names it, for error messages.

    Raises:
        UserError: neither a folder nor a model that the hub knows.
    """
    path = expand(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"{key}: no folder {model!r}; give a checkpoint folder or a hub name such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: {model!r} is no folder here and the hub did not give it: {reason}") from error


def fingerprint(folder: Path) -> str:
    """Hex digest that changes with a checkpoint: small files whole, weights by size and their first and last MiB."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode() + stream.read(_MIB))
            stream.seek(max(0, size - _MIB))
            digest.update(stream.read(_MIB))
    return digest.hexdigest()


def projections_digest(folder: Path) -> str:
    """Hex digest of what adapters go on, a row of every projection: fine-tuning changes it, but neither how the weights
    are cut into files, nor what lies beside them."""
    rows = ((name, stored[:1]) for name, stored in _tensors(folder) if name.endswith("_proj.weight"))
    digest = hashlib.sha256()
    for name, row in sorted(rows, key=lambda one: one[0]):
        digest.update(name.encode() + row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_config(folder: Path) -> tuple[ModelConfig, dict]:
    """The decoder's shape and the raw config.json it came from."""
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
    folder: Path, dtype: torch.dtype, device: torch.device | str, shard: Shard = WHOLE, weights: WeightDtype = "auto"
) -> Decoder:
    """Read a checkpoint, or this process's part of it, straight onto a device.

    Args:
        folder: holds config.json and model.safetensors, or shards with their index.
        dtype: of the loaded parameters, whatever the file holds.
        device: where they go; one tensor at a time passes through host memory.
        shard: which part; nothing else is read from the disk.
        weights: `fp8` quantises the layers' projections as they come, a scale an output, for a decoder that is never
            trained, merged or saved. Embedding, head, norms and biases stay in `dtype`: the head alone would cost more
            precision than all projections together (0.024 against 0.014 nats a token of the organism's student).

    Raises:
        UserError: a missing or corrupt file, a missing tensor, one of the wrong shape, a model that cannot be cut so.
    """
    config, _ = load_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config, shard)
    decoder = decoder.to(dtype)
    frozen = {}  # name -> layer and projection, of what is kept in e4m3
    if weights == "fp8":
        frozen = {
            hugging_face_name(f"layers.{layer.index}.{projection}"): (layer, projection)
            for layer in decoder.layers
            for projection in config.projections
        }
        for layer, projection in frozen.values():
            layer._parameters[projection] = nn.Parameter(layer._parameters[projection].to(E4M3), requires_grad=False)
    decoder = decoder.to_empty(device=device)
    for layer, projection in frozen.values():
        layer.exponents[projection] = torch.empty(len(layer._parameters[projection]), dtype=torch.uint8, device=device)
    decoder.stack()
    wanted = {hugging_face_name(name): parameter for name, parameter in decoder.named_parameters()}
    with torch.no_grad():
        for name, stored in _tensors(folder):
            parameter = wanted.pop(name, None)
            if parameter is None:
                continue
            tensor = stored[shard.part(name, stored.get_shape())]
            if parameter.shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, config.json asks for {list(parameter.shape)}"
                raise UserError(f"{folder}: tensor {name} has shape {shapes}")
            if shard.is_added_elsewhere(name):
                parameter.zero_()
            elif name in frozen:
                layer, projection = frozen[name]
                values, exponents = quantise(tensor.to(device))
                parameter.copy_(values)
                layer.exponents[projection].copy_(exponents)
            else:
                parameter.copy_(tensor)
    if wanted:
        raise UserError(f"{folder}: weights are missing: {_some(sorted(wanted))}")
    return decoder.requires_grad_(False).eval()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and safetensors slice of everything that is stored; an index into the slice reads that part."""
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
            hint = "only pickled weights are here; convert them to safetensors" if list(folder.glob("*.bin")) else ""
            raise UserError(f"{file}: weights are missing{'; ' + hint if hint else ''}")
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    yield name, shard.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: corrupt safetensors ({error})") from None


def save_decoder(decoder: Decoder, raw_config: dict, folder: Path) -> None:
    """Write config.json and safetensors that transformers loads. Adapters are not part of it: merge them first.

    Args:
        raw_config: the config.json the decoder came from, written back with the dtype updated.
        folder: made if missing; weights of an earlier save are replaced.

    Raises:
        ValueError: the weights are in e4m3.
    """
    decoder.refuse_e4m3()
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
        _save(shards[0], folder / "model.safetensors")
        _remove_other_weights(folder, {"model.safetensors"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _remove_other_weights(folder, {_INDEX, *weight_map.values()})


def _remove_other_weights(folder: Path, kept: set[str]) -> None:
    """An index or a whole file left over from an earlier save would be read in place of the new one."""
    for file in sorted(folder.glob("model*.safetensors*"), key=lambda file: file.name != _INDEX):
        if file.name not in kept:
            file.unlink()


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes for the owner alone
    os.replace(partial, file)
