"""Evaluates a model on the prompt sets of a recipe: `evaluation.json`, `evaluation.html` and a table."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich import box
from rich.table import Table

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.load import load
from jax_backtrack.progress import console, progress_bar, share_bar
from jax_backtrack.safety import page, prompt_sets
from jax_backtrack.safety.asked import Asked, ask
from jax_backtrack.safety.cells import HEADINGS, cell
from jax_backtrack.safety.judge import Judge
from jax_backtrack.safety.llama_guard import LlamaGuard
from jax_backtrack.safety.prompt_sets import Question
from jax_backtrack.safety.refusals import Refusals
from jax_backtrack.sampling.sampler import Sampler


def read_sets(config: ConfigDict) -> list[tuple[str, bool, list[Question]]]:
    """Name, whether it is harmful, and questions of every set of the recipe. Nothing is sampled before all are read."""
    limit = config.evaluate.limit or None
    return [
        (*prompt_sets.read(entry, harmful, limit), harmful)
        for harmful, entries in ((True, config.evaluate.harmful), (False, config.evaluate.harmless))
        for entry in entries
    ]


def make_judge(name: str) -> Judge:
    """The judge of this name: "refusals", or the path or Hub id of a Llama Guard."""
    if name == Refusals.name:
        return Refusals()
    if "/" not in name and not Path(name).exists():
        raise InputError(f"evaluate.judge is {name!r}: {nearest(name, [Refusals.name])}, or the path of a Llama Guard")
    with share_bar(f"loading judge {name[-32:]}") as progress:
        return LlamaGuard(*load(name, dtype="bfloat16", progress=progress))


def evaluate_sets(config: ConfigDict, sampler: Sampler, judge: Judge, sets, model: str, workdir: Path) -> list[Asked]:
    """Asks every set plainly, and harmful ones with targets under each of `evaluate.prefill` too."""
    settings = config.evaluate
    conditions = [
        (name, questions, harmful, prefill)
        for name, questions, harmful in sets
        for prefill in (0, *(settings.prefill if harmful else ()))
        if not prefill or any(question.target for question in questions)
    ]
    asked = []
    for name, questions, harmful, prefill in conditions:
        of = sum(bool(question.target) for question in questions) if prefill else len(questions)
        title = f"{name}, {prefill} tokens prefilled" if prefill else name
        with progress_bar(title, of * settings.samples) as advance:
            asked.append(
                ask(
                    sampler,
                    judge,
                    name,
                    questions,
                    harmful=harmful,
                    prefill=prefill,
                    samples=settings.samples,
                    progress=advance,
                )
            )
    write({model: asked}, judge.name, workdir / "evaluation.json")
    page.write({model: asked}, judge.name, workdir / "evaluation.html")
    show({model: asked}, judge.name)
    console.print(f"replies and page in [bold]{workdir}[/]: evaluation.json, evaluation.html", highlight=False)
    return asked


def show(models: dict[str, Sequence[Asked]], judge: str) -> None:
    """Prints one table: a row for each model, set and condition."""
    table = Table(title=f"judge: {judge}; 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("model", "prompts", "", *HEADINGS.values()):
        table.add_column(heading, justify="right" if heading in HEADINGS.values() else "left")
    for model, asked in models.items():
        for one in asked:
            measures = one.measures()
            cells = ["\n".join(cell(measures.get(name), name)) for name in HEADINGS]
            table.add_row(model, one.title, str(len(one.answers)), *cells)
    console.print(table)


def write(models: dict[str, Sequence[Asked]], judge: str, path: Path) -> None:
    """Writes measures and every reply of each model, judged, to a JSON file."""
    content = {"judge": judge, "models": {model: [_as_json(one) for one in asked] for model, asked in models.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _as_json(asked: Asked) -> dict:
    return {
        "set": asked.name,
        "harmful": asked.harmful,
        "prefill": asked.prefill,
        "measures": {name: dataclasses.asdict(measure) for name, measure in asked.measures().items()},
        "answers": [
            {
                "messages": list(answer.question.messages),
                "prefix": answer.prefix,
                "reply": answer.reply.text,
                "drafts": list(answer.reply.drafts),
                "finish": answer.reply.finish,
                "unsafe": answer.unsafe,
                "shown_unsafe": answer.shown_unsafe,
            }
            for samples in asked.answers
            for answer in samples
        ],
    }
