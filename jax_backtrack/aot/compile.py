"""Compiles a recipe's programs for TPUs that are not here, and says whether they fit and what they cost.

The TPU compiler (the package `libtpu`) runs on any machine. It gives the true bytes of memory per chip, and a program
whose matrix products and collectives can be counted (`aot/hlo.py`). Nothing is loaded: arrays are shapes with a place.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_backtrack.aot.hlo import BETWEEN_SLICES, HloProgram
from jax_backtrack.aot.tpu_specs import Chip, chip
from jax_backtrack.backtracking.trees import TokenTrees
from jax_backtrack.distributed.mesh import check_rows, make_mesh, param_shardings, row_parts, rows_sharding
from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import read_config
from jax_backtrack.hub.settings import compute
from jax_backtrack.models import lora
from jax_backtrack.models.flops import forward_flops, step_flops
from jax_backtrack.models.transformer import Compute, Transformer
from jax_backtrack.sampling.loop import DecodeState, decode, init_decode_state, prefill
from jax_backtrack.sampling.settings import SamplingParams, StaticParams, TracedParams, split_params, steps_per_call
from jax_backtrack.training.settings import add_adapters, check_length, check_sizes, check_step, train_config
from jax_backtrack.training.step import Batch, compile_step, logps, new_state, state_shardings
from jax_backtrack.utils.console import console
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.tables import add_figures, add_names, new_table
from jax_backtrack.utils.workdir import COMPILED, atomic_write

_GIB = 2**30
_read_once = functools.cache(read_config)  # of a model on the Hub, each reading is a request
_ANY_ID = 0  # no tokenizer is needed: which id [RESET] has changes neither memory nor work


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One program, compiled for one topology; bytes are per chip.

    compile_seconds:  of the TPU compiler, on this machine
    argument_bytes:   what stands in memory before and after a run; None where it does not fit
    peak_bytes:       the most that is held at once
    fits:             the compiler found room for it
    model_flops:      what the model has to compute, by its formulas, over all chips
    hardware_flops:   what the program computes, recomputation included, over all chips; None where it does not fit
    collective_bytes: per kind of collective, what a chip sends
    mfu_bound:        upper bound of model FLOPs utilisation at the chip's published peaks
    kernels:          name of each Pallas kernel -> bytes of VMEM
    """

    compile_seconds: float
    argument_bytes: int | None
    peak_bytes: int
    fits: bool
    model_flops: float
    hardware_flops: float | None
    collective_bytes: dict[str, float]
    mfu_bound: float | None
    kernels: dict[str, int]


def compile_recipe(config: ConfigDict, topologies: Sequence[str], workdir: Path) -> dict[str, dict]:
    """Compiles a recipe for each topology, prints a table and writes `compile.json`, and the programs as text.

    A topology is named as in "v5e:4x4", with several slices as in "v5e:4x4*2". The training step, the reference pass
    of DPO, the sampler's loop and its reading of prompts are compiled. Where the training step does not fit, recipes
    that need less are tried.
    Raises InputError before anything is compiled where a topology or the recipe cannot be meant.
    """
    check_step(config)
    chips = {topology: chip(topology) for topology in topologies}
    with compiler_only():
        meshes = {topology: make_mesh(**config.mesh, devices=devices(topology)) for topology in topologies}
        for mesh in meshes.values():
            _check(config, mesh)
        workdir.mkdir(parents=True, exist_ok=True)
        compiled_by_topology = {
            topology: _compile_one(config, topology, meshes[topology], chips[topology], workdir)
            for topology in topologies
        }
    content = (
        next(iter(compiled_by_topology.values()))
        if len(compiled_by_topology) == 1
        else {"topologies": compiled_by_topology}
    )
    atomic_write(workdir / COMPILED, to_json(content, indent=2) + "\n")
    _show(config, compiled_by_topology, chips)
    console.print(f"figures in {workdir / COMPILED}", highlight=False)
    return compiled_by_topology


# ------------------------------------------------------------------------------------------------ what is compiled


