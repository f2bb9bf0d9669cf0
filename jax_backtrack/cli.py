"""The modes of the command, and its errors in one line."""

import contextlib
import copy
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jax_backtrack.aot.compile import compile_recipe
from jax_backtrack.distributed import hosts, preemption
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.evaluation import mt_bench
from jax_backtrack.evaluation import run as evaluation
from jax_backtrack.evaluation.compare import compare
from jax_backtrack.evaluation.judges import probe
from jax_backtrack.experiments import replication, stages
from jax_backtrack.hub.settings import load_model
from jax_backtrack.recipes import known_recipes, read_recipe
from jax_backtrack.sampling import files
from jax_backtrack.sampling.build import recipe_sampler
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.serving import web
from jax_backtrack.serving.chat import chat, typed_lines
from jax_backtrack.training.checkpoints import DamagedCheckpoint
from jax_backtrack.training.loop import train
from jax_backtrack.training.show_data import show_data
from jax_backtrack.utils.console import console
from jax_backtrack.utils.settings import check_recipe, no_such_field, settings
from jax_backtrack.utils.workdir import EXPORT, MT_BENCH, RECIPE, SAMPLES, check_links

_COMPILED = "runs/compile"
_RECORDS = 3  # of each path, that --mode=show-data prints
_INTERACTIVE = ("chat", "web")  # Ctrl-C ends a reply, or the page, there


