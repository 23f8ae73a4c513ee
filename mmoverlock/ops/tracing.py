"""What depends on who is calling."""

import torch


def is_compiling() -> bool:
    """Whether torch.compile or torch.export trace the call.

    Versions of torch before 2.3 cannot tell; there, it is whether
    torch.jit.trace does.
    """
    return getattr(torch.compiler, 'is_compiling', torch.jit.is_tracing)()
