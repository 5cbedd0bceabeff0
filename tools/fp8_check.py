"""`megachat fp8-check` in a clone: does FP8 pay for a config?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.commands.main import door  # noqa: E402

main = door("fp8-check")

if __name__ == "__main__":
    main()
