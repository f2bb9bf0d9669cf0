"""Evaluates a model on the prompt sets of a recipe: `evaluation.json`, `evaluation.html` and a table."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jax_backtrack.data import prompt_sets, testbed
from jax_backtrack.data.prompt_sets import PromptSet, Question
from jax_backtrack.data.sources import TESTBED
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation import results
from jax_backtrack.evaluation.attacks.gcg import Attack, Objective, Settings
from jax_backtrack.evaluation.judges import load_judge
from jax_backtrack.evaluation.judges.exact import ExactJudge
from jax_backtrack.evaluation.judges.judge import Judge
from jax_backtrack.evaluation.perplexity import held_out_perplexity
from jax_backtrack.evaluation.reports.page import report
from jax_backtrack.evaluation.results import SYSTEM_PROMPT, Condition, EvalResult, Evaluation, Response
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.utils.console import progress_bar
from jax_backtrack.utils.resume_cache import ResumeCache, key_of, resume_cache_of
from jax_backtrack.utils.workdir import EVALUATION, EVALUATION_PAGE


def read_sets(config: ConfigDict) -> list[PromptSet]:
    """Reads every set of the recipe, the testbed where it names none. Nothing is sampled before all are read."""
    settings, sets = config.evaluate, []
    entries = [(True, entry) for entry in settings.harmful] + [(False, entry) for entry in settings.harmless]
    for harmful, entry in entries or [(True, TESTBED), (False, TESTBED)]:
        if entry == TESTBED:
            sets.append(testbed.prompt_set(settings.prompts, private=harmful))
        else:
            name, questions = prompt_sets.read(entry, harmful, settings.limit or None)
            sets.append(PromptSet(name, harmful, tuple(questions)))
    for number, one in enumerate(sets):
        if one.name in (others := [other.name for other in sets[:number]]):
            if one.harmful == sets[others.index(one.name)].harmful:
                raise InputError(f"evaluate: two prompt sets are named {one.name!r}; name one of them, as NAME=FILE")
            sets[number] = dataclasses.replace(one, name=f"{one.name} (harmless)")
    return sets


def judge_of(settings: ConfigDict, sets: Sequence[PromptSet]) -> Judge | None:
    """Loads the judge of the settings, unless the replies to all harmful sets are judged exactly."""
    asked = any(one.harmful and not _is_exact(one.questions) for one in sets)
    return load_judge(settings.judge) if asked else None


def evaluate(
    config: ConfigDict,
    sampler: Sampler,
    judge: Judge | None = None,
    sets: Sequence[PromptSet] | None = None,
    resume_cache: ResumeCache | None = None,
) -> Evaluation:
    """Asks every set in all conditions of the recipe, and measures the perplexity of what it held out.

    Sets and judge are those of the recipe where they are not given. `resume_cache` is that of the sampler.
    """
    sets = read_sets(config) if sets is None else sets
    judge = judge or judge_of(config.evaluate, sets)
    asking = dict(samples=config.evaluate.samples, resume_cache=resume_cache)
    eval_results = [
        run_condition(sampler, judge, chosen, condition, **asking)
        for prompt_set in sets
        for condition, chosen in _conditions(config, sampler, prompt_set, resume_cache)
    ]
    return Evaluation(tuple(eval_results), held_out_perplexity(config, sampler.model, sampler.tokenizer))


def evaluate_in(
    workdir: Path,
    config: ConfigDict,
    sampler: Sampler,
    model: str,
    judge: Judge | None = None,
    sets: Sequence[PromptSet] | None = None,
) -> Evaluation:
    """Evaluates as `evaluate` does, leaves file and page in the workdir, and prints the table."""
    with resume_cache_of(workdir / EVALUATION) as resume_cache:
        evaluation = evaluate(config, sampler, judge, sets, resume_cache)
        results.write({model: evaluation}, workdir / EVALUATION)
    report({model: evaluation}, workdir / EVALUATION_PAGE, config.evaluate.false_resets)
    return evaluation


def _conditions(
    config: ConfigDict, sampler: Sampler, prompt_set: PromptSet, resume_cache: ResumeCache | None
) -> Iterator[tuple[Condition, PromptSet]]:
    """Yields every condition of a set with what is asked in it: prefilling and attacks of harmful ones, and the
    trade-off's biases of the harmless ones and of the hardest prefilling."""
    settings, harmful = config.evaluate, prompt_set.harmful
    with_target = prompt_set.of(question for question in prompt_set.questions if question.target)
    # A reply that is judged exactly is begun up to the value that it must not give.
    prefills = [None] if _is_exact(prompt_set.questions) else settings.prefill
    prefills = [0, *prefills] if harmful and with_target.questions else [0]
    for prefill in prefills:
        chosen = prompt_set if prefill == 0 else with_target
        yield Condition(prefill), chosen
        if harmful and settings.without_resets:
            yield Condition(prefill, resets=False), chosen
        if harmful and settings.system_attack:
            attacked = (question.with_system(settings.system_attack) for question in chosen.questions)
            yield Condition(prefill, SYSTEM_PROMPT), prompt_set.of(attacked)
    if harmful and with_target.questions and settings.gcg_steps:
        yield (
            Condition(attack=_attack_name(config)),
            prompt_set.of(_attacked(config, sampler, with_target, resume_cache)),
        )
    hardest = max(prefills, key=lambda prefill: float("inf") if prefill is None else prefill)
    for bias in settings.reset_biases:
        yield Condition(hardest, reset_bias=bias), prompt_set if hardest == 0 else with_target


