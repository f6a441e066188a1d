"""The decoder and its checkpoints: packed and paged logits and gradients equal those of transformers, and saving and
loading change no bit.

The oracle is transformers' model of the same checkpoint.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import FAMILIES, make_checkpoint, make_model
from thinksafe.errors import UserError
from thinksafe.model import weights
from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.config import PROJECTION_GROUPS, LoraConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach
from thinksafe.model.projection import project
from thinksafe.model.weights import load_config, load_decoder, save_decoder
from thinksafe.sampler import scheduler as scheduler_module
from thinksafe.sampler.config import SamplingConfig
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.model_runner import ModelRunner
from thinksafe.sampler.request import Request
from thinksafe.sampler.scheduler import Scheduler

VARIANTS = {
    "qwen3": ("qwen3", {}),
    "qwen3 untied, biased": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama tied, biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama without scaling": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "mistral": ("mistral", {}),
    "mistral, one head for all queries": ("mistral", {"num_key_value_heads": 1, "head_dim": 24}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that returns the folder of a variant by name; each is written once."""
    folder_by_name = {}

    def folder_of(name: str):
        if name not in folder_by_name:
            family, overrides = VARIANTS[name]
            folder, seed = tmp_path_factory.mktemp("checkpoint"), len(folder_by_name)
            folder_by_name[name] = make_checkpoint(family, folder, seed, **overrides)
        return folder_by_name[name]

    return folder_of


def load(folder, dtype=torch.float32, device="cpu") -> Decoder:
    return load_decoder(folder, dtype, device)


def random_sequences(lengths, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 380, (length,), generator=generator) for length in lengths]


