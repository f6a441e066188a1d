"""Models of real shapes with random weights, made where they run: ours, in e4m3 too, and the same in transformers."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.shapes import MODELS
from thinksafe.kernels.fp8 import quantise
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import hugging_face_name


def random_decoder(name: str, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """A model of this shape with random weights."""
    with torch.device(device):
        decoder = Decoder(ModelConfig.from_hugging_face(MODELS[name], name)).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            if "norm" in parameter_name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    decoder.stack()
    return decoder.requires_grad_(False).eval()


def in_e4m3(decoder: Decoder) -> Decoder:
    """The same decoder as `load_decoder(weights="fp8")` would give it; all but the projections is shared."""
    with torch.device("meta"):
        twin = Decoder(decoder.config)
    for name, parameter in decoder.named_parameters():
        module = twin.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if leaf.endswith("_proj"):
            values, module.exponents[leaf] = quantise(parameter.detach())
            parameter = nn.Parameter(values, requires_grad=False)
        module._parameters[leaf] = parameter
    twin.stack()
    return twin.eval()


def in_transformers(decoder: Decoder, name: str) -> PreTrainedModel:
    """The same weights, copied, in the model of theirs."""
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
