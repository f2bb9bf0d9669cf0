"""Settings of a recipe: one dataclass for each section, from which all that is said or asked of a field is made.

A section's class stands beside the code that it configures. Its fields have a type, a default, bounds, a unit and a
sentence. From these come the `ConfigDict` that `--config` loads, the check before anything is loaded, the check of
`--config.section.field=value`, the table of docs/RECIPES.md, and which fields a resumed run may not change.
"""

import ast
import dataclasses
import difflib
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.utils.unicode import is_unicode

MOST_WHOLE = 2**31 - 1  # what is counted on a device is int32
_MOST_NUMBER = 1e38  # float32 holds it
SECTIONS: dict[str, type] = {}  # by name; "" is the recipe itself


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a section.

    kind:     its type: bool, int, float, str, or a tuple of one of these
    meaning:  a sentence
    unit:     of a number
    least, above, most, below: bounds; of a list, of its entries
    choices:  of a text that names one of several things
    decisive: it changes what is trained, so a run that was begun is not gone on with under another value
    problem:  names what a value must be that it is not, or gives None; for what bounds and choices cannot say
    in_loop:  of sampling alone, how the compiled loop takes it (`sampling/settings.py`)
    """

    name: str
    kind: type
    default: object
    meaning: str
    unit: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    decisive: bool = False
    problem: Callable[[typing.Any], str | None] = lambda value: None
    in_loop: str = ""
    shown_default: object = None

    @property
    def short_name(self) -> str:
        """The name within its section."""
        return self.name.rpartition(".")[2]

    @property
    def entry(self) -> type | None:
        """The type of a list's entries; None of what is no list."""
        return typing.get_args(self.kind)[0] if typing.get_origin(self.kind) is tuple else None

    @property
    def documented_default(self) -> object:
        """The default as the documents have it, where it depends on what is installed."""
        return self.default if self.shown_default is None else self.shown_default

    def check(self, value: object) -> None:
        """Raises InputError where the field cannot have this value."""
        if problem := self._wrong(value):
            raise InputError(f"{self.name} is {_shown(value)}; it must be {problem}")
        if self.choices and value not in self.choices:
            raise InputError(f"{self.name} is {_shown(value)}: {nearest(value, self.choices)}")
        if problem := self.problem(value):
            raise InputError(f"{self.name} is {_shown(value)}; {problem}")

    def parse(self, text: str) -> object:
        """Returns the value that a text of the command line means. Raises InputError where it means none."""
        if self.kind is str:
            self.check(text)
            return text
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text).strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text
        if self.entry and not isinstance(value, (tuple, list)):
            value = (value,)
        self.check(value)
        return value

    def _wrong(self, value: object) -> str | None:
        if not self.entry:
            return _wrong(self.kind, value, self)
        if isinstance(value, (list, tuple)) and not any(_wrong(self.entry, entry, self) for entry in value):
            return None
        bound = "" if self.above is None else f" above {self.above:g}"
        return f"a list of {_PLURAL[self.entry]}{bound}, such as {_EXAMPLES[self.entry]}"


_PLURAL = {str: "texts", int: "whole numbers", float: "finite numbers"}
_EXAMPLES = {str: "('one', 'two')", int: "(5, 10)", float: "(-2.0, 0.0)"}


def field(default, meaning: str, **facts) -> typing.Any:
    """Declares a field of a section's class, by what `Setting` says of it."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, **facts})


def section(name: str, *, decisive: bool = False) -> Callable[[type], type]:
    """Makes a class a section of this name. `decisive` is what its fields are that do not say it themselves."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        kinds = typing.get_type_hints(cls)
        cls.settings = tuple(
            Setting(
                f"{name}.{declared.name}".lstrip("."),
                kinds[declared.name],
                declared.default,
                **({"decisive": decisive} | dict(declared.metadata)),
            )
            for declared in dataclasses.fields(cls)
        )
        SECTIONS[name] = cls
        return cls

    return register


def settings() -> dict[str, Setting]:
    """Returns all fields of all sections, by their full names."""
    return {setting.name: setting for cls in SECTIONS.values() for setting in cls.settings}


def default_recipe() -> ConfigDict:
    """Returns a recipe with every field at its default."""
    config = ConfigDict()
    for name, setting in settings().items():
        *sections, last = name.split(".")
        inner = config
        for name_of_section in sections:
            if name_of_section not in inner:
                inner[name_of_section] = ConfigDict()
            inner = inner[name_of_section]
        inner[last] = setting.default
    return config


def check(config: ConfigDict) -> None:
    """Raises InputError naming the first field that cannot be meant, with its value and what it may be."""
    fields, known = flatten_dict(config.to_dict(), sep="."), settings()
    if unknown := sorted(fields.keys() - known.keys()):
        raise no_such_field(unknown[0])
    if missing := sorted(known.keys() - fields.keys()):
        raise InputError(f"{missing[0]}: the recipe has no such field; begin it with base.get_config(), which has all")
    for name in sorted(fields):
        known[name].check(fields[name])


