"""Polar Express: the orthogonal factor of a matrix in five steps of matrix multiplications (arXiv 2505.16932)."""

from collections.abc import Sequence

import torch

# Optimal quintics for five steps, safety factor 2e-2, cushion 2 (arXiv 2505.16932, algorithm 1).
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The Gram matrix of a long float32 matrix is formed anew before each of these groups of steps, and updated within them.
# Longer groups take less time, but small singular values lose digits.
_GRAM_STEPS = COEFFICIENTS[:1], COEFFICIENTS[1:3], COEFFICIENTS[3:]
_LONG = 2  # the ratio of the sides from which a matrix is long


def polar_express(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` [m, n] (bfloat16 or float32) with its singular values replaced by values near 1; same dtype, same
    singular vectors.

    The Gram matrix is formed on the smaller side. It takes no batch: libraries may choose other kernels for a batch,
    with other bits than for its matrices one by one. optim.matrix.polar_products counts the products.
    """
    # 1.01 keeps the largest singular value, with its rounding, inside the interval for which the first quintic was
    # computed
    x = x / (x.norm() * 1.01 + 1e-6)
    tall = x.size(0) > x.size(1)
    if x.dtype == torch.float32 and max(x.shape) >= _LONG * min(x.shape):
        for steps in _GRAM_STEPS:
            factor = _gram_factor(x.mT @ x if tall else x @ x.mT, steps)
            x = x @ factor.mT if tall else factor @ x
        return x
    for a, b, c in COEFFICIENTS:
        gram = x.mT @ x if tall else x @ x.mT
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, x, factor, beta=a) if tall else torch.addmm(x, factor, x, beta=a)
    return x


def _gram_factor(gram: torch.Tensor, steps: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    """Returns the product [n, n] of the factors of some steps for a matrix whose Gram matrix is `gram` [n, n]."""
    factor = product = _factor(gram, *steps[0])
    for step in steps[1:]:
        gram = factor @ gram @ factor
        factor = _factor(gram, *step)
        product = factor @ product
    return product


def _factor(gram: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
