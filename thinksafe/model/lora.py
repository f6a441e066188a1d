"""Low-rank adapters on a frozen decoder: W x + (alpha / r) B A x, read and written in PEFT's format.

A and B are parameters of the layer that they adapt. They are stored in fp32, because a step at learning rate 1e-5 would
vanish in bf16, and cast to the activations' dtype for each use. The base weights never change, so sampling with the
adapter and training share them.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thinksafe.errors import UserError
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import projection_path, projections_digest

_SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of PEFT's init_lora_weights that leave the base weights unchanged. PEFT's other values (pissa, olora, corda,
loftq) move a part of the base weights into the adapter."""
_BASE_FILE = "base.json"
"""Name of the file in an adapter's folder that records its base weights, see `write_base_record`."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA), which add an update B A to frozen weights. The defaults are the paper's.

    Attributes:
        rank: rank of the update, the number of columns of B. Higher ranks can learn more and need more memory.
        alpha: scale of the update; B A is multiplied by alpha / rank.
        dropout: share of the elements of an adapter's input that training sets to zero.
        target_modules: projections that carry an adapter, any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and
            down_proj.
    """

    __pydantic_config__ = {"extra": "forbid"}

    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.rank < 1 or not self.target_modules:
            raise ValueError("rank must be at least 1 and target_modules must name at least one projection")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be in [0, 1)")


def check_targets(model: ModelConfig, config: LoraConfig) -> None:
    """Check that the model's layers have all target modules.

    Raises:
        UserError: a target module is no projection of a layer, for example the language-model head or the embedding.
    """
    unknown = set(config.target_modules) - set(model.projections)
    if unknown:
        known, names = ", ".join(model.projections), ", ".join(sorted(unknown))
        raise UserError(f"lora.target_modules: {names} cannot carry an adapter; choose from {known}")


def attach(decoder: Decoder, config: LoraConfig, seed: int) -> None:
    """Replace all adapters by new ones and make these the only trainable parameters.

    The model's output is unchanged at first: A [rank, in features] is Kaiming-uniform as in PEFT, and B
    [out features, rank] is zero. Both are in fp32.

    Args:
        seed: seed of A's random numbers.

    Raises:
        UserError: a target module is no projection of a layer.
    """
    check_targets(decoder.config, config)
    detach(decoder)
    decoder.requires_grad_(False)
    decoder.lora = config
    generator, device = torch.Generator().manual_seed(seed), decoder.embedding.device
    for layer in decoder.layers:
        layer.adapters = dict.fromkeys(config.target_modules, (config.alpha / config.rank, config.dropout))
        for name in config.target_modules:
            out_features, in_features, _ = decoder.config.projections[name]
            bound = 1 / math.sqrt(in_features)
            down = torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
            up = torch.zeros(out_features, config.rank)
            layer.register_parameter(f"{name}_lora_A", nn.Parameter(down.to(device)))
            layer.register_parameter(f"{name}_lora_B", nn.Parameter(up.to(device)))


def detach(decoder: Decoder) -> None:
    """Remove the adapters, if there are any. The base weights and their `requires_grad` do not change."""
    for layer in decoder.layers:
        for name in layer.adapters:
            del layer._parameters[f"{name}_lora_A"], layer._parameters[f"{name}_lora_B"]
        layer.adapters = {}
    decoder.lora = None


@contextmanager
def without_adapters(decoder: Decoder) -> Iterator[None]:
    """Turn the adapters off inside the context, so that the decoder computes what the base model does."""
    adapters = [layer.adapters for layer in decoder.layers]
    try:
        for layer in decoder.layers:
            layer.adapters = {}
        yield
    finally:
        for layer, layer_adapters in zip(decoder.layers, adapters, strict=True):
            layer.adapters = layer_adapters


@torch.no_grad()
def merge(decoder: Decoder) -> None:
    """Add the adapters to the base weights in place, and remove them.

    weight = weight + (alpha / rank) * B A, computed in fp32 and rounded once to the dtype of the weight.

    Raises:
        ValueError: the base weights are in e4m3.
    """
    decoder.check_not_fp8()
    for layer in decoder.layers:
        for name, (scaling, _) in layer.adapters.items():
            base, down, up = (layer._parameters[key] for key in (name, f"{name}_lora_A", f"{name}_lora_B"))
            base.copy_(base.float() + scaling * (up.float() @ down.float()))
    detach(decoder)


def adapter_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Return the parameters A [rank, in features] and B [out features, rank] of all adapters by PEFT's tensor names,
    such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return {
        f"base_model.model.model.layers.{layer.index}.{projection_path(name)}.lora_{half}.weight": layer._parameters[
            f"{name}_lora_{half}"
        ]
        for layer in decoder.layers
        for name in layer.adapters
        for half in "AB"
    }


def save_adapter(decoder: Decoder, config: LoraConfig, folder: Path, base_model: str) -> None:
    """Write the decoder's adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

    Args:
        config: settings of the adapters, for adapter_config.json.
        folder: created if missing.
        base_model: folder or hub name of the base model, for adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {
        name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(decoder).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors lets only the owner read
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
    """Write base.json, which records the base weights of an adapter for `check_same_base`. PEFT does not read it.

    Args:
        folder: folder of the adapter.
        base_model: name of the checkpoint, for error messages.
        checkpoint: folder of the checkpoint that the adapter was trained on.
    """
    record = {"model": base_model, "projections_sha256": projections_digest(checkpoint)}
    (folder / _BASE_FILE).write_text(json.dumps(record, indent=2) + "\n")


def check_same_base(folder: Path, checkpoint: Path) -> None:
    """Check that an adapter was trained on the weights of this checkpoint. An adapter without a base.json passes, for
    example if another program wrote it.

    Args:
        folder: folder of the adapter.
        checkpoint: folder of the checkpoint that the adapter is to be used with.

    Raises:
        UserError: the adapter was trained on other weights, or its base.json is corrupt.
    """
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
    """Attach an adapter that ThinkSafe or `peft` wrote, instead of any other, and return its settings.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: a file is missing or corrupt, the kind of adapter is not supported, or the adapter was made for
            another model.
    """
    from pydantic import TypeAdapter, ValidationError

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
    if settings.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{settings_file}: peft_type {settings['peft_type']!r} is not supported; only LORA is")
    for option in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        if settings.get(option):
            raise UserError(f"{settings_file}: {option} is not supported")
    if settings.get("init_lora_weights", True) not in _SUPPORTED_INITS:
        raise UserError(f"{settings_file}: init_lora_weights {settings['init_lora_weights']!r} changes the base model")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{settings_file}: trained biases are not supported")
    targets = settings.get("target_modules")
    if not isinstance(targets, list):
        raise UserError(f"{settings_file}: target_modules must be a list of names")
    names = tuple(sorted({target.rsplit(".", 1)[-1] for target in targets}))
    values = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "target_modules": names}
    try:
        config = TypeAdapter(LoraConfig).validate_python(values | {"dropout": settings.get("lora_dropout", 0.0)})
    except ValidationError as error:
        raise UserError(f"{settings_file}: r, lora_alpha or lora_dropout: {error.errors()[0]['msg']}") from None
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
