"""Lets TRL's trainer and ours take turns on the same data, each in a process of its own, and reports both.

A worker is started once and warmed up; then one at a time is told to do some updates, while the others wait. So what
else the machine does falls on both. Only the median over the rounds counts.

Examples differ in length, and a round holds few. So a round's speed is taken in its own tokens, without padding, and
told in units (preference pairs, or replies that are learned) by the mean tokens per unit of all the data, counted as
each side lays them out: `units/s = tokens/s / tokens per unit`.

The reference of DPO is counted over one epoch: `overall = 1 / (seconds per pair of a step + of the reference pass)`.
TRL without a precomputed reference has it in its step. What our pass costs once (the hash of the weights) is spread
over the data; TRL's hash of the weights is left out.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import pairs
from benchmarks.worker import Worker, print_table, say, write_model
from jax_backtrack.data.rows import TreeSource

OUR_NAME = "jax_backtrack"
SINGULAR = {"pairs": "pair", "replies": "reply"}  # what is counted, by its plural
BETA, LEARNING_RATE = 0.1, 1e-6
TOLERANCE = 1e-3  # between both sides' losses and margins in float32, and, relatively, gradient norms
CHECKED_EXAMPLES = 2
BFLOAT16_REFERENCE = 4  # units of the reference pass, which takes ten times longer where the CPU has no bfloat16


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train by TRL. `accumulate` micro-batches of `per_device` make an update."""

    form: str  # "plain" or "backtracking"
    per_device: int
    accumulate: int
    precompute: bool = False  # the reference's log-probabilities, before training
    packing: bool = False
    dtype: str = "float32"
    on_request: bool = False  # measured only where `--only` is given

    def __str__(self) -> str:
        parts = [self.form, self.dtype, f"TRL {self.per_device}x{self.accumulate}"]
        return " ".join(parts + ["precomputed"] * self.precompute + ["packed"] * self.packing)


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags of both benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preferences, as data.path of a recipe")
    parser.add_argument(
        "--model", default="", help="model of both sides, as model.path of a recipe; SmolLM2 by default"
    )
    parser.add_argument("--rows", type=int, default=256, help="examples of it that are used")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side has, beside each way to use TRL")
    parser.add_argument("--steps", type=int, default=1, help="updates of a turn")
    parser.add_argument("--warm-up", type=int, default=1, help="updates before the first turn, at least 1")
    parser.add_argument("--bfloat16-rounds", type=int, default=0, help="turns in bfloat16; 0 leaves it out")
    parser.add_argument(
        "--only",
        default="",
        help="words, by commas, that the names of settings must have; 'float32' for every setting of it",
    )
    parser.add_argument("--effective-batch", type=int, default=8, help="units of an update of TRL's; ours come near it")
    parser.add_argument("--batch-size", type=int, default=1, help="our rows per update")
    parser.add_argument("--max-seq-len", type=int, default=0, help="tokens of ours; 0: what gives the effective batch")
    parser.add_argument(
        "--logits-chunk-size", type=int, default=128, help="scored tokens of ours whose logits exist at once"
    )
    return parser


def run(
    options: argparse.Namespace,
    objective: str,
    unit: str,
    settings: list[Setting],
    reference_units: int = 0,
) -> None:
    """Measures the settings that `--only` leaves, form by form, and reports; what is done, if interrupted."""
    jax.config.update("jax_platforms", "cpu")
    words = [word for word in options.only.split(",") if word]
    chosen = [
        setting
        for setting in settings
        if all(word in str(setting) for word in words)
        and (words or not setting.on_request)
        and (setting.dtype == "float32" or options.bfloat16_rounds)
    ]
    if not chosen:
        raise SystemExit(f"--only={options.only}: none of {', '.join(map(str, settings))}")
    results: list[dict] = []
    data: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            data |= _prepare(options, objective, Path(scratch), {setting.form for setting in chosen})
            for group in dict.fromkeys((setting.form, setting.dtype) for setting in chosen):
                members = [setting for setting in chosen if (setting.form, setting.dtype) == group]
                _group(options, objective, unit, members, reference_units, data[group[0]], Path(scratch), results)
        except KeyboardInterrupt:
            say("interrupted; this is what was measured")
    _print(results, data, unit)


