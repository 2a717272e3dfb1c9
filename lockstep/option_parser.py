"""The parser of every command. It needs no other package, so that `lockstep doctor` can say which one is missing."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lockstep.errors import OptionError


class OptionParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are errors with four parts."""

    def error(self, message: str) -> NoReturn:
        subject, _, rest = message.partition(": ")
        remedy = f"See `{self.prog} --help`."
        if subject.startswith("argument "):
            flag, _, reason = message.removeprefix("argument ").partition(": ")
            remedy = "Give the value after the flag." if reason.startswith("expected") else remedy
            raise OptionError(flag, None, f"{reason}.", remedy)
        if subject == "unrecognized arguments":
            raise OptionError("command line", rest, "no option takes these words.", remedy)
        if subject == "the following arguments are required":
            raise OptionError(rest, None, "it is required.", remedy)
        raise OptionError(rest or "command line", None, f"{subject}.", remedy)
