"""Error of e4m3 and of the batch-invariant mode: log-probabilities and verdicts against the plain decoder.

Each variant samples responses. The same model in its checkpoint's dtype then reads these tokens, packed and without a
cache, and we compare the two log-probabilities of every token. A verdict is the more likely of two tokens after each
text, as in a guard; a verdict changes if the sign of the difference changes. `auto` shows the rounding error of the
dtype itself.

For training on frozen weights in e4m3, we compare the loss of these tokens and the gradient of adapters on every
projection.

On a CPU the models are the trained student of the model organism, and random models with both kinds of attention. On a
GPU the random models have real shapes. Random weights represent the arithmetic, but not the outliers of a trained
model.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, Sections, attempt
from benchmarks.models import fp8_copy, random_decoder
from thinksafe.kernels.fp8 import dequantize, quantize
from thinksafe.kernels.linear_logprob import linear_logprob
from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.config import LoraConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import adapter_parameters, attach, detach
from thinksafe.model.weights import load_decoder
from thinksafe.paths import expand_path
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request
from thinksafe.training.losses import PackLoss
from thinksafe.training.packing import pack
from thinksafe.training.sequence import TrainingSequence

CLAIM = "e4m3 changes the log-probability of a token by little, measured on the tokens that it sampled."
VARIANTS = {
    "auto": {},
    "batch-invariant": {"batch_invariant": True},
    "cache in e4m3": {"kv_cache_dtype": "fp8"},
    "weights in e4m3": {"weight_dtype": "fp8"},
    "weights and cache in e4m3": {"weight_dtype": "fp8", "kv_cache_dtype": "fp8"},
}
"""Variant -> settings of EngineConfig that differ from the default."""
_RESPONSES, _PROMPT, _TOKENS = 32, 24, 96
_ENGINE = partial(EngineConfig, 64, kv_cache_gib=1.0)


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections, one per model that fits this machine's device.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    decoder_factories = {"organism": partial(load_decoder, expand_path("package:organism/bundle/model"), dtype, device)}
    for name in ("qwen3-0.6b", "r1-distill-qwen-1.5b", "llama-3-8b") if has_gpu else ("cpu-6m", "cpu-6m-qwen2"):
        decoder_factories[name] = partial(random_decoder, name, device, dtype)
    return {
        name: partial(_measure_model, name, make_decoder, notes) for name, make_decoder in decoder_factories.items()
    }


def _measure_model(name: str, make_decoder: Callable[[], Decoder], notes: list[str]) -> list[Row]:
    bf16_decoder = make_decoder()
    fp8_decoder = cache(lambda: fp8_copy(bf16_decoder))
    measurements: dict[str, Callable[[], dict[str, float]]] = {}
    for variant, settings in VARIANTS.items():
        decoder = fp8_decoder if "weight_dtype" in settings else lambda: bf16_decoder
        measurements[variant] = lambda decoder=decoder, settings=settings: measure_errors(
            bf16_decoder, decoder(), _ENGINE(**settings)
        )
    measurements["the head alone in e4m3"] = partial(_measure_fp8_head, bf16_decoder)
    measurements["training, frozen weights in e4m3"] = lambda: _measure_training(bf16_decoder, fp8_decoder())
    rows: list[Row] = []
    for variant, measure in measurements.items():
        row = {"model": name, "variant": variant}
        attempt(f"ThinkSafe, {name}, {variant}", lambda row=row, measure=measure: rows.append(row | measure()), notes)
    return rows


@torch.inference_mode()
def measure_errors(bf16_decoder: Decoder, decoder: Decoder, config: EngineConfig) -> dict[str, float]:
    """Return the errors of an engine's log-probabilities and verdicts against the plain decoder, in nats.

    The engine samples responses to random prompts and computes a verdict after each; the plain decoder reads the same
    tokens.

    Args:
        bf16_decoder: the plain decoder, in its checkpoint's dtype.
        decoder: the engine's decoder: the plain one, or its copy with weights in e4m3.
        config: settings of the engine.

    Returns:
        Column -> value. `log-prob, mean error` and `99th percentile` of the absolute error and its signed mean, `bias`;
        `verdict margin, mean error`, of the absolute error; `verdicts changed`, a share of all verdicts.
    """
    engine = Engine(decoder, config)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(bf16_decoder.config.vocab_size, (_RESPONSES, _PROMPT), generator=generator).tolist()
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_tokens=_TOKENS)
    requests = [Request(str(i), tuple(prompt), sampling, i, ()) for i, prompt in enumerate(prompts)]
    texts, sampled_logprobs, exact_logprobs = [], [], []
    for completion in engine.generate(requests):
        texts.append((*prompts[int(completion.request_id)], *completion.tokens))
        sampled_logprobs.append(torch.tensor(completion.logprobs))
    hidden_states_by_text = [_hidden(bf16_decoder, text) for text in texts]
    for text, hidden_states in zip(texts, hidden_states_by_text, strict=True):
        response_ids = torch.tensor(text[_PROMPT:], device=hidden_states.device)
        exact_logprobs.append(
            linear_logprob(hidden_states[_PROMPT - 1 : -1], bf16_decoder.head, response_ids).logprob.cpu()
        )
    verdict_ids = torch.randperm(bf16_decoder.config.vocab_size, generator=generator)[:2]
    exact_logits = torch.stack(
        [
            hidden_states[-1].float() @ bf16_decoder.head[verdict_ids.to(hidden_states.device)].float().T
            for hidden_states in hidden_states_by_text
        ]
    )
    scores = {s.request_id: s.logprobs for s in engine.score(enumerate(texts), verdict_ids.tolist())}
    verdict_margin = torch.tensor([scores[i][1] - scores[i][0] for i in range(len(texts))])
    return _error_row(
        torch.cat(sampled_logprobs) - torch.cat(exact_logprobs),
        verdict_margin - (exact_logits[:, 1] - exact_logits[:, 0]).cpu(),
        verdict_margin,
    )


def _measure_training(bf16_decoder: Decoder, fp8_decoder: Decoder) -> dict[str, float]:
    """Return the errors that frozen weights in e4m3 cause in a training step's loss and gradient.

    Both decoders get the same random adapters on every projection and the same responses, which the plain one samples.

    Args:
        bf16_decoder: the plain decoder, in its checkpoint's dtype.
        fp8_decoder: its copy with frozen weights in e4m3.

    Returns:
        Column -> value: absolute error of the mean token loss in nats, relative error of the adapters' gradient in the
        2-norm, and the cosine of the two gradients.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(bf16_decoder.config.vocab_size, (_RESPONSES, _PROMPT), generator=generator).tolist()
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_tokens=_TOKENS)
    requests = [Request(str(i), tuple(prompt), sampling, i, ()) for i, prompt in enumerate(prompts)]
    completions = Engine(bf16_decoder, _ENGINE()).generate(requests)
    texts = [
        np.array([*prompts[int(completion.request_id)], *completion.tokens], np.int32) for completion in completions
    ]
    sequences = [TrainingSequence(text, _PROMPT) for text in texts]
    losses, gradients = [], []
    for decoder in (bf16_decoder, fp8_decoder):
        attach(decoder, LoraConfig(dropout=0.0, target_modules=tuple(decoder.config.projections)), seed=0)
        parameters = list(adapter_parameters(decoder).values())
        noise_generator = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise_generator).to(parameter.device)
        decoder.prepare_fp8_backward()
        (batch,) = pack(sequences, _RESPONSES * (_PROMPT + _TOKENS), decoder.embedding.device)
        row_losses, _ = PackLoss(decoder, with_reference=False)(batch, False)
        losses.append(row_losses.mean().item())
        (row_losses.sum() / batch.total_weight).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        detach(decoder)
    exact_gradient, gradient = gradients
    return {
        "loss, error": abs(losses[1] - losses[0]),
        "adapters' gradient, relative error": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
        "its cosine": torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0).item(),
    }


