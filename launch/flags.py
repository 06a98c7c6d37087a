"""Flags from a dataclass: what a script can be told stands in one flat, typed block at its top.

@dataclass
class Settings:
    prompts: int = setting(96, "prompts a step, over all ranks", positive_int)

settings = settings_parser(Settings, __doc__).parse_args(argv)          # --prompts 96
"""

import argparse
import math
import re
from dataclasses import field, fields

from launch.version import versions

# ------------------------------------------------------------------------------- types that check


def whole_number(text: str, least: int) -> int:
    number = int(text)  # argparse says of a ValueError: invalid value
    if not least <= number < 2**62:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number from {least}")
    return number


def positive_int(text: str) -> int:
    return whole_number(text, 1)


def natural(text: str) -> int:
    return whole_number(text, 0)


def number(text: str, good, expected: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not good(value):
        raise argparse.ArgumentTypeError(f"found {text}, expected a number {expected}")
    return value


def positive(text: str) -> float:
    return number(text, lambda value: value > 0, "above 0")


def not_negative(text: str) -> float:
    return number(text, lambda value: value >= 0, "of at least 0")


def megabytes(text: str) -> float:
    return number(text, lambda value: value >= 0.01, "of at least 0.01")


def share(text: str) -> float:
    return number(text, lambda value: 0 <= value <= 1, "from 0 to 1")


def inner_share(text: str) -> float:
    return number(text, lambda value: 0 < value < 1, "between 0 and 1, neither of them")


def device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"found {text}, expected cpu, cuda or cuda:N")
    return text


# ------------------------------------------------------------------------------------------ flags


def setting(default, told: str, kind=str, **options):
    """A field of a settings class: the flag's default, what --help says, and the type (or a list of
    choices) that checks it. options: further ones of argparse's add_argument."""
    if isinstance(kind, list):
        options |= {"choices": kind}
    elif kind is bool:
        options |= {"action": argparse.BooleanOptionalAction}
    else:
        options |= {"type": kind}
    return field(default=default, metadata={"help": told, **options})


class Version(argparse.Action):
    """--version: asked for only then, as it asks git."""

    def __call__(self, parser: argparse.ArgumentParser, *_):
        print(versions())
        parser.exit()


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help: the script's docstring as it stands, and the default of every flag that takes a value
    and does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, "") or action.nargs == 0 or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def settings_parser(settings: type, description: str) -> argparse.ArgumentParser:
    """The parser of a dataclass of settings: its fields, in their order, are the flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=Help, allow_abbrev=False
    )
    told = "print the versions of this code, of Python and of its packages, and exit"
    parser.add_argument("--version", action=Version, nargs=0, default=argparse.SUPPRESS, help=told)
    for each in fields(settings):
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, default=each.default, **each.metadata)
    return parser


def refuse_idle(parser: argparse.ArgumentParser, argv: list[str], has_effect: dict, why: str):
    """An error if a flag is given that would change nothing; has_effect: {flag: bool}."""
    names = {token.partition("=")[0] for token in argv if token.startswith("--")}
    given = {name.replace("--no-", "--", 1) for name in names}  # --no-x as --x
    idle = sorted(name for name in given if not has_effect.get(name, True))
    if idle:
        parser.error(f"{', '.join(idle)} would change nothing {why}. Leave it out.")