def check_recipe(config: ConfigDict) -> None:
    """Raises InputError where `check` does; of a recipe with stages, `order` names them and each is a recipe."""
    if "stages" not in config:
        return check(config)
    order, stages = config.get("order"), config.stages
    if not isinstance(stages, ConfigDict) or not isinstance(order, (list, tuple)) or not order:
        raise InputError("a recipe with stages has `stages`, recipes by name, and `order`, a list of their names")
    for name in order:
        if not isinstance(name, str) or not isinstance(stages.get(name), ConfigDict):
            raise InputError(f"order names the stage {_shown(name)}: {nearest(str(name), stages)}")
        try:
            check(stages[name])
        except InputError as error:
            raise InputError(f"stages.{name}.{error}") from None


def no_such_field(name: str, known: typing.Iterable[str] | None = None) -> InputError:
    """Returns the error for a field of this name, which no recipe has, with the nearest one that there is."""
    known = list(settings() if known is None else known)
    if inside := sorted(candidate for candidate in known if candidate.startswith(f"{name}.")):
        return InputError(f"{name}: a section, no field; its fields are {', '.join(inside)}")
    section, _, last = name.rpartition(".")
    beside = [candidate for candidate in known if candidate.rpartition(".")[0] == section]
    elsewhere = [candidate for candidate in known if f".{candidate}".endswith((f".{name}", f".{last}"))]
    elsewhere.sort(key=lambda candidate: not candidate.endswith(name))  # with its section first
    if meant := _nearest_field(last, beside) or next(iter(elsewhere), None) or _nearest_field(name, known):
        return InputError(f"{name}: no such field; did you mean {meant}?")
    if section and beside:
        return InputError(f"{name}: no such field; the fields of {section} are {', '.join(sorted(beside))}")
    sections = sorted({candidate.partition(".")[0] for candidate in known})
    return InputError(f"{name}: no such field; a recipe has {', '.join(sections)}")


def _nearest_field(wrong: str, fields: list[str]) -> str | None:
    """Returns the field whose last name is the most alike, or has these initials, as "lr" of "learning_rate"."""
    names = {field.rpartition(".")[2]: field for field in fields}
    initials = {"".join(part[:1] for part in name.split("_")): name for name in names}
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return names.get(close[0] if close else initials.get(wrong))


def decisive_differences(ours: Mapping, theirs: Mapping, also: tuple[str, ...] = ()) -> list[str]:
    """Names of decisive fields, and of those in sections `also`, in which two recipes differ."""
    ours, theirs, known = flatten_dict(dict(ours), sep="."), flatten_dict(dict(theirs), sep="."), settings()
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if (name.partition(".")[0] in also or name not in known or known[name].decisive)
        and _comparable(ours.get(name)) != _comparable(theirs.get(name))
    )


def table(names: Iterator[str]) -> str:
    """Returns a table of sections in Markdown, a line for each field."""
    lines = ["| field | type | unit | default | meaning |", "|---|---|---|---|---|"]
    for name in names:
        for setting in SECTIONS[name].settings:
            kind = "list" if setting.entry else _KINDS[setting.kind]
            default = f"`{_quoted(setting.documented_default)}`"
            lines.append(f"| `{setting.name}` | {kind} | {setting.unit} | {default} | {setting.meaning} |")
    return "\n".join(lines) + "\n"


_KINDS = {int: "whole number", float: "number", str: "text", bool: "flag"}


def _quoted(value: object) -> str:
    if isinstance(value, tuple):
        entries = ", ".join(map(_quoted, value))
        return f"({entries},)" if len(value) == 1 else f"({entries})"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _wrong(kind: type, value: object, setting: Setting) -> str | None:
    """Returns what a value of this kind must be that it is not, or None."""
    if kind is bool:
        return None if isinstance(value, bool) else "True or False"
    if kind is str:
        return None if _is_text(value) else "a text"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return "a whole number" if kind is int else "a finite number"
    if kind is float and not -_MOST_NUMBER <= value <= _MOST_NUMBER:
        return "a finite number"
    if setting.above is not None and value <= setting.above:
        return f"above {setting.above:g}"
    if setting.least is not None and value < setting.least:
        return f"at least {setting.least:g}"
    most = setting.most if setting.most is not None or kind is not int else MOST_WHOLE
    if most is not None and value > most:
        return f"at most {most}"
    return f"below {setting.below:g}" if setting.below is not None and value >= setting.below else None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_unicode(value) and "\0" not in value


def _comparable(value: object) -> object:
    """Returns a value as JSON gives it back, so that a recipe that was read back equals itself."""
    return list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if isinstance(value, float) or (whole and abs(value) < 10**20) else reprlib.repr(value)
