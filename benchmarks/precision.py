"""What e4m3 and the batch-invariant mode change: log-probabilities and verdicts, against the plain decoder.

Each variant samples; the tokens it chose are then read by the same model in its own dtype, packed, without a cache, and
the two log-probabilities of every token are compared. A verdict is the likelier of two tokens after each of those
texts, as a guard's is: a changed one is one whose sign differs. `auto` shows what the dtype's own rounding does.

In training on frozen weights in e4m3 it is the loss of those tokens, and the gradient of adapters on every projection.

On a CPU the models are the organism's student, which is trained, and random ones of the two kinds of attention; on a
GPU they have real shapes, with random weights. Random weights stand for the arithmetic, not for outliers of a trained
model.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, Sections, attempt
from benchmarks.models import in_e4m3, random_decoder
from thinksafe.kernels.fp8 import dequantise, quantise
from thinksafe.kernels.linear_logprob import linear_logprob
from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach, detach
from thinksafe.model.weights import load_decoder
from thinksafe.paths import expand
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.request import Request, SamplingConfig
from thinksafe.training.losses import PackLoss
from thinksafe.training.packing import TrainingSequence, pack

CLAIM = "e4m3 moves a token's log-probability by little; what it moves, counted on the tokens that it chose."
VARIANTS = {
    "auto": {},
    "batch-invariant": {"batch_invariant": True},
    "cache in e4m3": {"kv_cache_dtype": "fp8"},
    "weights in e4m3": {"weights": "fp8"},
    "weights and cache in e4m3": {"weights": "fp8", "kv_cache_dtype": "fp8"},
}
_RESPONSES, _PROMPT, _TOKENS = 32, 24, 96
_ENGINE = partial(EngineConfig, 64, kv_cache_gib=1.0)


def sections(notes: list[str]) -> Sections:
    """For whatever device there is, a model each."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    makes = {"organism": partial(load_decoder, expand("package:organism/bundle/model"), dtype, device)}
    for name in ("qwen3-0.6b", "r1-distill-qwen-1.5b", "llama-3-8b") if gpu else ("cpu-6m", "cpu-6m-qwen2"):
        makes[name] = partial(random_decoder, name, device, dtype)
    return {name: partial(_of_model, name, make, notes) for name, make in makes.items()}


def _of_model(name: str, make: Callable[[], Decoder], notes: list[str]) -> list[Row]:
    plain = make()
    frozen = cache(lambda: in_e4m3(plain))
    works: dict[str, Callable[[], dict[str, float]]] = {}
    for variant, settings in VARIANTS.items():
        decoder = frozen if "weights" in settings else lambda: plain
        works[variant] = lambda decoder=decoder, settings=settings: compared(plain, decoder(), _ENGINE(**settings))
    works["the head alone in e4m3"] = partial(_with_head_in_e4m3, plain)
    works["training, frozen weights in e4m3"] = lambda: _trained(plain, frozen())
    rows: list[Row] = []
    for variant, work in works.items():
        row = {"model": name, "variant": variant}
        attempt(f"ThinkSafe, {name}, {variant}", lambda row=row, work=work: rows.append(row | work()), notes)
    return rows


