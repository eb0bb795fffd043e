"""How much slower matrix products in bf16 and fp16 are than in fp32 on this machine, or how much faster.

    OMP_NUM_THREADS=1 python benchmarks/dtypes.py

The products of a linear layer of the demo's model (D = 576, O = 1536) and of a wider one: forward, and the gradient of
the input. On a CPU without instructions for 16 bits torch computes these in a plain loop.
"""

from __future__ import annotations

import argparse

import torch
from machine import DEVICE, setting
from timing import seconds

from dsmoelora.config import DTYPES

SIZES = ((576, 1536), (1536, 576), (2048, 2048))


def main() -> None:
    """Print a line for each size and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(setting("fp32"))
    for size_in, size_out in SIZES:
        milliseconds = {}
        for name, dtype in DTYPES.items():
            weight_OD = torch.randn(size_out, size_in, device=DEVICE, dtype=dtype)
            x_TD = torch.randn(args.tokens, size_in, device=DEVICE, dtype=dtype)
            grad_TO = torch.randn(args.tokens, size_out, device=DEVICE, dtype=dtype)
            products = {
                "forward": lambda x=x_TD, w=weight_OD: x @ w.t(),
                "input gradient": lambda g=grad_TO, w=weight_OD: g @ w,
            }
            for what, product in products.items():
                milliseconds[name, what] = 1e3 * min(seconds(product) for _ in range(args.rounds))
        for (name, what), taken in milliseconds.items():
            ratio = taken / milliseconds["fp32", what]
            print(f"{args.tokens} x {size_in} x {size_out} {what:14s} {name}: {taken:8.1f} ms, {ratio:6.2f}x fp32's")


if __name__ == "__main__":
    main()
