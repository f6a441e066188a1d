"""Reading and writing Hugging Face checkpoints: config.json and safetensors only.

No other file knows Hugging Face's parameter names. Pickled weights are never opened, and code from a checkpoint is
never run.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thinksafe.data.atomic import atomic_path
from thinksafe.errors import UserError
from thinksafe.kernels.fp8 import quantize
from thinksafe.model.config import PROJECTIONS, ModelConfig, WeightDtype
from thinksafe.model.decoder import Decoder
from thinksafe.model.tensor_parallel import UNSHARDED, TensorShard
from thinksafe.paths import expand_path

_MIB = 2**20
_MAX_FILE_BYTES = 5 * 2**30
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes in which weights may be stored, in the words of safetensors; others belong to quantized checkpoints."""
_TOP_LEVEL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_LAYER_MODULES = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
} | {name: f"{kind.block}.{name}" for name, kind in PROJECTIONS.items()}


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name of a decoder's parameter: 'layers.3.q_proj.bias' ->
    'model.layers.3.self_attn.q_proj.bias'."""
    if name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{kind}"


def resolve_checkpoint(model: str, key: str = "model") -> Path:
    """Return the folder of a checkpoint, given as a folder or as a name on the Hugging Face hub, from which it is
    downloaded, without pickles and code, unless the hub's cache has it.

    Raises:
        UserError: the folder does not exist, or the hub does not provide the model; names the recipe key.
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
        remedy = "check name and network, log in with `hf auth login` if it is gated, or use a folder"
        raise UserError(
            f"{key}: {model!r} is not a local folder, and the hub did not provide it: {reason}; {remedy}"
        ) from error


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
    changes it; another split of the weights into files, or other files in the folder, do not."""
    digest = hashlib.sha256()
    for name, stored in sorted(_stored_tensors(folder).items()):
        if name.endswith("_proj.weight"):
            digest.update(name.encode() + stored.slice[:1].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_json_object(file: Path) -> dict:
    """Return the contents of a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or holds something else; names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


