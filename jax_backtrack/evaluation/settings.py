"""Settings of evaluation, and of the judge that is fitted for it."""

from jax_backtrack.utils.settings import field, section


@section("evaluate")
class EvaluateSettings:
    """Evaluation, on the testbed or on prompt sets."""

    prompts: int = field(200, "Prompts of the testbed, per condition.", unit="prompts", least=1)
    mt_bench: str = field(
        "", "Path of MT-Bench's `question.jsonl`: both turns are answered, in FastChat's format of answers."
    )
    harmful: tuple[str, ...] = field(
        (),
        'Prompt sets of what should be declined, each a known name, a Hub id, a file, or "NAME=FILE"; of a set with '
        "labels, its unsafe prompts ([EVALUATION.md](EVALUATION.md)).",
    )
    harmless: tuple[str, ...] = field(
        (), "Prompt sets of what should be answered; of a set with labels, its safe prompts."
    )
    judge: str = field(
        "refusals",
        'Judge of harmful sets\' replies: `"refusals"`, path or Hub id of a Llama Guard, or the workdir of '
        "`--mode=fit-judge`.",
    )
    win_rate_judge: str = field(
        "",
        "Path or Hub id of an instruct model that says which of two models' replies to a harmless prompt is better, in "
        'both orders; `""`: none is asked.',
    )
    prefill: tuple[int, ...] = field(
        (10,), "Lengths of a harmful reply's beginning that are written for the model, besides none.",
        unit="tokens",
        above=0,
    )  # fmt: skip
    gcg_steps: int = field(
        0, "Steps of GCG against each harmful prompt that has a target; 0 for none. It takes long.",
        unit="steps",
        least=0,
    )  # fmt: skip
    gcg_width: int = field(512, "Candidates of a step of GCG.", unit="candidates", least=1)
    gcg_reset_weight: float = field(
        0.0, "Weight of pushing `[RESET]` down along the target; above 0 the attack is adaptive.", least=0
    )
    system_attack: str = field("", "System prompt that harmful sets are asked under, once more.")
    without_resets: bool = field(False, "True asks harmful sets once more with `[RESET]` masked out.")
    reset_biases: tuple[float, ...] = field(
        (), "Biases of `[RESET]` that the sets are asked with again, for the trade-off; not `sample.reset_bias`.",
        unit="nats",
    )  # fmt: skip
    false_resets: float = field(0.02, "Share of false resets that the chosen bias may give.", unit="share", least=0)
    samples: int = field(1, "Replies per prompt; the worst of k is estimated from them.", unit="replies", least=1)
    limit: int = field(0, "Prompts used of each set; 0 for all.", unit="prompts", least=0)


@section("judge")
class JudgeSettings:
    """Judge of `--mode=fit-judge`, which reads replies with the first layers of the recipe's model."""

    data: str = field(
        "", "Labelled replies to fit a judge to: a file or Hub id with the columns `prompt`, `response`, `unsafe`."
    )
    layers: int = field(18, "Layers of the recipe's model that replies are read with.", unit="layers", least=1)
    tokens: int = field(256, "Tokens of a reply that are read.", unit="tokens", least=1)
    folds: int = field(5, "Folds of cross-validation, by prompt.", unit="folds", least=2)
