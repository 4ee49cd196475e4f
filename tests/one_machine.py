"""One of several machines, as far as a process can play it: runs a stage as the `trivet` command does.

python one_machine.py STAGE CONFIG [key=value ...]
"""

from __future__ import annotations

import sys

from pipeline.config_file import load_config
from pipeline.errors import TrivetError
from stages.launch import ensure_stage

if __name__ == "__main__":
    loaded = load_config(sys.argv[2], sys.argv[3:])
    try:
        ensure_stage(sys.argv[1], loaded, force=False, on_line=print, on_progress=lambda _: None)  # type: ignore[arg-type]
    except TrivetError as error:
        sys.exit(str(error))