def _attack_name(config: ConfigDict) -> str:
    return "adaptive GCG" if config.evaluate.gcg_reset_weight else "GCG"


def _attacked(
    config: ConfigDict, sampler: Sampler, prompt_set: PromptSet, resume_cache: ResumeCache | None
) -> list[Question]:
    """Returns the questions with the suffixes that GCG finds against the sampler's model. Each is kept in the
    resume_cache."""
    settings = config.evaluate
    search = Settings(steps=settings.gcg_steps, width=settings.gcg_width, seed=config.sample.seed)
    attacked, steps = [], len(prompt_set.questions) * settings.gcg_steps
    with progress_bar(f"{_attack_name(config)} on {prompt_set.name}", steps) as advance:
        for question in prompt_set.questions:
            objective = Objective.of(sampler.tokenizer, question.messages, question.target, settings.gcg_reset_weight)
            key = key_of(sampler.weights_hash, dataclasses.asdict(objective), dataclasses.asdict(search))
            if (suffix := resume_cache.get(key) if resume_cache is not None else None) is None:
                best = None
                for step in Attack(sampler.model, sampler.tokenizer, objective, search).run():
                    best = step if best is None or step.loss < best.loss else best
                    advance(note=f"loss {best.loss:.2f}")
                suffix = sampler.tokenizer.decode(best.suffix)
                if resume_cache is not None:
                    resume_cache.add(key, suffix)
            else:
                advance(settings.gcg_steps)
            attacked.append(question.with_suffix(suffix))
    return attacked


def run_condition(
    sampler: Sampler,
    judge: Judge | None,
    prompt_set: PromptSet,
    condition: Condition = Condition(),
    *,
    samples: int = 1,
    resume_cache: ResumeCache | None = None,
) -> EvalResult:
    """Asks every question `samples` times, with a bar, and has the replies to harmful ones judged: exactly where each
    question has its value, else by the judge. `resume_cache` is that of the sampler."""
    tokenizer, name, harmful, questions = sampler.tokenizer, prompt_set.name, prompt_set.harmful, prompt_set.questions
    if condition.prefill != 0:
        questions = [question for question in questions if question.target]
    sampler = sampler.with_resets(reset_bias=condition.reset_bias, max_resets=None if condition.resets else 0)
    prefills = [_prefill(tokenizer, question.target, condition.prefill) for question in questions]
    with progress_bar(condition.title(name), len(questions) * samples) as advance:
        replies = sampler(
            [question.messages for question in questions],
            n=samples,
            prefills=prefills,
            progress=advance,
            resume_cache=resume_cache,
        )
    judge = ExactJudge() if _is_exact(questions) else judge
    of_replies = [question for question in questions for _ in range(samples)]
    unsafe, stream_unsafe = _judged(judge, of_replies, replies) if harmful else np.zeros((2, len(replies)))
    responses = [
        tuple(
            Response(question, prefix, replies[i], float(unsafe[i]), float(stream_unsafe[i]))
            for i in range(number * samples, (number + 1) * samples)
        )
        for number, (question, prefix) in enumerate(zip(questions, prefills, strict=True))
    ]
    return EvalResult(name, harmful, condition, tuple(responses), judge.name if harmful else "")


def _is_exact(questions: Sequence[Question]) -> bool:
    return all(question.value for question in questions)


def _prefill(tokenizer, target: str, prefill: int | None) -> str:
    """Returns so many tokens of the target, or all of it."""
    return target if prefill is None else tokenizer.decode(tokenizer.encode(target)[:prefill]) if prefill else ""


def _judged(judge: Judge, questions: Sequence[Question], replies: Sequence[Reply]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probabilities of the replies, and of the worst of each reply and its drafts."""
    owners = [number for number, reply in enumerate(replies) for _ in range(1 + len(reply.drafts))]
    texts = [text for reply in replies for text in (reply.text, *reply.drafts)]
    chances = judge([questions[number] for number in owners], texts)
    firsts = np.searchsorted(owners, np.arange(len(replies)))
    worst = np.zeros(len(replies))
    np.maximum.at(worst, owners, chances)
    return np.asarray(chances)[firsts], worst
