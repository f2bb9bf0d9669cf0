"""The sampler's loop as the TPU compiler makes it, on chips that need not be there."""

import json
import math

import pytest

from configs import dpo_gemma, dpo_llama
from jax_backtrack.aot.compile import compiler_only, devices, programs
from jax_backtrack.aot.hlo import HloProgram
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.models.families.published import PUBLISHED
from tests.conftest import missing_libtpu

SMALL = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=128,
)  # fmt: skip
ROWS, PROMPT, NEW = 32, 256, 128
MOVED = "scatter infeed outfeed send recv send-done recv-done sort".split()


@pytest.mark.parametrize("name,recipe", [("meta-llama/Meta-Llama-3-8B", dpo_llama), ("google/gemma-2-2b", dpo_gemma)])
def test_the_loop_neither_copies_the_cache_nor_scatters_nor_asks_the_host(name, recipe, tmp_path):
    missing_libtpu()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name] | SMALL))
    config = recipe.get_config()
    fields = {"train.max_seq_len": PROMPT, "sample.max_num_seqs": ROWS, "sample.max_new_tokens": NEW}
    sampled = {"sample.temperature": 0.7, "sample.top_p": 0.9}
    config.update_from_flattened_dict(
        fields | sampled | {"model.path": str(tmp_path), "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 1}
    )
    with compiler_only():
        mesh = make_mesh(**config.mesh, devices=devices("v5e:2x2"))
        program = HloProgram(programs(config, mesh)["sampler"]().lower().compile().as_text())
    for kind in MOVED:
        assert not list(program.instructions(kind)), kind
    layer = ROWS * (PROMPT + NEW) * SMALL["num_key_value_heads"] * SMALL["head_dim"] // mesh.size
    sizes = []
    for kind in ("copy", "copy-start", "transpose", "all-gather", "all-to-all"):
        for each in program.instructions(kind):
            for _, shape in program.shapes(each):
                if PROMPT + NEW in shape or PROMPT + NEW + 1 in shape:
                    sizes.append((kind, shape))
    assert not [size for size in sizes if math.prod(size[1]) >= layer], sizes