def programs(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> dict[str, Callable[[], jax.stages.Traced]]:
    """Returns the recipe's programs by name, each traced by calling it: for the mesh, or to be lowered for another
    `platform`, as `hub.settings.compute` takes it."""
    how = compute(config, mesh, platform)
    model, without_adapters = (abstract_model(config, how, adapted) for adapted in (True, False))
    rows = _like(jnp.int32, (config.train.batch_size, config.train.max_seq_len), rows_sharding(mesh))
    floats = _like(jnp.float32, rows.shape, rows_sharding(mesh))
    trees = TokenTrees(rows, rows, rows, rows, rows, floats)
    reference = _like(jnp.float32, (*rows.shape, 2), rows_sharding(mesh))

    def train_step():
        graph, trained, frozen = lora.split(model)
        trained, frozen = _in_places(trained, model, mesh), _in_places(frozen, model, mesh)
        step_config = train_config(config, _ANY_ID)
        state = jax.eval_shape(lambda params: new_state(params, step_config), trained)
        places = state_shardings(trained, step_config)
        state = jax.tree.map(lambda leaf, place: _like(leaf.dtype, leaf.shape, place), state, places)
        return compile_step(graph, step_config, state).trace(state, frozen, Batch(trees, reference))

    def reference_pass():
        graph, params = nnx.split(without_adapters)
        return logps.trace(graph, _in_places(params, model, mesh), trees, config.train.logits_chunk_size)

    everywhere = NamedSharding(mesh, PartitionSpec())

    def sampler():
        graph, params = nnx.split(without_adapters)
        state, traced, static = _sampler_arguments(config, how)
        cancelled = _like(jnp.bool, state.done.shape, rows_sharding(mesh))
        steps, until = _like(jnp.int32, (), everywhere), _like(jnp.bool, (), everywhere)
        return decode.trace(graph, _in_places(params, model, mesh), state, traced, cancelled, steps, until, static)

    def prompts():
        graph, params = nnx.split(without_adapters)
        tokens = _like(jnp.int32, (row_parts(mesh), config.train.max_seq_len), rows_sharding(mesh))
        dtype = config.sample.cache_dtype or how.dtype
        return prefill.trace(graph, _in_places(params, model, mesh), None, tokens, dtype)

    all = {"training step": train_step, "sampler": sampler, "sampler's prompts": prompts}
    return all | ({"reference pass": reference_pass} if config.objective == "dpo" else {})


def abstract_model(config: ConfigDict, compute: Compute, with_adapters: bool = True) -> Transformer:
    """Returns the recipe's model without values, with its adapters if it has any."""
    shape = _read_once(config.model.path, config.model.revision or None)
    check_length(config, shape)

    def make():
        dtype = jnp.dtype(config.model.param_dtype)
        model = Transformer(shape, nnx.Rngs(0), param_dtype=dtype, compute=compute)
        if with_adapters:
            add_adapters(config, model, _ANY_ID)
        return model

    return nnx.eval_shape(make)


def _sampler_arguments(config: ConfigDict, compute: Compute) -> tuple[DecodeState, TracedParams, StaticParams]:
    """Returns a batch whose prompts are as long as a row of training, and the recipe's settings."""
    params, mesh = SamplingParams(**config.sample), compute.mesh
    known = dict(reset_mode=config.reset.mode, reset_id=_ANY_ID, stop_ids=(_ANY_ID + 1,))
    static, traced = split_params(dataclasses.replace(params, logprobs=False), **known)
    shape = _read_once(config.model.path, config.model.revision or None)
    sizes = params.max_num_seqs, config.train.max_seq_len, params.max_new_tokens
    dtype = params.cache_dtype or compute.dtype
    state = init_decode_state.lower(Transformer.cache_type, shape, mesh, static, *sizes, dtype).out_info
    everywhere = NamedSharding(mesh, PartitionSpec())
    return state, jax.tree.map(lambda leaf: _like(leaf.dtype, leaf.shape, everywhere), traced), static


def _in_places(state: nnx.State, model: Transformer, mesh: Mesh) -> nnx.State:
    """Returns the state's leaves as shapes where they are to lie."""
    places = {
        path: place
        for kind in (nnx.Param, lora.Adapter)
        for path, place in nnx.to_flat_state(param_shardings(model, mesh, kind))
    }
    leaves = [_like(leaf.dtype, leaf.shape, places[path]) for path, leaf in nnx.to_flat_state(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _like(dtype, shape: tuple[int, ...], place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


# --------------------------------------------------------------------------------------------------- one topology


def _check(config: ConfigDict, mesh: Mesh) -> None:
    check_sizes(config, mesh)
    check_rows(config.sample.max_num_seqs, mesh, "sample.max_num_seqs")
    param_shardings(abstract_model(config, compute(config, mesh), with_adapters=False), mesh)


def _compile_one(config: ConfigDict, topology: str, mesh: Mesh, one_chip: Chip, workdir: Path) -> dict:
    compiled = {
        name: _compile(name, trace, config, topology, mesh, one_chip, workdir)
        for name, trace in programs(config, mesh).items()
    }
    step = compiled["training step"]
    advice = [] if step.fits else _smaller_recipes(config, topology, mesh, one_chip)
    return {
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "hbm_bytes": one_chip.hbm_bytes,
        **dataclasses.asdict(step),
        "fits": all(program.fits for program in compiled.values()),
        "programs": {name: dataclasses.asdict(program) for name, program in compiled.items()},
        "would_fit": advice,
    }


def _compile(
    name: str,
    trace: Callable,
    config: ConfigDict,
    topology: str,
    mesh: Mesh,
    one_chip: Chip,
    workdir: Path | None = None,
) -> CompiledProgram:
    started = time.perf_counter()
    with console.status(f"{topology}: compiling the {name} for {mesh.size} chips"):
        lowered = trace().lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return CompiledProgram(
                compile_seconds=time.perf_counter() - started,
                argument_bytes=None,
                peak_bytes=_needed_bytes(str(error)),
                fits=False,
                model_flops=_model_flops(name, config, mesh),
                hardware_flops=None,
                collective_bytes={},
                mfu_bound=None,
                kernels={},
            )
        seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = HloProgram(text)
    if workdir:
        file = f"{topology} {name}.hlo.txt"
        (workdir / re.sub(r"[^\w.]+", "-", file)).write_text(text)
    cost, model_flops = program.cost(), _model_flops(name, config, mesh)
    moved = cost.bytes_by_kind()
    console.print(f"{topology}: {name} compiled in {seconds:.0f} s", highlight=False)
    return CompiledProgram(
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        fits=memory.peak_memory_in_bytes <= one_chip.hbm_bytes,
        model_flops=model_flops,
        hardware_flops=cost.flops * mesh.size,
        collective_bytes=moved,
        mfu_bound=_mfu_bound(model_flops / mesh.size, cost.flops, moved, one_chip),
        kernels=program.kernels(),
    )


def _model_flops(name: str, config: ConfigDict, mesh: Mesh) -> float:
    """Returns the FLOPs of one run. The sampler's is one call of its loop after prompts of a row's length, its prompts'
    one for each part of the rows, unprojected."""
    model, length = abstract_model(config, compute(config, mesh)), config.train.max_seq_len
    if name.startswith("training step"):
        trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, lora.Adapter)))
        return step_flops(model.config, config.train.batch_size, length, trained)
    if name == "reference pass":
        return sum(forward_flops(model.config, config.train.batch_size, length))
    if name == "sampler":
        rows, steps = config.sample.max_num_seqs, steps_per_call(config.sample.max_new_tokens)
        behind, before = (sum(forward_flops(model.config, rows, tokens)) for tokens in (length + steps, length))
        return behind - before
    projected = 2 * row_parts(mesh) * length * model.config.vocab_size * model.config.hidden_size
    return sum(forward_flops(model.config, row_parts(mesh), length)) - projected


def _mfu_bound(model_flops: float, flops: float, moved: dict, one_chip: Chip) -> float:
    """Returns model FLOPs over what the chip could do in the time that its products, or its links, need at their peaks.

    Both are taken to overlap wholly. Of several slices the links between them are not looked at.
    """
    seconds = flops / one_chip.flops
    if one_chip.link_bytes:
        within = sum(size for kind, size in moved.items() if kind != BETWEEN_SLICES)
        seconds = max(seconds, within / one_chip.link_bytes)
    return model_flops / one_chip.flops / seconds


def _needed_bytes(message: str) -> int:
    """Returns the bytes that the compiler asks for where a program does not fit; raises InputError where it says else.

    Where temporary arrays alone are too large, it says no more than that.
    """
    match = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    match = match or re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    if not match:
        raise InputError(f"the TPU compiler failed: {message.strip().splitlines()[0][:400]}")
    return int(float(match[1]) * 1024 ** (" KMGT".index(match[2])))


def _smaller_recipes(config: ConfigDict, topology: str, mesh: Mesh, one_chip: Chip) -> list[dict]:
    """Recipes that need less memory, each with one more change than the one before, until one fits."""
    tried, changes = [], {}
    for field, value in _savings(config, mesh):
        changes[field] = value
        smaller = copy.deepcopy(config)
        smaller.update_from_flattened_dict(changes)
        trace = programs(smaller, mesh)["training step"]
        described = ", ".join(f"{name} = {value}" for name, value in changes.items())
        compiled = _compile(f"training step with {described}", trace, smaller, topology, mesh, one_chip)
        tried.append({"changes": dict(changes), "peak_bytes": compiled.peak_bytes, "fits": compiled.fits})
        if compiled.fits:
            break
    return tried


def _savings(config: ConfigDict, mesh: Mesh):
    """Changes that cost little first."""
    train = config.train
    if train.remat != "full":
        yield "train.remat", "full"
    if not config.lora.rank:
        for field in ("mu_dtype", "nu_dtype"):
            if train[field] == "float32":
                yield f"train.{field}", "bfloat16"
    parts = train.grad_accumulation_steps
    while parts * 2 * mesh.shape["data"] * mesh.shape["fsdp"] <= train.batch_size:
        parts *= 2
        yield "train.grad_accumulation_steps", parts
    if train.logits_chunk_size > 16:
        yield "train.logits_chunk_size", 16
    if not config.lora.rank:
        yield "lora.rank", 16


# ------------------------------------------------------------------------------------------------------- topologies


# What libtpu asks of its machine: answered here, so that it neither waits for the network nor complains.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextlib.contextmanager
def compiler_only():
    """Keeps JAX off any accelerator while the TPU compiler is loaded."""
    platforms, environment = jax.config.jax_platforms, dict(os.environ)
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", platforms)
        os.environ.clear()
        os.environ.update(environment)


def devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology, described; within `compiler_only`."""
    name, _, slices = topology.partition("*")
    sizes = name.partition(":")[2]
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or (slices and not slices.isdecimal()):
        raise InputError(
            f"topology {topology!r}: want chips along each axis, as in v5e:4x4, and slices as in v5e:4x4*2"
        )
    options = {"num_slices": int(slices)} if slices else {}
    if math.prod(map(int, sizes.split("x"))) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip, as JAX sees it on the machine; else two
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # of whatever kind the runtime at hand raises
        missing = importlib.util.find_spec("libtpu") is None
        hint = "; the TPU compiler is not installed: pip install 'jax[tpu]'" if missing else ""
        raise InputError(f"topology {topology!r} cannot be made: {str(error).splitlines()[0][:300]}{hint}") from error
    return list(np.ravel(described.devices))


# ------------------------------------------------------------------------------------------------------------ table


def _show(config: ConfigDict, compiled_by_topology: dict[str, dict], chips: dict[str, Chip]) -> None:
    train = config.train
    title = f"{config.model.path}, {config.objective}, {train.batch_size} rows of {train.max_seq_len} tokens"
    table = new_table(title)
    add_names(table, "topology", compiled_by_topology)
    add_names(table, "program", {name for report in compiled_by_topology.values() for name in report["programs"]})
    for heading in ("compile", "args", "peak", "of", "room", "FLOPs", "sent", "MFU"):
        add_figures(table, heading)
    for topology, report in compiled_by_topology.items():
        of = chips[topology].hbm_bytes
        for name, program in report["programs"].items():
            fits = program["fits"]
            training = name == "training step" and fits
            table.add_row(
                topology,
                name,
                f"{program['compile_seconds']:.0f} s",
                f"{program['argument_bytes'] / _GIB:.2f}" if fits else "",
                f"{program['peak_bytes'] / _GIB:.2f}",
                f"{of / _GIB:.0f}",
                f"{(of - program['peak_bytes']) / _GIB:.2f}" + ("" if fits else "!"),
                f"{program['hardware_flops'] / program['model_flops']:.2f}" if training else "",
                f"{sum(program['collective_bytes'].values()) / _GIB:.1f}" if fits else "",
                f"{program['mfu_bound']:.0%}" if training else "",
            )
    console.print(table)
    console.print(
        "GiB per chip. room: of the chip's memory, beyond the peak. FLOPs: hardware over model. sent: by collectives. "
        "MFU: upper bound of model FLOPs utilisation.",
        highlight=False,
    )
    for topology, report in compiled_by_topology.items():
        for tried in report["would_fit"]:
            room = (chips[topology].hbm_bytes - tried["peak_bytes"]) / _GIB
            changes = " ".join(f"--config.{field}={value}" for field, value in tried["changes"].items())
            outcome = f"fits, {room:.2f} GiB to spare" if tried["fits"] else f"{-room:.2f} GiB too much"
            console.print(f"{topology}: {changes}: {outcome}", highlight=False)
