"""Models of real shapes with random weights: a decoder, its copy in e4m3, and its copy in transformers."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.shapes import MODELS
from thinksafe.kernels.fp8 import quantize
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import hugging_face_name


def random_decoder(name: str, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """Return a frozen decoder of the model MODELS[name] with random weights, always the same for a device."""
    with torch.device(device):
        decoder = Decoder(ModelConfig.from_hugging_face(MODELS[name], name)).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            if "norm" in parameter_name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    decoder.fuse_projections()
    return decoder.requires_grad_(False).eval()


def fp8_copy(decoder: Decoder) -> Decoder:
    """Return the decoder that `load_decoder` with weight_dtype="fp8" would load; all but the projections is shared."""
    with torch.device("meta"):
        fp8_decoder = Decoder(decoder.config)
    for name, parameter in decoder.named_parameters():
        path, _, key = name.rpartition(".")
        module = fp8_decoder.get_submodule(path)
        if path.endswith("_proj") and key == "weight":
            values, module.scales_e8m0 = quantize(parameter.detach())
            parameter = nn.Parameter(values, requires_grad=False)
        setattr(module, key, parameter)
    fp8_decoder.fuse_projections()
    return fp8_decoder.eval()


def transformers_copy(decoder: Decoder, name: str) -> PreTrainedModel:
    """Return a transformers model with a copy of the decoder's weights, on its device, in its dtype.

    The decoder was made from MODELS[name].

    Raises:
        RuntimeError: the names of the weights do not match those of the transformers model.
    """
    settings = {key: value for key, value in MODELS[name].items() if key != "model_type"}
    config = AutoConfig.for_model(MODELS[name]["model_type"], **settings)
    with torch.device(decoder.embedding.device):
        model = AutoModelForCausalLM.from_config(config, dtype=decoder.embedding.dtype)
    state = {hugging_face_name(parameter): tensor for parameter, tensor in decoder.named_parameters()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if decoder.config.tied_head else set()):
        raise RuntimeError(f"transformers {name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()
