"""Time `pipelib serve`: tokens a second and time to the first token for 1 to 32 clients that stream, on one machine.

The same weights are then run without a server, by transformers' `generate` with its cache, and by llama.cpp where it is
installed (`pip install '.[llamacpp]'`; fp32 weights and cache, two threads).

    make bench-serve                                            the model of the workspace
    make bench-serve ARGS="--model gpt2 --tokens 128"           GPT-2 124M with random weights
    make bench-serve ARGS="--clients 1 8 --repeat 5"

A row is the median of its repetitions by tokens a second. Client and server share the machine's cores.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkout import model_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.inspection.gguf_file import export_gguf
from pipelib.inspection.run_model import workspace_model
from pipelib.model.generate import GREEDY, generate
from pipelib.model.huggingface import import_model
from pipelib.model.kv_cache import KVCache
from pipelib.vocabulary.choice import chosen_tokenizer, tokenizer_of_model

PROMPT = "Returns the"


@contextmanager
def served(folder: Path, *options: str) -> Iterator[int]:
    """The port of a server in another process."""
    command = [sys.executable, "-m", "pipelib.cli.main", "serve", "--model", str(folder), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    line = ""
    while "Ctrl-C ends" not in line:
        line = process.stdout.readline()
        assert line, "the server has ended"
    try:
        yield int(line.split("http://", 1)[1].split(" ", 1)[0].rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait()


def ask(port: int, tokens: int, seed: int) -> tuple[float, float, int]:
    """Stream one completion: when its first and last tokens came, and how many there were."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": PROMPT, "max_tokens": tokens, "stream": True, "seed": seed, "logprobs": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response, count, first = connection.getresponse(), 0, 0.0
    for line in response:
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["logprobs"]:
            first, count = first or time.perf_counter(), count + 1
    return first, time.perf_counter(), count


def time_clients(port: int, clients: int, tokens: int) -> dict[str, Any]:
    """All clients at once."""
    results: list[tuple[float, float, int]] = []
    start = time.perf_counter()
    threads = [
        threading.Thread(target=lambda seed=seed: results.append(ask(port, tokens, seed))) for seed in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, written = max(end for _, end, _ in results) - start, sum(count for *_, count in results)
    return {
        "clients": clients,
        "tokens": written,
        "tokens/s": round(written / seconds, 1),
        "first token, median ms": round(1000 * statistics.median(first - start for first, *_ in results), 1),
    }


def time_transformers(folder: Path, tokens: int) -> float:
    """Tokens a second of greedy generation with transformers' cache, one text."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tokenizer_of_model(folder, chosen_tokenizer())
    prompt = torch.tensor([[tokenizer.end_token_id, *tokenizer.encode(PROMPT)]])
    options: dict[str, Any] = {
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    rates = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def time_llama_cpp(folder: Path, tokens: int, scratch: Path) -> str:
    """Tokens a second of one text, as llama.cpp measures itself."""
    try:
        import xllamacpp
    except ImportError:
        return "not installed"
    export_gguf(folder, scratch / "model.gguf", "f32", chosen_tokenizer())
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(scratch / "model.gguf"), 1024, 1
    params.cpuparams.n_threads, params.port, params.verbosity = torch.get_num_threads(), 0, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    prompt = [tokenizer_of_model(folder, chosen_tokenizer()).end_token_id] * 96
    rates: list[tuple[float, float]] = []
    for seed in range(4):
        body = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "seed": seed, "cache_prompt": False}
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            timings = json.load(answer)["timings"]
        rates.append((timings["predicted_per_second"], timings["prompt_per_second"]))
    decode, prefill = (statistics.median(values) for values in zip(*rates[1:], strict=True))
    return f"decode {decode:,.1f} tokens/s, prefill {prefill:,.0f} tokens/s"


def time_ours(folder: Path, tokens: int) -> dict[str, float]:
    """Tokens a second without a server: greedy generation of one text, and the prefill of a long prompt."""
    tokenizer = tokenizer_of_model(folder, chosen_tokenizer())
    model = import_model(folder, tokenizer, quiet=True).eval()
    prompt = [tokenizer.end_token_id, *tokenizer.encode(PROMPT)]
    decode, prefill = [], []
    length = model.params.context_length - 1
    for _ in range(4):
        start = time.perf_counter()
        count = len(generate(model, [prompt], tokens, GREEDY)[0])
        decode.append(count / (time.perf_counter() - start))
        start = time.perf_counter()
        KVCache(model, 1, length).add([[prompt[0]] * length])
        prefill.append(length / (time.perf_counter() - start))
    return {"decode": statistics.median(decode[1:]), "prefill": statistics.median(prefill[1:])}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(workspace_model()), help="Hugging Face folder, or gpt2 for its shape with random weights"
    )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        help="how many ask at once; default: 1 2 4 8 16 32",
    )
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of an answer; default: 96")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each number of clients; default: 3")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(options.model, Path(temporary))
        print(f"{folder}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {options.tokens} tokens a text")
        with served(folder, "--slots", "32") as port:
            time_clients(port, 2, 8)
            for clients in options.clients:
                runs = [time_clients(port, clients, options.tokens) for _ in range(options.repeat)]
                print(sorted(runs, key=lambda run: run["tokens/s"])[len(runs) // 2])
        ours = time_ours(folder, options.tokens)
        print(f"without a server: decode {ours['decode']:,.1f} tokens/s, prefill {ours['prefill']:,.0f} tokens/s")
        print(f"transformers' generate: decode {time_transformers(folder, options.tokens):,.1f} tokens/s")
        print(f"llama.cpp: {time_llama_cpp(folder, options.tokens, Path(temporary))}")


if __name__ == "__main__":
    main()