def _prepare(options, objective: str, scratch: Path, forms: set[str]) -> dict[str, dict]:
    """Writes the model, which both sides load, and the data of each form."""
    _, tokenizer = write_model(options.model, scratch / "model")
    examples = pairs.usable(options.data, tokenizer, options.rows)
    data = {}
    for form in sorted(forms):
        recipe = pairs.make_recipe(objective, form == "backtracking", tokenizer)
        data[form] = pairs.write(scratch / f"{form}.json", TreeSource(examples, recipe, pairs.SEED))
    return data


def _group(options, objective, unit, settings: list[Setting], reference_units, data, scratch, results) -> None:
    """Settings of one form and dtype, one after the other, each in turns with ours."""
    form, dtype = settings[0].form, settings[0].dtype
    low = dtype == "bfloat16"
    rounds = options.bfloat16_rounds if low else options.rounds
    shared = dict(
        objective=objective,
        dtype=dtype,
        model=str(scratch / "model"),
        data=str(scratch / f"{form}.json"),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        reference_units=min(reference_units, BFLOAT16_REFERENCE) if low else reference_units,
        warm_up=max(1, options.warm_up),
        checked_units=CHECKED_EXAMPLES * data["units"] // data["examples"],
    )
    sizes = {
        name: getattr(options, name) for name in ("batch_size", "max_seq_len", "logits_chunk_size", "effective_batch")
    }
    workers: list[Worker] = []

    def start(name: str, module: str, own: dict) -> Worker:
        say(f"{name}: starting, reference pass, check, warm-up")
        workers.append(Worker(module, json.dumps(shared | own), log=scratch / f"{module}.log"))
        return workers[-1]

    our_name = f"{form} {dtype} {OUR_NAME}"
    try:
        ours = start(our_name, "benchmarks.our_worker", sizes)
        say(
            f"{our_name}: {ours.ready['batch_size']} x {ours.ready['max_seq_len']} tokens an update, "
            f"on average {ours.ready['units_per_update']:.2f} {unit}"
        )
        our_real = ours.ready["real_per_unit"]
        all_ours: list[dict] = []
        measured = []
        for setting in settings:
            theirs = start(str(setting), "benchmarks.trl_worker", dataclasses.asdict(setting))
            agreement = _compare(setting, objective, ours.ready["check"], theirs.ready["check"])
            our_turns, their_turns = [], []
            for number in range(rounds):
                for name, worker, turns, real in (
                    (setting, theirs, their_turns, data["sequence_tokens_per_unit"]),
                    (our_name, ours, our_turns, our_real),
                ):
                    turns.append(worker.ask(f"go {options.steps}"))
                    say(f"{name}: round {number + 1} of {rounds}, {_rate(turns[-1], real):.3f} {unit}/s")
            all_ours += our_turns
            numbers = _numbers(their_turns, data["sequence_tokens_per_unit"], theirs.ready["reference"])
            beside = _numbers(our_turns, our_real, ours.ready["reference"])
            peak = theirs.ask("stop")["peak_bytes"]
            measured.append(
                dict(name=str(setting), dtype=dtype, form=form, peak_bytes=peak, agreement=agreement, **numbers)
                | dict(units_per_update=setting.per_device * setting.accumulate, ours_beside=beside["overall"])
                | dict(attention=theirs.ready["attention"])
            )
            if setting.packing:  # of packed rows an update has as many units as they hold
                measured[-1]["units_per_update"] = (
                    statistics.mean(turn["units"] for turn in their_turns) / options.steps
                )
            results.append(measured[-1])
        results.append(
            dict(name=our_name, dtype=dtype, form=form, **_numbers(all_ours, our_real, ours.ready["reference"]))
            | {name: ours.ready[name] for name in ("units_per_update", "max_seq_len", "batch_size", "device")}
            | dict(of_products=_of_products(all_ours, ours.ready["product_flops"]))
            | ours.ask("stop")
        )
    finally:
        for worker in workers:
            worker.kill()


