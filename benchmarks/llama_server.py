"""`exaone-jax serve` beside llama.cpp's server on this CPU, both over HTTP: the same weights, dtype, prompts and threads.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install cmake ninja scikit-build-core
    /tmp/llama/bin/pip download --no-binary llama-cpp-python --no-deps --no-build-isolation llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
    PATH=/tmp/llama/bin:$PATH cmake -G Ninja -S . -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
    PATH=/tmp/llama/bin:$PATH cmake --build build --target llama-server

    pip install gguf
    python -m benchmarks.llama_server --llama-server build/bin/llama-server [--dtype float32 bfloat16] [--concurrent 1 8]

A random model of EXAONE 4.0 1.2B's shape. So many requests, with prompts of 32 to 512 tokens, come at once and want 64 tokens
each, greedy, streamed. Tokens a second, and the mean time to a request's first token; above 1, the ratio says that exaone_jax
is ahead. The servers take turns; figures are medians of three turns, each the second of two runs. Says at how many places the
tokens agree: in float32, at all up to a near tie that two orders of summing decide in two ways.
"""

import argparse
import atexit
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.machine import describe
from benchmarks.serving_cpu import NEW, TURNS, prompts
from benchmarks.transformers_cpu import save_random
from benchmarks.turns import Run, Side, compare

SHAPE = dict(
    vocab_size=102400, hidden_size=2048, intermediate_size=4096, num_hidden_layers=30, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=8192,
)  # fmt: skip
TINY = dict(num_hidden_layers=4, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
LENGTH = 1024  # tokens of the longest request
READY = 600  # seconds that a server may take to start

# llama.cpp's names of a layer's weights.
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def write_gguf(checkpoint: Path, path: Path) -> None:
    """A dense EXAONE 4.0 checkpoint without windows, in its own dtype (norms in float32), with a vocabulary of numbers."""
    import gguf
    import torch

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "exaone4")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, config["vocab_size"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if tensor.ndim == 1:
            writer.add_tensor(_llama_name(name), tensor.float().numpy())
        elif tensor.dtype == torch.float32:
            writer.add_tensor(_llama_name(name), tensor.numpy())
        else:
            bits = tensor.view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(_llama_name(name), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, size: int) -> None:
    """One that llama.cpp accepts: the first 256 tokens are the bytes, the others texts of their own."""
    import gguf

    kinds = [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (size - 256)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{i:02X}>" if i < 256 else f"t{i}" for i in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(False)


def _llama_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"


def ours(checkpoint: str, dtype: str, concurrent: int) -> Run:
    command = [sys.executable, "-m", "exaone_jax", "serve", "--model", checkpoint, "--dtype", dtype]
    command += ["--max-model-len", str(LENGTH), "--max-num-seqs", str(concurrent), "--no-enable-prefix-caching"]
    body = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
    return _served(command, "/v1/completions", body, concurrent, lambda told: told["choices"][0].get("token_ids") or [])


def theirs(program: str, gguf_path: str, dtype: str, concurrent: int) -> Run:
    kept = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    command = [program, "--model", gguf_path, "--parallel", str(concurrent), "--ctx-size", str(LENGTH * concurrent)]
    command += ["--cache-type-k", kept, "--cache-type-v", kept, "--no-webui", "--cache-ram", "0"]
    body = {"n_predict": NEW, "temperature": 0, "ignore_eos": True, "stream": True, "return_tokens": True}
    return _served(command, "/completion", body | {"cache_prompt": False}, concurrent, lambda told: told["tokens"])


def _served(command: list[str], route: str, body: dict[str, Any], concurrent: int, tokens: Any) -> Run:
    """Start the server; a run sends all prompts at once and reads the streams to their ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this process
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=said, stderr=said)
    atexit.register(process.terminate)
    _wait(process, port, said)
    pool = ThreadPoolExecutor(concurrent)

    def ask(prompt: list[int]) -> tuple[list[int], float]:
        begin, made, first = time.perf_counter(), [], 0.0
        for told in _events(port, route, body | {"prompt": prompt}):
            new = tokens(told)
            if new and not made:
                first = time.perf_counter() - begin
            made += new
        if len(made) != NEW:
            raise RuntimeError(f"{command[0]}: {len(made)} tokens, expected {NEW}")
        return made, first

    def run() -> tuple[float, Any]:
        begin = time.perf_counter()
        answers = list(pool.map(ask, prompts(concurrent)))
        seconds = time.perf_counter() - begin
        return seconds, ([made for made, _ in answers], float(np.mean([first for _, first in answers])))

    return run


def _wait(process: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if process.poll() is not None:
            said.seek(0)
            raise RuntimeError(f"code {process.returncode} of {process.args}: {said.read()[-2000:].decode()}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        time.sleep(0.2)
    raise TimeoutError(f"not ready in {READY} s: {process.args}")


def _events(port: int, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY)
    connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{route}: {answer.status} {answer.read()[:500]!r}")
    for line in answer:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, required=True, help="the program, built as above")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--concurrent", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--tiny", action="store_true", help="a moment's work, which shows that it runs and measures nothing"
    )
    args = parser.parse_args()
    if not args.llama_server.is_file():
        parser.error(f"--llama-server: {args.llama_server} is not a file")
    console = Console(width=130)
    told = subprocess.run([args.llama_server, "--version"], capture_output=True, text=True, check=True)
    commit = told.stderr.partition("commit ")[2].partition(")")[0]
    console.print(f"{describe(transformers=version('transformers'))}, llama.cpp {commit}")
    console.print("tokens/s: exaone_jax, llama.cpp; ratio | seconds to a first token: the same | tokens that agree")
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, packed = Path(folder) / "hf", Path(folder) / "model.gguf"
            save_random(str(checkpoint), "global", dtype, **(SHAPE | (TINY if args.tiny else {})))
            write_gguf(checkpoint, packed)
            for concurrent in args.concurrent:
                with (
                    Side(ours, str(checkpoint), dtype, concurrent) as mine,
                    Side(theirs, str(args.llama_server), str(packed), dtype, concurrent) as other,
                ):
                    seconds, their_seconds, (made, first), (expected, their_first) = compare(mine, other, TURNS)
                count, agree = concurrent * NEW, np.mean(np.asarray(made) == np.asarray(expected))
                rates = f"{count / seconds:.1f}, {count / their_seconds:.1f}; {their_seconds / seconds:.2f}"
                firsts = f"{first:.2f}, {their_first:.2f}; {their_first / first:.2f}"
                console.print(f"{dtype}, {concurrent} at once: {rates} | {firsts} | {agree:.1%}")


if __name__ == "__main__":
    main()
