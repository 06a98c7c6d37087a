"""What the flags of all commands share."""

import argparse


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A command's --help: its docstring as it stands, and the default of every flag that takes a value and does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = (
            action.default is None
            or action.default == ""
            or action.nargs == 0
            or "default" in action.help
        )
        return action.help if told else super()._get_help_string(action)
