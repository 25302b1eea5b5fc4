"""What the options of several commands have in common."""

from __future__ import annotations

import argparse


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace the file's")


def count(text: str) -> int:
    """An option's value."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return int(text)


def positive(text: str) -> int:
    """An option's value."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)