def expected_logits(folder, sequences) -> list[torch.Tensor]:
    """Return transformers' logits of every sequence, each computed alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(sequence[None]).logits[0] for sequence in sequences]


def packed_logits(decoder: Decoder, sequences) -> torch.Tensor:
    """Return the logits of packed sequences, [sum of lengths, V] fp32."""
    device, lengths = decoder.embedding.device, [len(sequence) for sequence in sequences]
    attention = PackedAttention.of(lengths, device)
    hidden = decoder(torch.cat(sequences).to(device), packed_positions(lengths, device), attention)
    return (hidden @ decoder.head.T).float()


def paged_logits(decoder: Decoder, sequences, prompt_lengths, *, page_size, num_pages, max_prefill_tokens):
    """Return logits by (index, position) and the scheduler, after a replay of the sequences through the page cache.

    The sampled tokens are forced to those of the sequences. The positions are those for which the scheduler needs
    logits: the last prompt token and every token after it.
    """
    scheduler = Scheduler(len(sequences), num_pages, page_size, decoder.config.max_seq_len, max_prefill_tokens)
    logits_at = {}

    class ReplayRunner(ModelRunner):
        """A runner that records the logits and samples the next token of the sequence."""

        def _sample(self, hidden, slots, positions):
            logits, next_tokens = (hidden @ decoder.head.T).float(), []
            for slot, end, row in zip(slots.tolist(), positions.tolist(), logits, strict=True):
                index = int(scheduler.table.running[slot].request.id)
                logits_at[index, end - 1] = row
                next_tokens.append(int(sequences[index][end]) if end < len(sequences[index]) else 0)
            tokens = torch.tensor(next_tokens, dtype=torch.int64, device=slots.device)
            self.last_token[slots] = tokens
            return tokens, torch.zeros(len(next_tokens))

    runner = ReplayRunner(decoder, scheduler, CacheFormat(decoder.embedding.dtype, decoder.embedding.dtype))
    runner._graphs = None  # a CUDA graph would not call Python
    for index, (sequence, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        sampling = SamplingConfig(max_tokens=len(sequence) - prompt_length + 1)
        scheduler.submit([Request(str(index), tuple(sequence[:prompt_length].tolist()), sampling, 0, ())])
    while scheduler.has_work:
        batch = scheduler.schedule()
        scheduler.commit(batch, *runner.forward(batch).wait())
    return logits_at, scheduler


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_logits_equal_those_of_transformers(checkpoint, name):
    sequences = random_sequences([1, 37, 5, 100], seed=1)
    with torch.no_grad():
        logits = packed_logits(load(checkpoint(name)), sequences)
    torch.testing.assert_close(logits, torch.cat(expected_logits(checkpoint(name), sequences)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_paged_logits_equal_those_of_transformers(checkpoint, name):
    sequences, prompt_lengths = random_sequences([36, 5, 20], seed=2), [30, 1, 12]
    decoder, expected = load(checkpoint(name)), expected_logits(checkpoint(name), sequences)
    for page_size, max_prefill_tokens in [(1, 7), (4, 9), (16, 64), (64, 1000)]:
        logits_at, _ = paged_logits(
            decoder,
            sequences,
            prompt_lengths,
            page_size=page_size,
            num_pages=192,
            max_prefill_tokens=max_prefill_tokens,
        )
        assert len(logits_at) == 7 + 5 + 9, "one row for the last prompt token and one for every token after it"
        for (index, position), logits in logits_at.items():
            torch.testing.assert_close(logits, expected[index][position], atol=1e-4, rtol=1e-4)


def test_recomputing_a_preempted_sequence_gives_the_same_logits(checkpoint, monkeypatch):
    monkeypatch.setattr(scheduler_module, "_GROWTH_TOKENS", 1)
    sequences = random_sequences([30, 30, 30], seed=3)
    logits_at, scheduler = paged_logits(
        load(checkpoint("qwen3")), sequences, [4, 4, 4], page_size=4, num_pages=12, max_prefill_tokens=8
    )
    assert scheduler.preemptions > 0
    expected = expected_logits(checkpoint("qwen3"), sequences)
    assert len(logits_at) == 3 * 27
    for (index, position), logits in logits_at.items():
        torch.testing.assert_close(logits, expected[index][position], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients_equal_those_of_transformers(tmp_path, family):
    folder = make_checkpoint(family, tmp_path, seed=4)
    sequences = random_sequences([9, 30], seed=4)
    decoder = load(folder).requires_grad_(True)
    F.cross_entropy(packed_logits(decoder, sequences), torch.cat(sequences)).backward()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    F.cross_entropy(torch.cat([model(s[None]).logits[0] for s in sequences]), torch.cat(sequences)).backward()
    expected = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        grad = expected[weights.hugging_face_name(name)].grad
        assert grad.abs().max() > 1e-6 or "bias" in name, (
            f"{name}: the gradient is zero, so the comparison would prove nothing"
        )
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("weight_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama tied, biased"])
def test_fused_projections_equal_separate_ones(checkpoint, name, weight_dtype):
    """In inference mode, one matmul computes all projections of an input, with an adapter on some of them. No weight is
    in memory twice."""
    decoder = load_decoder(checkpoint(name), torch.float32, "cpu", weight_dtype=weight_dtype)
    attach(decoder, LoraConfig(4, 8.0, 0.0, ("k_proj", "up_proj")), seed=1)
    layer, shapes = decoder.layers[1], []
    torch.nn.init.normal_(layer.k_proj.lora_B)

    def linear(x, weight, bias):
        shapes.append(list(weight.shape))
        return F.linear(x, weight, bias)

    for names, projections in zip(PROJECTION_GROUPS, layer.projection_groups, strict=True):
        rows = torch.randn(5, decoder.config.projections[names[0]][1])
        with torch.no_grad():
            separate = project(projections, rows, linear)
        shapes.clear()
        with torch.inference_mode():
            fused = project(projections, rows, linear)
        for out, expected in zip(fused, separate, strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        if weight_dtype == "auto":
            assert shapes[0] == [sum(decoder.config.projections[name][0] for name in names), rows.shape[1]]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in decoder.parameters()}
    assert sum(storages.values()) == sum(parameter.nbytes for parameter in decoder.parameters())


@torch.inference_mode()
def test_moved_weights_are_multiplied_separately(checkpoint):
    decoder = load(checkpoint("qwen3"))
    layer, rows = decoder.layers[0], torch.randn(5, decoder.config.hidden_size)
    projections = [layer.q_proj, layer.k_proj, layer.v_proj]
    fused = project(projections, rows, F.linear)
    layer.k_proj.weight.data = 2 * layer.k_proj.weight
    q, k, v = project(projections, rows, F.linear)
    for out, expected in zip((q, k, v), (fused[0], 2 * fused[1], fused[2]), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_decoder_can_be_trained_after_sampling(checkpoint):
    """Sampling runs in inference mode, and tensors that it creates must not reach autograd."""
    sequences = random_sequences([6], seed=6)
    decoder = load(checkpoint("qwen3"))
    paged_logits(decoder, sequences, [3], page_size=4, num_pages=4, max_prefill_tokens=8)
    decoder.requires_grad_(True)
    packed_logits(decoder, sequences).sum().backward()
    assert decoder.embedding.grad.isfinite().all()


def test_positions_up_to_the_end_of_the_context_work(tmp_path):
    folder = make_checkpoint("llama", tmp_path, max_position_embeddings=600)
    sequences = random_sequences([600], seed=7)
    with torch.no_grad():
        logits = packed_logits(load(folder), sequences)
    torch.testing.assert_close(logits, expected_logits(folder, sequences)[0], atol=1e-4, rtol=1e-4)


def test_sliding_window_limits_the_context(tmp_path):
    folder = make_checkpoint("mistral", tmp_path, sliding_window=24)
    decoder = load(folder)
    assert decoder.config.max_seq_len == 24
    sequences = random_sequences([24], seed=8)
    with torch.no_grad():
        logits = packed_logits(decoder, sequences)
    torch.testing.assert_close(logits, expected_logits(folder, sequences)[0], atol=1e-4, rtol=1e-4)


def test_unused_sliding_window_does_not_limit_the_context(tmp_path):
    folder = make_checkpoint("qwen2", tmp_path, use_sliding_window=False)
    rewrite_config(folder, sliding_window=16, use_sliding_window=False)
    assert load_config(folder)[0].max_seq_len == 512


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_older_transformers_are_read(tmp_path, family):
    """They have rope_theta and rope_scaling at the top level, the key `type` for its type, and may lack head_dim."""
    folder = make_checkpoint(family, tmp_path)
    new, raw = load_config(folder)
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    raw["rope_scaling"] = rope if rope["type"] == "llama3" else None
    raw["torch_dtype"] = raw.pop("dtype")
    if family != "qwen3":
        raw.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_config(folder)[0] == new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "llama tied, biased", "mistral"])
def test_saving_keeps_every_bit_for_transformers_too(checkpoint, tmp_path, name, dtype):
    decoder = load(checkpoint(name), dtype)
    save_decoder(decoder, load_config(checkpoint(name))[1], tmp_path / "saved")
    reloaded = load(tmp_path / "saved", dtype)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), reloaded.parameters(), strict=True))

    original = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=dtype)
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto", output_loading_info=True)
    assert saved.dtype == dtype
    assert not any(report.values()), report
    assert original.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(tensor, saved.state_dict()[key]) for key, tensor in original.state_dict().items())


def test_shards_written_by_transformers_are_read(checkpoint, tmp_path):
    make_model("llama", seed=9).save_pretrained(tmp_path / "whole")
    make_model("llama", seed=9).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    unsharded, sharded = load(tmp_path / "whole"), load(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(unsharded.parameters(), sharded.parameters(), strict=True))


def test_shards_that_we_write_are_small_and_load_in_transformers(checkpoint, tmp_path, monkeypatch):
    decoder = load(checkpoint("qwen2"))
    max_bytes = max(parameter.nbytes for parameter in decoder.parameters())
    monkeypatch.setattr(weights, "_MAX_FILE_BYTES", max_bytes)
    save_decoder(decoder, load_config(checkpoint("qwen2"))[1], tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= max_bytes for file in files)
    assert not (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.partial"))

    reloaded, saved = load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), reloaded.parameters(), strict=True))
    for name, parameter in decoder.named_parameters():
        assert torch.equal(saved[weights.hugging_face_name(name)], parameter), name


def test_saving_replaces_a_sharded_checkpoint(checkpoint, tmp_path, monkeypatch):
    old_decoder, new_decoder = load(checkpoint("llama")), load(make_checkpoint("llama", tmp_path / "other", seed=77))
    raw = load_config(checkpoint("llama"))[1]
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_MAX_FILE_BYTES", 50_000)
        save_decoder(old_decoder, raw, tmp_path / "saved")
    save_decoder(new_decoder, raw, tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(new_decoder.parameters(), reloaded.parameters(), strict=True))


# Errors are one line, which names the file and what to do.


def rewrite_config(folder, **changes) -> None:
    """Set entries of config.json; None removes one."""
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def rewrite_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def replace_with_pickle(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def keep_bytes(folder, count: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:count])


def remove_shard(folder) -> None:
    (folder / "model.safetensors").unlink()
    make_model("qwen3").save_pretrained(folder, max_shard_size="100KB")
    next(folder.glob("model-00002-*")).unlink()


def set_rope(**rope):
    return lambda folder: rewrite_config(folder, rope_parameters={"rope_theta": 1e4, **rope})


LLAMA3_WITHOUT_FACTOR = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "unknown family": (lambda folder: rewrite_config(folder, model_type="gpt2"), "'gpt2' is not supported"),
    "no family": (lambda folder: rewrite_config(folder, model_type=None), "model_type None is not supported"),
    "no hidden size": (lambda folder: rewrite_config(folder, hidden_size=None), "'hidden_size' is missing"),
    "yarn": (set_rope(rope_type="yarn", factor=4.0), "rope_type 'yarn' is not supported"),
    "partial rotation": (set_rope(partial_rotary_factor=0.5), "partial_rotary_factor must be 1, or be removed"),
    "llama3 rope without factor": (set_rope(**LLAMA3_WITHOUT_FACTOR), "'factor' is missing"),
    "gelu": (lambda folder: rewrite_config(folder, hidden_act="gelu"), "hidden_act must be silu"),
    "quantized": (lambda folder: rewrite_config(folder, quantization_config={"bits": 4}), "quantized"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: weights are missing"),
    "only pickles": (replace_with_pickle, "convert them to safetensors"),
    "tensor missing": (
        lambda folder: rewrite_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        "weights are missing: model.layers.1.mlp.up_proj.weight",
    ),
    "layers missing": (
        lambda folder: rewrite_config(folder, num_hidden_layers=3, layer_types=None),
        "requires 3 layers, .* have 2",
    ),
    "wrong shape": (lambda folder: rewrite_config(folder, vocab_size=401), r"has shape \[400, 64\].*\[401, 64\]"),
    "empty file": (lambda folder: keep_bytes(folder, 0), "model.safetensors: corrupt safetensors"),
    "truncated header": (lambda folder: keep_bytes(folder, 100), "model.safetensors: corrupt safetensors"),
    "truncated data": (lambda folder: keep_bytes(folder, 100_000), "model.safetensors: corrupt safetensors"),
    "shard missing": (remove_shard, "model-00002-of-.*safetensors: weights are missing"),
    "broken index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        "not a valid weight index",
    ),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("intact"))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_one_clear_error(intact, tmp_path, name):
    damage, message = BROKEN[name]
    folder = shutil.copytree(intact, tmp_path / "broken")
    load(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


# On a GPU, the reference is the same model with its bf16 weights, computed in fp32 on the CPU.


def assert_close_to_fp32(logits: torch.Tensor, expected: torch.Tensor) -> None:
    error = (logits.cpu() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.04, f"relative error {error:.4f}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "mistral"])
def test_bf16_gpu_logits_are_close_to_fp32_cpu_logits(checkpoint, name):
    sequences = random_sequences([60, 8, 33, 200], seed=10)
    prompt_lengths = [50, 1, 20, 190]
    on_gpu, exact = load(checkpoint(name), torch.bfloat16, "cuda"), load(checkpoint(name), torch.bfloat16).float()
    with torch.no_grad():
        expected = packed_logits(exact, sequences)
        assert_close_to_fp32(packed_logits(on_gpu, sequences), expected)

    starts = np.cumsum([0, *map(len, sequences)])
    logits_at, _ = paged_logits(on_gpu, sequences, prompt_lengths, page_size=16, num_pages=30, max_prefill_tokens=64)
    rows = [starts[index] + position for index, position in logits_at]
    assert_close_to_fp32(torch.stack(list(logits_at.values())), expected[rows])
