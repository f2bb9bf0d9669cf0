"""Trains a model by a recipe: data, reference, steps, checkpoints, export."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from jax_backtrack.data import examples as examples_lib
from jax_backtrack.data.process_local_batch import ProcessLocalBatch
from jax_backtrack.data.rows import PackedRows, TreeSource, batches
from jax_backtrack.distributed import hosts, preemption
from jax_backtrack.distributed.mesh import make_mesh, rows_sharding
from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.hub.settings import load_model
from jax_backtrack.models.lora import merge_adapters, split
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.training.agreement import agree_on_data, agree_on_start, check_shared
from jax_backtrack.training.checkpoints import Checkpoints, newest_step
from jax_backtrack.training.data import encode_sources, read_sources, tree_spec
from jax_backtrack.training.metrics import MetricsWriter
from jax_backtrack.training.reference import reference_logps
from jax_backtrack.training.settings import add_adapters, check_length, check_sizes, check_training, train_config
from jax_backtrack.training.step import Batch, compile_step, init_state
from jax_backtrack.training.template_date import pin_date, with_recorded_date
from jax_backtrack.utils.console import bold, console, progress_bar
from jax_backtrack.utils.settings import decisive_differences
from jax_backtrack.utils.workdir import EXPORT, METRICS, RECIPE, atomic_write


def train(
    config: ConfigDict, workdir: Path, load: Callable[..., tuple[Transformer, ChatTokenizer]] = load
) -> tuple[Transformer, ChatTokenizer]:
    """Runs the recipe's training in `workdir`, from its newest checkpoint if there is one; gives the trained model.

    A finished workdir is loaded and left as it is. Leaves `recipe.json`, `metrics.jsonl`, `tensorboard/`,
    `checkpoints/` and `export/`. Raises InputError where the workdir belongs to another recipe, FloatingPointError
    where more batches had to be skipped than `train.max_skipped`, naming their steps and rows of the data, and
    Interrupted behind a checkpoint where a signal asks for an end (`preemption.caught`). `load` may be one that
    remembers models. Of several processes all must call this, with a workdir that they share; the first one writes.
    """
    check_training(config)
    config = with_recorded_date(config, workdir / RECIPE)
    finished, latest = (workdir / EXPORT).exists(), newest_step(workdir)
    agree_on_start(config, finished, latest)
    mesh = make_mesh(**config.mesh)
    hosts.check_started()
    check_sizes(config, mesh)
    refuse_other_recipe(workdir, config)
    sources = [] if finished else read_sources(config)
    path = str(workdir) if finished else config.model.path
    model, tokenizer = load_model(config, path, mesh, load=load)
    if finished:
        console.print(f"{workdir} is trained already: nothing to do", highlight=False)
        return model, tokenizer
    check_length(config, model.config)
    config = pin_date(config, tokenizer)
    if config.data.backtrack:
        tokenizer = _ready_to_backtrack(model, tokenizer, config)
    spec = tree_spec(config, tokenizer)
    examples = encode_sources(sources, tokenizer, spec, config)
    data = examples_lib.content_hash(examples)
    agree_on_data(len(examples), data)
    trees = TreeSource(examples, spec, config.data.seed)
    _claim(workdir, config)
    rows = PackedRows(trees, config.train.max_seq_len, config.train.steps * config.train.batch_size)
    shape = f"{len(rows)} rows of {config.train.max_seq_len} tokens"
    console.print(f"{shape}, {rows.padding():.1%} of them padding", highlight=False)
    if config.objective == "dpo":
        rows.reference = _reference(config, workdir, model, trees, rows.examples())
    add_adapters(config, model, tokenizer.reset_id)  # behind the reference, which is the model without them
    _run_steps(config, workdir, mesh, model, tokenizer, rows, data)
    merge_adapters(model)
    trained_by = copy.deepcopy(config)
    trained_by.model.compute_dtype = model.compute.dtype  # what "auto" came to
    save(model, tokenizer, workdir / EXPORT, recipe=trained_by)
    console.print(f"model in {bold(workdir / EXPORT)}, metrics in {bold(workdir / METRICS)}", highlight=False)
    return model, tokenizer


def refuse_other_recipe(workdir: Path, config: ConfigDict, also: tuple[str, ...] = (), file: str = RECIPE) -> None:
    """Raises InputError where the workdir was begun with another recipe, in what is trained or in sections `also`, by
    the file that `write_recipe` wrote there."""
    path = workdir / file
    if not path.exists():
        return
    _refuse_difference(workdir, config, json.loads(path.read_text()), also)


def _refuse_difference(workdir: Path, config: ConfigDict, theirs: dict, also: tuple[str, ...] = ()) -> None:
    ours = json.loads(config.to_json())
    if not ours["model"]["template_date"]:  # whatever the run was begun with
        ours["model"]["template_date"] = theirs.get("model", {}).get("template_date")
    if differing := decisive_differences(ours, theirs, also):
        raise InputError(f"{workdir} was begun with other settings ({', '.join(differing)}): use another workdir")


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Claims the workdir for the recipe, once it is known that the recipe can run."""
    if jax.process_index() == 0:
        write_recipe(workdir / RECIPE, config)
    check_shared(workdir / RECIPE)


