"""Low-rank adapters on a frozen decoder: W x + (alpha / r) B A x, read and written in PEFT's format.

A and B are parameters of the projection that they adapt. They are stored in fp32, because a step at learning rate 1e-5
would vanish in bf16, and cast to the activations' dtype for each use. The base weights never change, so sampling with
the adapter and training share them.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from thinksafe.errors import UserError, validation_message
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import hugging_face_name, projections_digest, save_tensors

_SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of PEFT's init_lora_weights that leave the base weights unchanged. PEFT's other values (pissa, olora, corda,
loftq) move a part of the base weights into the adapter."""
_BASE_FILE = "base.json"
"""Name of the file in an adapter's folder that records its base weights, see `write_base_record`."""


def check_targets(model: ModelConfig, config: LoraConfig) -> None:
    """Raise a UserError if a target module is no projection of a layer, for example the language-model head."""
    unknown = set(config.target_modules) - set(model.projections)
    if unknown:
        known, names = ", ".join(model.projections), ", ".join(sorted(unknown))
        raise UserError(f"lora.target_modules: {names} cannot carry an adapter; choose from {known}")


def attach(decoder: Decoder, config: LoraConfig, seed: int) -> None:
    """Replace all adapters by new ones and make these the only trainable parameters.

    The model's output is unchanged at first: A [rank, in features] is Kaiming-uniform as in PEFT, drawn with `seed`,
    and B [out features, rank] is zero. Both are in fp32.

    Raises:
        UserError: a target module is no projection of a layer.
    """
    check_targets(decoder.config, config)
    detach(decoder)
    decoder.requires_grad_(False)
    decoder.lora = config
    generator, device = torch.Generator().manual_seed(seed), decoder.embedding.device
    for layer in decoder.layers:
        for name in config.target_modules:
            projection, (out_features, in_features, _) = layer.get_submodule(name), decoder.config.projections[name]
            bound = 1 / math.sqrt(in_features)
            down = torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
            projection.lora = config
            projection.lora_A = nn.Parameter(down.to(device))
            projection.lora_B = nn.Parameter(torch.zeros(out_features, config.rank).to(device))


def detach(decoder: Decoder) -> None:
    """Remove the adapters, if there are any. The base weights and their `requires_grad` do not change."""
    decoder.lora = None
    for _, projection in decoder.projections():
        projection.lora = projection.lora_A = projection.lora_B = None


@contextmanager
def without_adapters(decoder: Decoder) -> Iterator[None]:
    """Turn the adapters off inside the context, so that the decoder computes what the base model does."""
    modules = [decoder, *(projection for _, projection in decoder.projections() if projection.lora)]
    settings = decoder.lora
    try:
        for module in modules:
            module.lora = None
        yield
    finally:
        for module in modules:
            module.lora = settings


@torch.no_grad()
def merge(decoder: Decoder) -> None:
    """Add the adapters to the base weights in place, and remove them.

    weight = weight + (alpha / rank) * B A, computed in fp32 and rounded once to the dtype of the weight.

    Raises:
        ValueError: the base weights are in e4m3.
    """
    decoder.check_not_fp8()
    for _, projection in decoder.projections():
        if projection.lora:
            update = projection.lora_B.float() @ projection.lora_A.float()
            scaling = projection.lora.alpha / projection.lora.rank
            projection.weight.copy_(projection.weight.float() + scaling * update)
    detach(decoder)


def adapter_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Return the parameters A [rank, in features] and B [out features, rank] of all adapters by PEFT's tensor names,
    such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return {
        f"base_model.model.{hugging_face_name(name)}.weight": parameter
        for name, parameter in decoder.named_parameters()
        if ".lora_" in name
    }


def save_adapter(decoder: Decoder, config: LoraConfig, folder: Path, base_model: str) -> None:
    """Write the decoder's adapters in PEFT's format, adapter_config.json and adapter_model.safetensors, to a folder,
    which is created if missing. `base_model` is the folder or hub name of the base model, for adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(adapter_parameters(decoder), folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_base_record(folder: Path, base_model: str, checkpoint: Path) -> None:
    """Write base.json to an adapter's folder, for `check_same_base`: the name of the base model, and a digest of the
    checkpoint that the adapter was trained on. PEFT does not read it."""
    record = {"model": base_model, "projections_sha256": projections_digest(checkpoint)}
    (folder / _BASE_FILE).write_text(json.dumps(record, indent=2) + "\n")


def check_same_base(folder: Path, checkpoint: Path) -> None:
    """Raise a UserError if the adapter in a folder was not trained on the weights of this checkpoint. An adapter
    without a base.json passes, for example if another program wrote it."""
    file = folder / _BASE_FILE
    try:
        record = json.loads(file.read_text())
        model, digest = record["model"], record["projections_sha256"]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{file}: corrupt; remove it to use the adapter on any model of its shape") from None
    if digest != projections_digest(checkpoint):
        raise UserError(
            f"{folder}: this adapter was trained on {model}, and {checkpoint} holds other weights; set model to that "
            f"base model, or remove {file} to use the adapter here anyway"
        )


def load_adapter(decoder: Decoder, folder: Path) -> LoraConfig:
    """Attach an adapter that ThinkSafe or `peft` wrote to a folder, instead of any other, and return its settings.

    Raises:
        UserError: a file is missing or corrupt, the kind of adapter is not supported, or the adapter was made for
            another model.
    """
    settings_file, tensor_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        settings = json.loads(settings_file.read_text())
        tensors = load_file(tensor_file)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or tensor_file}: missing; {folder} is not an adapter folder") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: corrupt adapter ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{folder}: corrupt adapter (adapter_config.json is not a JSON object)")
    config = _read_settings(settings, settings_file)
    attach(decoder, config, seed=0)
    parameters = adapter_parameters(decoder)
    tensors = {name: tensor[decoder.shard.slices(name, tensor.shape)] for name, tensor in tensors.items()}
    if tensors.keys() != parameters.keys() or any(tensors[name].shape != parameters[name].shape for name in parameters):
        detach(decoder)
        raise UserError(f"{folder}: the adapter was made for another model (its tensors do not match)")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return config


def _read_settings(settings: dict, file: Path) -> LoraConfig:
    """Return the settings in the contents of an adapter_config.json; raise a UserError, which names `file`, if they are
    invalid or not supported."""
    from pydantic import TypeAdapter, ValidationError

    if settings.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: peft_type {settings['peft_type']!r} is not supported; only LORA is")
    for option in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        if settings.get(option):
            raise UserError(f"{file}: {option} is not supported")
    if settings.get("init_lora_weights", True) not in _SUPPORTED_INITS:
        raise UserError(f"{file}: init_lora_weights {settings['init_lora_weights']!r} changes the base model")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{file}: trained biases are not supported")
    targets = settings.get("target_modules")
    if not isinstance(targets, list):
        raise UserError(f"{file}: target_modules must be a list of names")
    names = tuple(sorted({target.rsplit(".", 1)[-1] for target in targets}))
    values = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "target_modules": names}
    try:
        return TypeAdapter(LoraConfig).validate_python(values | {"dropout": settings.get("lora_dropout", 0.0)})
    except ValidationError as error:
        raise UserError(f"{file}: r, lora_alpha or lora_dropout: {validation_message(error.errors()[0])}") from None
