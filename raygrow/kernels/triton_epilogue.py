"""What Triton kernels do with a product before they store it.

Shapes: F output.
"""

import triton
import triton.language as tl


@triton.jit
def gate(gate_f, up_f):
    """`silu(gate) * up`."""
    return gate_f / (1.0 + tl.exp(-gate_f)) * up_f


@triton.jit
def finish(y, bias, addend, out, where, features, real):
    """Adds a bias and what else is to be added, where there are any, and stores."""
    if bias is not None:
        y += tl.load(bias + features, mask=real, other=0.0).to(tl.float32)
    if addend is not None:
        y += tl.load(addend + where, mask=real, other=0.0).to(tl.float32)
    tl.store(out + where, y.to(out.dtype.element_ty), mask=real)