def write_recipe(path: Path, config: ConfigDict) -> None:
    """Writes a recipe as JSON, whole or not at all."""
    atomic_write(path, json.dumps(json.loads(config.to_json()), indent=2) + "\n")


def _ready_to_backtrack(model: Transformer, tokenizer: ChatTokenizer, config: ConfigDict) -> ChatTokenizer:
    trained = tokenizer.reset_mode
    if trained not in (None, config.reset.mode):
        raise InputError(f"reset.mode is {config.reset.mode!r}, but {config.model.path} was trained with {trained!r}")
    tokenizer = add_reset(model, tokenizer)
    tokenizer.reset_mode = config.reset.mode
    return tokenizer


def _reference(config: ConfigDict, workdir: Path, model: Transformer, trees: TreeSource, needed: list[int]):
    kept_in = config.train.reference_folder
    with progress_bar("reference", len(needed)) as advance:
        logps, computed = reference_logps(
            model,
            trees,
            needed,
            folder=Path(kept_in) if kept_in else workdir / "reference",
            max_seq_len=config.train.max_seq_len,
            batch_size=config.train.batch_size,
            chunk=config.train.logits_chunk_size,
            progress=advance,
        )
        advance(0, note=f"{computed} computed, the others from cache")
    return logps


def _run_steps(
    config,
    workdir: Path,
    mesh,
    model: Transformer,
    tokenizer: ChatTokenizer,
    rows: PackedRows,
    data: str,
) -> None:
    """Trains the model in place, from the workdir's newest checkpoint if there is one; `data` is a hash of it all."""
    step_config = train_config(config, tokenizer.reset_id)
    batch_size = config.train.batch_size
    graph, trained, frozen = split(model)
    state = init_state(trained, step_config)
    train_step = compile_step(graph, step_config, state)
    local_batch = ProcessLocalBatch(rows_sharding(mesh), batch_size)
    fed = batches(rows, batch_size, local_batch.rows)
    checkpoints = Checkpoints(workdir, config, data) if config.train.checkpoint_every_steps else None
    first_step = skipped = 0
    if checkpoints and (restored := checkpoints.restore(state)):
        _refuse_difference(workdir, config, restored.recipe)
        if restored.data != data:
            raise InputError(f"the data is not what {workdir} was begun with: bring it back, or use another workdir")
        state, first_step, skipped = restored.state, restored.step, int(restored.state.skipped)
        fed.set_state(restored.data_position)
        console.print(f"resumed from step {first_step}")
    writer = MetricsWriter(workdir, first_step + 1, config)
    started = time.perf_counter()

    def report(step: int, metrics: dict, advance) -> None:
        """Fetches the metrics of a step, when the next one is running already."""
        nonlocal skipped
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if numbers["skipped"] > skipped:
            skipped = int(numbers["skipped"])
            origins = [
                origin for row in range((step - 1) * batch_size, step * batch_size) for origin in rows.origins(row)
            ]
            what = (
                f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}; its batch holds "
                f"{'; '.join(origins)}. It was skipped, as {skipped} in all"
            )
            if skipped > config.train.max_skipped:
                raise FloatingPointError(f"{what}, and train.max_skipped is {config.train.max_skipped}")
            console.print(what, style="yellow", highlight=False, markup=False)
        numbers["seconds"] = time.perf_counter() - started
        writer.write(step, numbers)
        shown = [f"loss {numbers['loss']:.3f}"]
        shown += [f"{name} {numbers[name]:.2f}" for name in ("reset_loss", "rewards/accuracies") if name in numbers]
        advance(note="  ".join(shown))

    last_step = len(rows) // batch_size
    pending = None
    try:
        with preemption.deferred(), progress_bar(f"{config.objective} steps", last_step, first_step) as advance:
            for step in range(first_step + 1, last_step + 1):
                with jax.transfer_guard("disallow"):
                    batch = local_batch.to_global(Batch(**next(fed)))
                    state, metrics = train_step(state, frozen, batch)
                if pending:
                    report(*pending, advance)
                pending = step, metrics
                end = preemption.asked(step)
                if checkpoints and (step % config.train.checkpoint_every_steps == 0 or step == last_step or end):
                    report(*pending, advance)
                    pending = None
                    checkpoints.save(step, state, fed.get_state())
                if end:
                    left = (
                        f"step {step} is saved"
                        if checkpoints
                        else "nothing is saved, train.checkpoint_every_steps is 0"
                    )
                    raise preemption.Interrupted(end, left)
            if pending:
                report(*pending, advance)
    except preemption.Interrupted:
        raise
    except BaseException as error:
        hosts.failing(error)
        raise
    finally:
        writer.close()
        if checkpoints:
            checkpoints.close()
    nnx.update(model, state.params)
