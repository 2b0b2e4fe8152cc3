"""What Triton kernels of products have in common.

Shapes: F output, K entries at a time.
"""

import triton
import triton.language as tl


@triton.jit
def folded(x_k, w_kf, WAVE: tl.constexpr):
    """Products, those that one thread has of one feature summed: fewer sums to keep leaves room for more reads."""
    K: tl.constexpr = w_kf.shape[0]
    F: tl.constexpr = w_kf.shape[1]
    return tl.sum(tl.reshape(x_k[:, None] * w_kf.to(tl.float32), [K // WAVE, WAVE, F]), 0)


@triton.jit
def gate(gate_f, up_f):
    """`silu(gate) * up`."""
    return gate_f / (1.0 + tl.exp(-gate_f)) * up_f


@triton.jit
def finish(y, bias, addend, out, where, features, real):
    """Adds a bias and what else is to be added, where there are any, and stores. Returns it as it is stored."""
    if bias is not None:
        y += tl.load(bias + features, mask=real, other=0.0).to(tl.float32)
    if addend is not None:
        y += tl.load(addend + where, mask=real, other=0.0).to(tl.float32)
    rounded = y.to(out.dtype.element_ty)
    tl.store(out + where, rounded, mask=real)
    return rounded
