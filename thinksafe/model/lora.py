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
from torch import Tensor, nn

from thinksafe.errors import UserError
from thinksafe.model.config import JsonKeys, LoraConfig, ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import hugging_face_name, projections_digest, read_json_object, save_tensors, some_of

_SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of PEFT's init_lora_weights that leave the base weights unchanged. PEFT's other values (pissa, olora, corda,
loftq) move a part of the base weights into the adapter."""
_KEYS_READ = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias")
_KEYS_WITHOUT_EFFECT = (
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "runtime_config"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # for a new adapter
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),  # for options that are errors when they are set
)
"""Keys of an adapter_config.json that do not change what a trained adapter computes."""
_VALUES_OF_UNSET = {
    "rank_pattern": ("null", "{}"),
    "alpha_pattern": ("null", "{}"),
    "layers_to_transform": ("null", "[]"),  # PEFT takes false for layer 0
}
"""Values, in JSON, with which PEFT ignores an option, where they differ from those of other options."""
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
        record = read_json_object(file)
        model, digest = record["model"], record["projections_sha256"]
    except FileNotFoundError:
        return
    except (UserError, KeyError):
        raise UserError(f"{file}: corrupt; remove it to use the adapter on any model of its shape") from None
    if digest != projections_digest(checkpoint):
        raise UserError(
            f"{folder}: this adapter was trained on {model}, and {checkpoint} holds other weights; set model to that "
            f"base model, or remove {file} to use the adapter here anyway"
        )


def load_adapter(decoder: Decoder, folder: Path) -> LoraConfig:
    """Attach an adapter that ThinkSafe or `peft` wrote to a folder, instead of any other, and return its settings.

    Raises:
        UserError: a file is missing or corrupt, a setting is not supported or unknown, or the tensors are not those of
            an adapter with these settings on this model.
    """
    settings_file, tensor_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        settings = read_json_object(settings_file)
        tensors = load_file(tensor_file)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or tensor_file}: missing; {folder} is not an adapter folder") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{tensor_file}: corrupt safetensors ({error})") from None
    config = _read_settings(settings, settings_file, _module_paths(decoder))
    tensors = {name: tensor[decoder.shard.slices(name, tensor.shape)] for name, tensor in tensors.items()}
    _check_tensors(decoder, config, tensors, folder)
    attach(decoder, config, seed=0)
    with torch.no_grad():
        for name, parameter in adapter_parameters(decoder).items():
            parameter.copy_(tensors[name])
    return config


def _module_paths(decoder: Decoder) -> list[str]:
    """Return PEFT's paths of all projections, such as `model.layers.0.self_attn.q_proj`."""
    return [hugging_face_name(f"{path}.weight").removesuffix(".weight") for path, _ in decoder.projections()]


def _check_tensors(decoder: Decoder, config: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise a UserError unless an adapter with settings `config` has the names and shapes of these tensors, and their
    values are finite numbers."""
    shapes = {}
    for path in _module_paths(decoder):
        out_features, in_features, _ = decoder.config.projections[path.rsplit(".", 1)[-1]]
        if path.rsplit(".", 1)[-1] in config.target_modules:
            shapes[f"base_model.model.{path}.lora_A.weight"] = [config.rank, in_features]
            shapes[f"base_model.model.{path}.lora_B.weight"] = [out_features, config.rank]
    wrong = {name for name in shapes.keys() & tensors.keys() if list(tensors[name].shape) != shapes[name]}
    problems = {
        "missing": shapes.keys() - tensors.keys(),
        "unknown": tensors.keys() - shapes.keys(),
        "of another shape": wrong,
    }
    for problem, names in problems.items():
        if names:
            message = f"the adapter was made for another model or with other settings; {problem}: {some_of(names)}"
            raise UserError(f"{folder}: {message}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.isfinite().all():
            raise UserError(f"{folder}: tensor {name} ({tensor.dtype}) must hold finite floating-point numbers")


def _read_settings(settings: dict, file: Path, module_paths: list[str]) -> LoraConfig:
    """Return the settings in the contents of an adapter_config.json for a model that has these projections; raise a
    UserError, which names `file`, if they are invalid or not supported."""
    keys = JsonKeys({"lora_dropout": 0.0} | settings, str(file))
    if settings.get("peft_type") != "LORA":
        raise keys.error("peft_type", "is not supported; only LORA is")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise keys.error("task_type", "is not supported; only CAUSAL_LM is")
    if settings.get("init_lora_weights", True) not in _SUPPORTED_INITS:
        raise keys.error("init_lora_weights", "changes the base model, or is unknown")
    if settings.get("bias", "none") != "none":
        raise keys.error("bias", "must be none")
    for key, value in settings.items():
        is_set = json.dumps(value) not in _VALUES_OF_UNSET.get(key, ("null", "false", "[]"))
        if is_set and key not in _KEYS_READ + _KEYS_WITHOUT_EFFECT:
            raise keys.error(key, "is not supported")
    targets = settings.get("target_modules")
    if not targets or not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise keys.error("target_modules", "must be a list of names")
    unknown = [target for target in targets if not any(_matches(path, target) for path in module_paths)]
    if unknown:
        raise UserError(f"{file}: target_modules: {some_of(unknown)} cannot carry an adapter")
    targeted = {path for path in module_paths if any(_matches(path, target) for target in targets)}
    names = sorted({path.rsplit(".", 1)[-1] for path in targeted})
    if targeted != {path for path in module_paths if path.rsplit(".", 1)[-1] in names}:
        raise keys.error("target_modules", "must name the same projections in every layer")
    rank, alpha = keys.count("r"), keys.number("lora_alpha", -1e6, 1e6)
    if keys.flag("use_rslora"):
        alpha *= math.sqrt(rank)  # PEFT then divides alpha by the root of the rank
    return LoraConfig(rank, alpha, keys.number("lora_dropout", 0, 0.999), tuple(names))


def _matches(path: str, target: str) -> bool:
    """Return whether an entry of target_modules names a module: by its path, or by the end of its path."""
    return f".{path}".endswith(f".{target}")
