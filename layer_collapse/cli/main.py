"""Parses arguments, runs a command, turns every foreseen failure into one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..graph import TraceError
from ..prune.rounds import CutError
from . import experiments, fetching, folding, models, paper, planning

EXIT_OK, EXIT_NOTHING, EXIT_BAD_INPUT, EXIT_CUT, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """\
examples:
  layer-collapse demo
  layer-collapse run --data fashion-mnist --model resmlp --strategy entropy --out runs/resmlp
  layer-collapse measure --weights runs/resmlp/state.safetensors
  layer-collapse fold --model mypackage.nets:build --weights net.safetensors \\
      --data calibration.safetensors --out folded.safetensors
  layer-collapse plan --params 7e9 --ranks 256
  layer-collapse bench-paper --suite all --quick
  layer-collapse doctor

exit codes:
  0    done
  1    done, but no layer could leave the network (fold)
  2    bad arguments or input; one sentence on stderr says what
  3    the network is cut: its output does not depend on its input
  130  interrupted; the same command goes on where it stopped (demo, run, bench-paper)
"""


class _Parser(argparse.ArgumentParser):
    """Refuses bad arguments in one line; its subcommands are of the same class."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main_parser = _Parser(
        prog="layer-collapse",
        description="Measure, prune and fold networks until whole layers leave them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main_parser.add_argument("--version", action="version", version=__version__)
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    experiments.add_commands(commands)
    models.add_commands(commands)
    fetching.add_commands(commands)
    folding.add_command(commands)
    planning.add_command(commands)
    paper.add_command(commands)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command to go on", EXIT_INTERRUPTED)
    except CutError as error:
        return _fail(str(error), EXIT_CUT)
    except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
        # TraceError is a RuntimeError; so is what the ops and the training loop refuse.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        return _fail(" ".join(str(text).split()) or type(error).__name__, EXIT_BAD_INPUT)


def _fail(sentence: str, code: int) -> int:
    print(f"layer-collapse: {sentence}", file=sys.stderr)
    return code


__all__ = ["TraceError", "main", "parser"]
