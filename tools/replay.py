"""`megachat replay` in a clone: which module, rows and documents made a loss or gradient not finite?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.commands.main import door  # noqa: E402

main = door("replay")

if __name__ == "__main__":
    main()