def load_config(folder: Path) -> tuple[ModelConfig, dict]:
    """Return the configuration of a checkpoint's decoder, and the contents of its config.json.

    Raises:
        UserError: config.json is missing or invalid, or describes a model that the decoder does not support.
    """
    file = folder / "config.json"
    try:
        raw = read_json_object(file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing; a checkpoint folder needs config.json and *.safetensors") from None
    if (folder / "adapter_config.json").exists():
        # transformers would load model and adapter.
        raise UserError(f"{folder}: holds an adapter beside the model; merge it, or move adapter_* to another folder")
    return ModelConfig.from_hugging_face(raw, str(file)), raw


@torch.no_grad()
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
        dtype: dtype of the loaded parameters; stored weights of another dtype are converted.
        device: where the parameters go; only one tensor at a time is in host memory.
        shard: the part to load; nothing else is read from disk.
        weight_dtype: `fp8` quantizes the layers' projections while they are loaded, with one scale per output; they are
            never trained, merged or saved. All else stays in `dtype`: an e4m3 head alone would add more error than all
            projections together (0.024 against 0.014 nats per token with the model organism's student).

    Raises:
        UserError: a file is missing or corrupt; a tensor is missing or not part of the model; it has the wrong shape,
            no floating-point dtype or NaN values; a tied head differs from the embedding; or the model cannot be split
            evenly.
    """
    config, _ = load_config(folder)
    stored = _matched_tensors(folder, config)
    with torch.device("meta"):
        decoder = Decoder(config, shard).to(dtype)
    if weight_dtype == "fp8":
        for _, projection in decoder.projections():
            projection.allocate_fp8()
    decoder = decoder.to_empty(device=device)
    decoder.fuse_projections()
    parameters = {hugging_face_name(name): parameter for name, parameter in decoder.named_parameters()}
    scales_e8m0 = {
        hugging_face_name(f"{path}.weight"): projection.scales_e8m0 for path, projection in decoder.projections()
    }
    are_finite = {}
    for name, (_, tensor_slice) in stored.items():
        parameter, tensor = parameters[name], tensor_slice[shard.slices(name, tensor_slice.get_shape())]
        if shard.is_zeroed(name):
            parameter.zero_()
            continue
        if scales_e8m0.get(name) is not None:
            tensor = tensor.to(device)
            quantized = quantize(tensor)
            parameter.copy_(quantized.values)
            scales_e8m0[name].copy_(quantized.scales_e8m0)
        else:
            tensor = parameter.copy_(tensor)  # in the decoder's dtype, which may have a smaller range
        are_finite[name] = torch.stack(tensor.aminmax()).isfinite().all()
    if not all(torch.stack(list(are_finite.values())).tolist()):
        names = some_of(name for name, is_finite in are_finite.items() if not is_finite)
        raise UserError(f"{folder}: NaN or infinite values in {names}; the checkpoint is damaged")
    return decoder.requires_grad_(False).eval()


class _StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: name of the file.
        slice: safetensors slice; indexing it reads only that part from disk.
    """

    file: str
    slice: Any


def _stored_tensors(folder: Path) -> dict[str, _StoredTensor]:
    """Return the tensors in a checkpoint's files by name, in the order of files.

    Raises:
        UserError: a file is missing or corrupt, or index and files do not agree on which file holds a tensor.
    """
    weight_map = _weight_map(folder)
    files, stored = sorted(set(weight_map.values())) or [_WEIGHTS], {}
    existing_files = {path.name for path in folder.glob("*.safetensors")}
    if files != [_WEIGHTS] and _WEIGHTS in existing_files:
        problem = f"holds {_WEIGHTS} and {_INDEX}, which names other files"
        raise UserError(f"{folder}: {problem}; remove what is out of date")
    for file in files:
        path = folder / file
        if file not in existing_files:
            raise UserError(f"{path}: weights are missing{_missing_hint(folder)}")
        try:
            opened = safe_open(path, framework="pt")
            tensors = {name: _StoredTensor(file, opened.get_slice(name)) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: corrupt safetensors ({error})") from None
        if stored.keys() & tensors.keys():
            raise UserError(f"{path}: another file holds {some_of(stored.keys() & tensors.keys())} as well")
        stored |= tensors
    misplaced = [name for name, file in weight_map.items() if name not in stored or stored[name].file != file]
    if misplaced:
        raise UserError(f"{folder / _INDEX}: the files that it names do not hold {some_of(misplaced)}")
    if "embed_tokens.weight" in stored:  # transformers saved its model without a head
        stored = {name if name.startswith("lm_head") else f"model.{name}": item for name, item in stored.items()}
    return stored


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the index of a checkpoint's files, name of a tensor -> name of its file; empty without an index."""
    try:
        weight_map = read_json_object(folder / _INDEX).get("weight_map")
    except FileNotFoundError:
        return {}
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / _INDEX}: not a valid weight index")
    return weight_map


def _missing_hint(folder: Path) -> str:
    """Return the end of the error message for a file of weights that is missing."""
    if any(folder.glob("*.safetensors")):
        return f"; {_INDEX} must name the files, unless there is only {_WEIGHTS}"
    return "; the folder has only pickled weights; convert them to safetensors" if any(folder.glob("*.bin")) else ""


def _matched_tensors(folder: Path, config: ModelConfig) -> dict[str, _StoredTensor]:
    """Return the stored tensors of a checkpoint, exactly one for each parameter of the whole decoder, without reading
    them. A tied head is compared with the embedding.

    Raises:
        UserError: see `load_decoder`.
    """
    stored = _stored_tensors(folder)
    stored = {name: item for name, item in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    for name, item in stored.items():
        if item.slice.get_dtype() not in _WEIGHT_DTYPES:
            problem = f"has dtype {item.slice.get_dtype()}, not one of {', '.join(_WEIGHT_DTYPES)}"
            raise UserError(f"{folder}: tensor {name} {problem}; use the bf16 original of a quantized checkpoint")
    num_layers = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    if num_layers != config.num_layers:
        names = "" if num_layers else f"; the files hold {some_of(stored)}"
        problem = f"config.json requires {config.num_layers} layers, but the weights have {num_layers}"
        raise UserError(f"{folder}: {problem}{names}")
    embedding, head = _TOP_LEVEL_NAMES["embedding"], _TOP_LEVEL_NAMES["lm_head"]
    tied_head = stored.pop(head, None) if config.tied_head else None
    if tied_head and embedding not in stored:
        stored[embedding] = tied_head
    with torch.device("meta"):
        shapes = {hugging_face_name(name): list(item.shape) for name, item in Decoder(config).named_parameters()}
    problems = {"weights are missing": shapes.keys() - stored.keys(), "unknown tensors": stored.keys() - shapes.keys()}
    if any(problems.values()):
        raise UserError(
            f"{folder}: " + "; ".join(f"{key}: {some_of(names)}" for key, names in problems.items() if names)
        )
    for name, shape in shapes.items():
        stored_shape = list(stored[name].slice.get_shape())
        if stored_shape != shape:
            raise UserError(f"{folder}: tensor {name} has shape {stored_shape}, but config.json requires {shape}")
    if tied_head and not _are_equal(tied_head, stored[embedding]):
        problem = f"tie_word_embeddings in config.json is true, but {head} differs from {embedding}"
        raise UserError(f"{folder}: {problem}; set it to false, or remove the tensor")
    return stored


def _are_equal(a: _StoredTensor, b: _StoredTensor) -> bool:
    """Return whether two stored matrices hold the same values; some rows of each are in memory at a time."""
    shape, num_rows = a.slice.get_shape(), 4096
    return shape == b.slice.get_shape() and all(
        torch.equal(a.slice[row : row + num_rows].float(), b.slice[row : row + num_rows].float())
        for row in range(0, shape[0], num_rows)
    )


def some_of(names: Iterable[str]) -> str:
    """Return names for an error message, at most three of them."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save_decoder(decoder: Decoder, raw_config: dict, folder: Path) -> None:
    """Write a checkpoint that transformers can load: config.json with the contents `raw_config`, of which only the
    dtype is changed, and safetensors. Adapters must be merged first. The folder is created if missing, and weights of
    an earlier save are replaced.

    Raises:
        ValueError: the projections are in e4m3.
    """
    decoder.check_not_fp8()
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(decoder.embedding.dtype).removeprefix("torch.")
    raw_config = {key: value for key, value in raw_config.items() if key != "torch_dtype"} | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in decoder.named_parameters():
        if size + parameter.nbytes > _MAX_FILE_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][hugging_face_name(name)] = parameter
        size += parameter.nbytes
    files, weight_map = [], {}
    for number, tensors in enumerate(parts, start=1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        files.append(f"model{suffix}.safetensors")
        save_tensors(tensors, folder / files[-1])
        weight_map |= dict.fromkeys(tensors, files[-1])
    if len(parts) > 1:
        total = sum(parameter.nbytes for parameter in decoder.parameters())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(_INDEX)
    # An earlier save's index and files would be read instead of the new ones; the index goes first.
    for file in sorted(folder.glob("model*.safetensors*"), key=lambda file: file.name != _INDEX):
        if file.name not in files:
            file.unlink()


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors as a safetensors file that everybody may read; a kill leaves no torn file."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(file) as partial:
        save_file(on_host, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors lets only the owner read