def _measure_fp8_head(bf16_decoder: Decoder) -> dict[str, float]:
    """Return the columns of `measure_errors` if only the weights of the language-model head are rounded to e4m3.

    Both heads multiply, in fp32, the hidden states that the plain decoder has for one random text; no engine runs.
    Log-probabilities are those of tokens drawn from the plain distribution. Tokens 0 and 1 stand for the verdicts at
    every position.
    """
    head = dequantize(*quantize(bf16_decoder.head.detach()), torch.float32)
    text = torch.randint(
        bf16_decoder.config.vocab_size, (_PROMPT + _TOKENS,), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        hidden_states = _hidden(bf16_decoder, tuple(text.tolist())).float()
        exact_logprobs, rounded_logprobs = (
            (hidden_states @ weight.float().T).log_softmax(-1) for weight in (bf16_decoder.head, head)
        )
        token_ids = exact_logprobs.exp().multinomial(1, generator=torch.Generator(hidden_states.device).manual_seed(0))
        logprob_errors = (rounded_logprobs - exact_logprobs).gather(-1, token_ids)[:, 0].cpu()
        margins = [(logprobs[:, 1] - logprobs[:, 0]).cpu() for logprobs in (exact_logprobs, rounded_logprobs)]
    return _error_row(logprob_errors, margins[1] - margins[0], margins[1])


def _hidden(decoder: Decoder, text: tuple[int, ...]) -> Tensor:
    device = decoder.embedding.device
    attention = PackedAttention.of([len(text)], device)
    return decoder(torch.tensor(text, device=device), packed_positions([len(text)], device), attention)


def _error_row(logprob_errors: Tensor, margin_errors: Tensor, margin: Tensor) -> dict[str, float]:
    return {
        "log-prob, mean error": logprob_errors.abs().mean().item(),
        "99th percentile": logprob_errors.abs().quantile(0.99).item(),
        "bias": logprob_errors.mean().item(),
        "verdict margin, mean error": margin_errors.abs().mean().item(),
        "verdicts changed": ((margin > 0) != (margin - margin_errors > 0)).float().mean().item(),
    }
