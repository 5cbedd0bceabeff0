"""Does a layout compute what one process computes? `python tools/verify.py --config configs/d4_cpu.json --depth 2
--layout tp=2,pp=2,dp=2`

With --resume: does a run that is saved, ended, loaded and continued equal one that never stopped? See
megachat/programs/verify.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.programs import verify  # noqa: E402

if __name__ == "__main__":
    user_errors_end_the_program(verify.main)()