@torch.inference_mode()
def compared(plain: Decoder, decoder: Decoder, config: EngineConfig) -> dict[str, float]:
    """Figures of an engine's log-probabilities and verdicts against the plain decoder's."""
    engine = Engine(decoder, config)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(plain.config.vocab_size, (_RESPONSES, _PROMPT), generator=generator).tolist()
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_tokens=_TOKENS)
    requests = [Request(str(i), tuple(prompt), sampling, i, ()) for i, prompt in enumerate(prompts)]
    texts, found, exact = [], [], []
    for completion in engine.generate(requests):
        texts.append((*prompts[int(completion.request_id)], *completion.tokens))
        found.append(torch.tensor(completion.logprobs))
    hidden = [_hidden(plain, text) for text in texts]
    for text, states in zip(texts, hidden, strict=True):
        written = torch.tensor(text[_PROMPT:], device=states.device)
        exact.append(linear_logprob(states[_PROMPT - 1 : -1], plain.head, written).logprob.cpu())
    ids = torch.randperm(plain.config.vocab_size, generator=generator)[:2]
    margins = torch.stack([states[-1].float() @ plain.head[ids.to(states.device)].float().T for states in hidden])
    scores = {s.request_id: s.logprobs for s in engine.score(enumerate(texts), ids.tolist())}
    margin = torch.tensor([scores[i][1] - scores[i][0] for i in range(len(texts))])
    return _figures(torch.cat(found) - torch.cat(exact), margin - (margins[:, 1] - margins[:, 0]).cpu(), margin)


def _trained(plain: Decoder, frozen: Decoder) -> dict[str, float]:
    """A step's loss and gradient on responses that the plain student draws, with adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(plain.config.vocab_size, (_RESPONSES, _PROMPT), generator=generator).tolist()
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_tokens=_TOKENS)
    requests = [Request(str(i), tuple(prompt), sampling, i, ()) for i, prompt in enumerate(prompts)]
    drawn = Engine(plain, _ENGINE()).generate(requests)
    texts = [np.array([*prompts[int(one.request_id)], *one.tokens], np.int32) for one in drawn]
    sequences = [TrainingSequence(text, _PROMPT) for text in texts]
    losses, gradients = [], []
    for decoder in (plain, frozen):
        attach(decoder, LoraConfig(dropout=0.0, target_modules=tuple(decoder.config.projections)), seed=0)
        parameters = list(adapter_parameters(decoder).values())
        noise = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise).to(parameter.device)
        decoder.pass_gradients()
        (batch,) = pack(sequences, _RESPONSES * (_PROMPT + _TOKENS), decoder.embedding.device)
        rows, _ = PackLoss(decoder, with_reference=False)(batch, False)
        losses.append(rows.mean().item())
        (rows.sum() / batch.total_weight).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        detach(decoder)
    exact, found = gradients
    return {
        "loss, error": abs(losses[1] - losses[0]),
        "adapters' gradient, relative error": ((found - exact).norm() / exact.norm()).item(),
        "its cosine": torch.nn.functional.cosine_similarity(found, exact, dim=0).item(),
    }


def _with_head_in_e4m3(plain: Decoder) -> dict[str, float]:
    """What a head in e4m3 would do if nothing else were: its weights rounded, its inputs not."""
    head = dequantise(*quantise(plain.head.detach()), torch.float32)
    text = torch.randint(plain.config.vocab_size, (_PROMPT + _TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = _hidden(plain, tuple(text.tolist())).float()
        exact, rounded = ((states @ weight.float().T).log_softmax(-1) for weight in (plain.head, head))
        drawn = exact.exp().multinomial(1, generator=torch.Generator(states.device).manual_seed(0))
        apart = (rounded - exact).gather(-1, drawn)[:, 0].cpu()
        margins = [(each[:, 1] - each[:, 0]).cpu() for each in (exact, rounded)]
    return _figures(apart, margins[1] - margins[0], margins[1])


def _hidden(decoder: Decoder, text: tuple[int, ...]) -> Tensor:
    device = decoder.embedding.device
    attention = PackedAttention.of([len(text)], device)
    return decoder(torch.tensor(text, device=device), packed_positions([len(text)], device), attention)


def _figures(apart: Tensor, margin_apart: Tensor, margin: Tensor) -> dict[str, float]:
    return {
        "log-prob, mean error": apart.abs().mean().item(),
        "99th percentile": apart.abs().quantile(0.99).item(),
        "bias": apart.mean().item(),
        "verdict margin, mean error": margin_apart.abs().mean().item(),
        "verdicts changed": ((margin > 0) != (margin - margin_apart > 0)).float().mean().item(),
    }
