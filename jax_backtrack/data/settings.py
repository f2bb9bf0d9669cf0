"""Settings of a recipe's data: where it is, how it is read, and what of it is trained on."""

import dataclasses

from jax_backtrack.data.formats import NAMES as FORMATS
from jax_backtrack.utils.settings import field, section


def _length_problem(tokens: int) -> str | None:
    return "a reply has at least a token and its end: 0 for all, or 2 and more" if tokens == 1 else None


@section("data", decisive=True)
class DataSettings:
    """Preferences that are trained on."""

    path: str = field(
        "",
        "Safety pairs, whose rejected replies are unsafe: a file, a pattern of files, a folder, a Hub id (owner/name "
        'or owner/name:folder), or `"testbed"`; commas part several ([DATA.md](DATA.md)).',
    )
    utility_path: str = field("", "Utility data, the same kinds of path; nothing of it is taken back.")
    utility_epochs: int = field(1, "Passes over utility data for each one over safety data.", unit="passes", least=1)
    split: str = field("train", "Split of a Hub data set, of a folder with several splits, or of the testbed.")
    config_name: str = field("", "Configuration of a Hub data set, or of its clone, that has several.")
    format: str = field(
        "",
        'Name of a format, such as `"preference"` or `"hh"` ([DATA.md](DATA.md#formats)); `""`: the columns tell it.',
        choices=("", *FORMATS),
    )
    limit: int = field(0, "Rows used of each path; 0 for all (of the testbed 1,000).", unit="rows", least=0)
    backtrack: bool = field(True, "False trains the baseline: plain SFT or plain DPO, without drafts and resets.")
    max_response_length: int = field(
        0,
        "Tokens of a reply that are used, its end of turn among them; 0 for all. A reply that is cut has no end "
        "of turn.",
        unit="tokens",
        least=0,
        problem=_length_problem,
    )
    exclude: tuple[str, ...] = field((), "Prompt sets, as of `evaluate.harmful`, whose prompts are never trained on.")
    held_out_fraction: float = field(
        0.0,
        "Share of the prompts, drawn by a hash of their text, that are never trained on. `--mode=evaluate` of prompt "
        "sets measures the perplexity of the replies preferred there.",
        unit="share",
        least=0,
        below=1,
    )
    seed: int = field(0, "Seed of shuffling and of the lengths of drafts.", least=0)


def _column(name: str):
    return field("", f'Column that the file has for `{name}`; `""`: the same name.')


@section("data.columns", decisive=True)
class ColumnSettings:
    """The file's names of columns, by the names that they have in the formats."""

    prompt: str = _column("prompt")
    chosen: str = _column("chosen")
    rejected: str = _column("rejected")
    completion: str = _column("completion")
    messages: str = _column("messages")
    system: str = _column("system")
    label: str = _column("label")


COLUMNS = tuple(each.name for each in dataclasses.fields(ColumnSettings))
