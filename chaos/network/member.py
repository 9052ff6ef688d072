"""A member of a fleet: `python member.py SCRIPT` calls SCRIPT's main(place) and prints its result as JSON.

The place comes as JSON on standard input. Whatever the script prints goes to standard error, so that standard output
holds the result alone. Runs as a script, without this package.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def run(argv: list[str]) -> int:
    """Run the script; its exceptions end the process with a traceback."""
    place = json.load(sys.stdin)
    result_fd = os.dup(1)
    os.dup2(2, 1)
    sys.path[0] = str(
        Path(argv[1]).parent
    )  # as if the script itself had been started; this folder is not for it to see
    script = runpy.run_path(argv[1], run_name="fleet_member")
    text = json.dumps(script["main"](place))
    with os.fdopen(result_fd, "w", encoding="utf-8") as results:
        results.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv))
