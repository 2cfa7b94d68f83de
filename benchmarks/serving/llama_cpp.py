# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as a peer of serve.py: the same model in its own types, timed through the bindings of
llama-cpp-python.

No server and no client take part, so what it is measured at is what a server of llama.cpp could
reach at best. Each measurement is a process of its own; run as a program, this file is that process
and prints one JSON object:

    python -m benchmarks.serving.llama_cpp MODEL.gguf --batch 1 --prompt 128 --output 32
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.commands import options, run_quietly
from benchmarks.support.machine import memory

FILE_TYPES = {"q4_0": 2, "q4_k_m": 15, "q8_0": 7}
"""``llama_ftype`` of each scheme: that of the decoder layers; llama.cpp keeps an output head at
6 bits or more."""
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
LINEARS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
LINEARS |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(source: Path, out: Path, scheme: str, config: Mapping[str, Any]) -> None:
    """Write ``model.gguf`` into the directory ``out``, quantized by llama.cpp itself.

    There is no vocabulary: it takes and gives numbers of tokens.

    Args:
        source: bfloat16 Llama directory.
        out: directory to make.
        scheme: one of :data:`FILE_TYPES`.
        config: of ``source``.

    Raises:
        RuntimeError: llama.cpp refused the file.
    """
    import llama_cpp

    out.mkdir(parents=True)
    whole = out / "float16.gguf"
    write_float16(source, whole, config)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[scheme]
    settings.nthread = len(os.sched_getaffinity(0))
    status = llama_cpp.llama_model_quantize(
        str(whole).encode(), str(out / "model.gguf").encode(), settings
    )
    if status:
        raise RuntimeError(f"llama_model_quantize of {whole} to {scheme}: status {status}")
    whole.unlink()
    (out / "config.json").write_text(json.dumps(dict(config)))


def write_float16(source: Path, out: Path, config: Mapping[str, Any]) -> None:
    """Write the weights as they are, in float16, norms in float32."""
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer = GGUFWriter(out, "llama", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or hidden // heads)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                of_key = "num_key_value_heads" if "k_proj" in name else "num_attention_heads"
                values = pairs_of_neighbors(tensor, config[of_key]).half()
            else:
                values = tensor.float() if tensor.dim() == 1 else tensor.half()
            writer.add_tensor(gguf_name(name), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, wherever a version of transformers has put it."""
    return float(config.get("rope_parameters", config).get("rope_theta", config["rope_theta"]))


def pairs_of_neighbors(weight: Any, heads: int) -> Any:
    """Rows of q or k in llama.cpp's order, whose rotary embedding turns neighboring channels;
    Hugging Face's turns each with the one half a head further."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of a Llama.

    Raises:
        KeyError: it is no tensor of a Llama.
    """
    module = name.removesuffix(".weight")
    if module in TOP:
        return f"{TOP[module]}.weight"
    _, _, layer, *_, kind = module.split(".")
    return f"blk.{layer}.{(NORMS | LINEARS)[kind]}.weight"


def measure(directory: Path, batch: int, prompt: int, output: int) -> dict[str, float]:
    """One measurement in a new process: ``ttft_ms``, ``tpot_ms``, ``tokens_per_s``, ``startup_s``,
    and two sizes of memory.

    Raises:
        RuntimeError: it failed.
    """
    words = options(batch=batch, prompt=prompt, output=output)
    command = [sys.executable, "-m", "benchmarks.serving.llama_cpp"]
    found: dict[str, float] = json.loads(
        run_quietly([*command, str(directory / "model.gguf"), *words])
    )
    return found


def negative_log_likelihood(directory: Path, windows: Path) -> float:
    """Of all tokens but the first of each window, summed, by a new process.

    Args:
        directory: has ``model.gguf``.
        windows: JSON file of lists of tokens.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.serving.llama_cpp", str(directory / "model.gguf")]
    found: dict[str, float] = json.loads(run_quietly([*command, "--windows", str(windows)]))
    return found["negative_log_likelihood"]


class Sequences:
    """``count`` sequences in one context of llama.cpp on all cores, which grow together."""

    def __init__(self, path: Path, count: int, length: int) -> None:
        import llama_cpp

        self.api, self.count = llama_cpp, count
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(
                f"llama.cpp could not load {path}: expected a GGUF file of a model that it knows"
            )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = count * -(-length // 256) * 256, count
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self.step_tokens = int(settings.n_batch)
        self.context = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise RuntimeError(
                f"llama.cpp could not make a context of {settings.n_ctx} tokens for {path}: too"
                " little memory?"
            )
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(max(count, self.step_tokens), 0, 1)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One step over (token, position, sequence, whether its logits are wanted).

        Raises:
            RuntimeError: llama.cpp refused it.
        """
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        status = self.api.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")

    def best(self, index: int) -> int:
        """The token of largest logit at a place of the last step."""
        logits = self.api.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def losses(self, tokens: list[int]) -> float:
        """Negative log-likelihood of all tokens but the first of one sequence."""
        total, step = 0.0, self.step_tokens
        for at in range(0, len(tokens) - 1, step):
            part = tokens[at : at + step]
            self.decode([(token, at + i, 0, True) for i, token in enumerate(part)])
            for i, target in enumerate(tokens[at + 1 : at + 1 + len(part)]):
                found = self.api.llama_get_logits_ith(self.context, i)
                logits = np.ctypeslib.as_array(found, (self.vocabulary,)).astype(np.float64)
                top = logits.max()
                total += float(np.log(np.exp(logits - top).sum()) + top - logits[target])
        return total

    def clear(self) -> None:
        """Forget all tokens."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)


def run(sequences: Sequences, prompt: int, output: int) -> dict[str, float]:
    """Read a random prompt into each sequence, then let all grow to ``output`` tokens."""
    generator = np.random.default_rng(0)
    began = time.perf_counter()
    waiting = []
    for s in range(sequences.count):
        tokens = generator.integers(0, sequences.vocabulary, prompt)
        waiting += [(int(token), i, s, i == prompt - 1) for i, token in enumerate(tokens)]
    newest, first = [0] * sequences.count, []
    for at in range(0, len(waiting), sequences.step_tokens):
        step = waiting[at : at + sequences.step_tokens]
        sequences.decode(step)
        for i, (_, _, s, wanted) in enumerate(step):
            if wanted:
                newest[s] = sequences.best(i)
                first.append(time.perf_counter() - began)
    read = time.perf_counter()
    for length in range(output - 1):
        sequences.decode([(newest[s], prompt + length, s, True) for s in range(sequences.count)])
        newest = [sequences.best(s) for s in range(sequences.count)]
    done = time.perf_counter()
    return {
        "ttft_ms": statistics.median(first) * 1e3,
        "tpot_ms": (done - read) / (output - 1) * 1e3,
        "tokens_per_s": sequences.count * output / (done - began),
    }


def main() -> None:
    """Measure once and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--windows", type=Path, help="measure no time: JSON lists of tokens")
    args = parser.parse_args()
    if args.windows:
        windows = json.loads(args.windows.read_text())
        sequences, total = Sequences(args.model, 1, max(map(len, windows))), 0.0
        for window in windows:
            sequences.clear()
            total += sequences.losses(window)
        print(json.dumps({"negative_log_likelihood": total}))
        return
    began = time.perf_counter()
    sequences = Sequences(args.model, args.batch, args.prompt + args.output)
    startup = time.perf_counter() - began
    run(sequences, 16, 4)
    sequences.clear()
    figures = run(sequences, args.prompt, args.output)
    peak = memory(os.getpid(), "VmHWM")
    print(json.dumps(figures | {"startup_s": startup, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
