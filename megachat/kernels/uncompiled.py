"""What torch.compile leaves alone. A run that does not compile need not import torch._dynamo, half a second."""

import contextlib
import sys

import torch

# torch.compiler.disable imports torch._dynamo where it decorates a function; torch's internal form of it, which its
# optimizers use, does so at the first call.
uncompiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def compiles_nothing() -> contextlib.AbstractContextManager:
    """Returns a context in which compiled functions run as they were before torch.compile."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
