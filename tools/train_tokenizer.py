"""`megachat tokenizer` in a clone: trains a tokenizer, or imports nanochat's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.commands.main import door  # noqa: E402

main = door("tokenizer")

if __name__ == "__main__":
    main()