def _compare(setting: Setting, objective: str, ours: dict, theirs: dict) -> dict:
    """The largest differences between both sides on the same examples; ends the run where they are not the same."""
    found = {}
    if objective == "dpo":
        both = zip(ours["margins"], theirs["margins"], strict=True)
        found["margin"] = max(abs(mine - other) for mine, other in both)
    found["loss"] = abs(ours["loss"] - theirs["loss"])  # in DPO log 2: the model is its own reference so far
    found["gradient_norm"] = abs(ours["gradient_norm"] / theirs["gradient_norm"] - 1)
    if "packed_beside_alone" in theirs:
        found["packed_beside_alone"] = abs(theirs["packed_beside_alone"])
    text = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    say(f"{setting}: largest differences from ours: {text}")
    if setting.dtype == "float32" and max(found.values()) > TOLERANCE:
        raise SystemExit(f"{setting}: the two sides do not compute the same: {text}\nours {ours}\nTRL {theirs}")
    return found


def _rate(turn: dict, real_per_unit: float) -> float:
    return turn["real"] / turn["seconds"] / real_per_unit


def _of_products(turns: list[dict], product_flops: float) -> float:
    """What the model has to compute by its formulas (`models/flops.py`), over what large products reach meanwhile."""
    return statistics.median(turn["flops"] / turn["seconds"] for turn in turns) / product_flops


def _numbers(turns: list[dict], real_per_unit: float, reference: dict | None) -> dict:
    """What the rounds of one side come to."""
    step = statistics.median(_rate(turn, real_per_unit) for turn in turns)
    per_unit = reference["seconds_per_unit"] if reference else 0.0
    real, computed = (sum(turn[name] for turn in turns) for name in ("real", "computed"))
    return dict(
        step=step,
        reference=reference,
        overall=1 / (1 / step + per_unit),
        computed_per_unit=computed / real * real_per_unit,
        padding=1 - real / computed,
        turns=turns,
    )


# ------------------------------------------------------------------------------------------------------ report

COLUMNS: dict[str, Callable[[dict], str]] = {
    "setting": lambda row: row["name"],
    "UNIT/update": lambda row: f"{row['units_per_update']:.2f}",
    "step, UNIT/s": lambda row: f"{row['step']:.3f}",
    "reference, s": lambda row: f"{row['reference']['seconds_per_unit']:.3f}" if row["reference"] else "-",
    "overall, UNIT/s": lambda row: f"{row['overall']:.3f}",
    "tokens computed": lambda row: f"{row['computed_per_unit']:.0f}",
    "padding": lambda row: f"{100 * row['padding']:.1f} %",
    "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
    "of products": lambda row: f"{row['of_products']:.0%}" if "of_products" in row else "",
    "ours : it": lambda row: f"{row['ours_beside'] / row['overall']:.2f}" if "ours_beside" in row else "",
}


def _print(results: list[dict], data: dict[str, dict], unit: str) -> None:
    """The table, the ratios to the best of TRL's, and everything as one line of JSON."""
    table = [[title.replace("UNIT", unit) for title in COLUMNS]]
    table += [[show(row) for show in COLUMNS.values()] for row in results]
    print_table(table)
    print(f"reference and tokens are per {SINGULAR[unit]}; 'ours : it' compares overall, in the same rounds")
    for form, dtype in dict.fromkeys((row["form"], row["dtype"]) for row in results):
        theirs = [r for r in results if (r["form"], r["dtype"]) == (form, dtype) and "ours_beside" in r]
        if theirs:
            best = max(theirs, key=lambda row: row["overall"])
            ratio = best["ours_beside"] / best["overall"]
            print(f"{form}, {dtype}: {OUR_NAME} does {ratio:.2f} x the {unit} of TRL's best, {best['name']}")
    for form, numbers in data.items():
        print(
            f"{form}: {numbers['sequence_tokens_per_unit']:.0f} tokens per {SINGULAR[unit]} as sequences, "
            f"{numbers['tree_tokens_per_unit']:.0f} as trees"
        )
    for row in results:
        if "packed_beside_alone" in row.get("agreement", {}):
            apart = row["agreement"]["packed_beside_alone"]
            print(
                f"{row['name']}: packed sequences do not see each other ({row['attention']} attention, dense mask; "
                f"their loss is within {apart:.0e} of that of each alone)"
                if apart <= TOLERANCE
                else f"{row['name']}: packed sequences differ from the same ones alone by {apart:.1e}"
            )
        if row["reference"] and "again_computed" in row["reference"]:
            again = row["reference"]
            print(
                f"{row['name']}: a second reference pass computes {again['again_computed']} examples, "
                f"in {again['again_seconds']:.2f} s"
            )
    print(json.dumps(dict(data=data, results=results)))