def with_config_path(argv: Sequence[str], folder: Path) -> list[str]:
    """Returns the command line with `--config=NAME` made a path, where NAME is no file here but a recipe in `folder`,
    with or without its ".py"."""
    argv = list(argv)
    for index, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") != "config" or flag == "config":
            continue
        at = index if equals else index + 1
        name = value if equals else (argv[at] if at < len(argv) else "")
        if (name or equals) and not os.path.isfile(name):
            recipes = known_recipes(folder)
            name = name if name in recipes else f"{name}.py"
            if name not in recipes:
                name = name.removesuffix(".py")
                _say_error(f"--config={name}: no such file, and no such recipe: {nearest(name, recipes)}")
                raise SystemExit(2)
            argv[at] = f"{flag}={recipes[name]}" if equals else str(recipes[name])
    return argv


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a field that the recipe does not have, or a value that it cannot have, ends in one line."""
    try:
        return flags.FLAGS(checked_overrides(argv))
    except InputError as error:
        _say_error(error)
    except (KeyError, AttributeError, TypeError, ValueError, flags.Error) as error:
        _say_error(" ".join(str(error).strip("'\"").split()))
    raise SystemExit(2)


def checked_overrides(argv: Sequence[str]) -> list[str]:
    """Returns the command line with every `--config.FIELD=VALUE` checked, and its value as Python writes it.

    Raises InputError where the recipe has no such field, or where the field cannot have this value.
    """
    argv, path = list(argv), ""
    for index, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(=(.*))?", argument):
            path = argv[index + 1] if match[1] is None and index + 1 < len(argv) else match[2] or ""
    if not os.path.isfile(path):
        return argv
    fields, checked = flatten_dict(read_recipe(path).to_dict(), sep="."), []
    while argv:
        argument = argv.pop(0)
        if not (override := re.fullmatch(r"--?config\.([^=]+)(=(.*))?", argument, re.DOTALL)):
            checked.append(argument)
            continue
        name, text = override[1], override[3]
        if text is None:
            flag = isinstance(fields.get(name), bool) and (not argv or argv[0].casefold() not in ("true", "false"))
            text = "True" if flag or not argv else argv.pop(0)
        checked.append(f"--config.{name}={_checked_value(name, text, fields)}")
    return checked


def _checked_value(name: str, text: str, fields: Mapping[str, object]) -> str:
    if name not in fields:
        raise no_such_field(name, fields)
    parts = name.split(".")
    setting = settings().get(".".join(parts[2:] if parts[0] == "stages" else parts))
    if setting is None:  # a field of the recipe's own
        return text
    try:
        value = setting.parse(text)
    except InputError as error:
        raise InputError(f"{name.removesuffix(setting.name)}{error}") from None
    return value if isinstance(value, str) else repr(value)


def run(
    mode: str,
    config: ConfigDict,
    workdir: str | None,
    *,
    prompts: str | None = None,
    topology: Sequence[str] = (),
    workdirs: Sequence[str] = (),
    records: int | None = None,
    placement: tuple = (None, None, None),
    debug: bool = False,
) -> int:
    """Runs one mode and returns the exit code: 0, or 2 after an error of the user's input. Where the same command goes
    on it is 130 after Ctrl-C, and `preemption.RESTART` after a SIGTERM and where a launcher should start it again.

    placement: coordinator, processes and process, as `hosts.start` takes them. Of several processes one that meets an
    error ends here, with the same code, and the others with it.
    debug: shows the traceback of an error that is otherwise said in one line; others show theirs always.
    """
    try:
        if not isinstance(config, ConfigDict):
            raise InputError(f"get_config() of the recipe gives {config!r:.60}, no ConfigDict")
        if mode not in MODES:
            raise InputError(f"--mode={mode}: {nearest(mode, MODES)}")
        if prompts is not None and mode != "sample":
            raise InputError(f"--prompts goes with --mode=sample, not with --mode={mode}")
        if records is not None and mode != "show-data":
            raise InputError(f"--records goes with --mode=show-data, not with --mode={mode}")
        if bool(topology) != (mode == "compile"):
            raise InputError("--topology and --mode=compile go together: --mode=compile --topology=v5e:4x4")
        if bool(workdirs) != (mode == "compare"):
            raise InputError("--workdirs and --mode=compare go together: --mode=compare --workdirs=runs/one,runs/other")
        if "stages" in config and mode != "run-stages":
            raise InputError(f"the recipe has stages, for --mode=run-stages; --mode={mode} takes a recipe of one run")
        check_recipe(config)
        if workdir is None and mode not in ("compile", "show-data"):
            raise InputError(f"--workdir=DIR must be given with --mode={mode}")
        if mode == "compile":
            workdir = workdir or _COMPILED
        if workdir is not None and "://" in workdir:
            raise InputError(f"--workdir={workdir}: only local folders are supported yet")
        if mode != "train" and hosts.asked_for(*placement):
            raise InputError(f"--mode={mode} runs on one host; of several, only --mode=train can make use")
        folder = None if workdir is None else Path(workdir)
        if folder is not None:
            check_links(folder)
        hosts.start(*placement)
        with contextlib.nullcontext() if mode in _INTERACTIVE else preemption.caught():
            argument = {"compile": topology, "compare": workdirs, "show-data": records}.get(mode, prompts)
            MODES[mode](config, folder, argument)
        hosts.finish()
    except (InputError, FloatingPointError, OSError) as error:
        if debug:
            traceback.print_exc()
        _say_error(error)
        hosts.leave(2, error)
        return 2
    except (preemption.Interrupted, DamagedCheckpoint) as stop:
        _say_error(stop, "stopped")
        hosts.leave(stop.code, stop)
        return stop.code
    except BaseException as error:
        hosts.leave_with_traceback(error)
        raise
    return 0


def _say_error(error: object, word: str = "error") -> None:
    if hosts.several():
        print(f"{word}: {hosts.label()}: {error}", file=sys.stderr, flush=True)
    else:
        console.print(f"{word}: {error}", style="bold red", highlight=False, markup=False)


def _say_next(what: str) -> None:
    console.print(f"next: {what}", style="dim", highlight=False, markup=False)


def _train(config: ConfigDict, workdir: Path, _prompts) -> None:
    train(config, workdir)
    _say_next(f"the same command with --mode=chat, --mode=sample or --mode=evaluate uses the model in {workdir}")
    if config.objective == "sft" and config.data.backtrack:
        _say_next(f"DPO begins from it with a DPO recipe, a workdir of its own and --config.model.path={workdir}")


def _show_data(config: ConfigDict, workdir: Path | None, records: int | None) -> None:
    show_data(config, workdir, _RECORDS if records is None else records)


def _sample(config: ConfigDict, workdir: Path, prompts: str | None) -> None:
    requests = files.read_prompts(prompts, config.sample.limit or None)
    files.write_samples(_sampler(config, workdir), requests, workdir / SAMPLES)


def _chat(config: ConfigDict, workdir: Path, _prompts) -> None:
    sampler = _sampler(config, workdir)
    chat(sampler, typed_lines())


def _web(config: ConfigDict, workdir: Path, _prompts) -> None:
    web.check_possible(config.web.port)
    web.serve(_samplers_by_name(config, workdir), config)


def _evaluate(config: ConfigDict, workdir: Path, _prompts) -> None:
    settings, name = config.evaluate, Path(_model_path(config, workdir)).name
    questions = mt_bench.read(settings.mt_bench) if settings.mt_bench else []
    wanted = not questions or settings.harmful or settings.harmless
    sets = evaluation.read_sets(config) if wanted else []
    judge = evaluation.judge_of(settings, sets)
    sampler = _sampler(config, workdir)
    if sets:
        evaluation.evaluate_in(workdir, config, sampler, name, judge, sets)
    if questions:
        mt_bench.write_answers(sampler, questions, name, workdir / MT_BENCH)


def _compare(config: ConfigDict, workdir: Path, workdirs: Sequence[str]) -> None:
    compare([Path(folder) for folder in workdirs], workdir, config.evaluate)


def _run_stages(config: ConfigDict, workdir: Path, _prompts) -> None:
    if "stages" not in config:
        raise InputError("--mode=run-stages takes a recipe with stages, as demo.py; this one has no stages")
    if "seeds" in config:
        replication.replicate(config, workdir)
    else:
        stages.run_stages(config, workdir)
        last = workdir / stages.folder_name(config.order[-1])
        _say_next(f"talk to the last model with --config=dpo_smollm.py --workdir='{last}' --mode=chat")


def _fit_judge(config: ConfigDict, workdir: Path, _prompts) -> None:
    probe.fit(config, workdir)


def _compile(config: ConfigDict, workdir: Path, topology: Sequence[str]) -> None:
    compile_recipe(config, topology, workdir)


MODES = {
    "compile": _compile,
    "show-data": _show_data,
    "train": _train,
    "sample": _sample,
    "chat": _chat,
    "web": _web,
    "evaluate": _evaluate,
    "compare": _compare,
    "run-stages": _run_stages,
    "fit-judge": _fit_judge,
}


def _sampler(config: ConfigDict, workdir: Path) -> Sampler:
    """Returns a sampler of the workdir's model, or of the recipe's where nothing was trained in the workdir."""
    path = _model_path(config, workdir)
    console.print(f"model: {path}", highlight=False)
    model, tokenizer = load_model(config, path, make_mesh(**config.mesh))
    return recipe_sampler(config, model, tokenizer)


def _samplers_by_name(config: ConfigDict, workdir: Path) -> dict[str, Sampler]:
    """Samplers that keep log-probabilities, of `_sampler`'s model and of `web.baseline`, by their paths."""
    config = copy.deepcopy(config)
    config.sample.logprobs = True
    path, baseline = _model_path(config, workdir), config.web.baseline
    if path == baseline:
        raise InputError(f"web.baseline = {baseline} is the model itself")
    samplers = {path: _sampler(config, workdir)}
    if baseline:
        model, tokenizer = load_model(config, baseline, make_mesh(**config.mesh))
        config.reset.mode = tokenizer.reset_mode or config.reset.mode  # it may have been trained for another
        samplers[baseline] = recipe_sampler(config, model, tokenizer)
    return samplers


def _model_path(config: ConfigDict, workdir: Path) -> str:
    if (workdir / EXPORT).exists():
        return str(workdir)
    if (workdir / RECIPE).exists():
        raise InputError(f"{workdir}: its training is not finished; run --mode=train once more to go on with it")
    return config.model.path
