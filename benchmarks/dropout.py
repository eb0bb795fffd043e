"""Dropout whose mask belongs to a token, as it stands and compiled, beside torch's own and a frozen product.

    python benchmarks/dropout.py

One run compares everything in turn, forward and backward, and prints medians of ratios.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from machine import DEVICE, DTYPE, setting
from timing import seconds
from torch import nn

from dsmoelora.adapters.keyed.draws import keyed_dropout, settle_dropout

PROBABILITY, LAYER_KEY = 0.05, 1


def main() -> None:
    """Parse the sizes, print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="features")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(setting())
    x_TD = torch.randn(args.tokens, args.size, device=DEVICE, dtype=DTYPE, requires_grad=True)
    keys_T = torch.arange(args.tokens, dtype=torch.int32, device=DEVICE)
    grad_TD = torch.randn_like(x_TD)
    base = nn.Linear(args.size, args.size, bias=False).to(DEVICE, DTYPE).requires_grad_(False)

    def pass_of(work: object, choice: str = "off") -> float:
        settle_dropout(choice, PROBABILITY, DEVICE, DTYPE)  # type: ignore[arg-type]

        def step() -> None:
            work(x_TD).backward(grad_TD)

        step()
        return seconds(step)

    keyed = partial(keyed_dropout, keys_T=keys_T, layer_key=LAYER_KEY, probability=PROBABILITY)
    rounds = [
        {
            "eager": pass_of(keyed),
            "compiled": pass_of(keyed, "on"),
            "torch": pass_of(lambda x_TD: nn.functional.dropout(x_TD, PROBABILITY)),
            "product": pass_of(base),
        }
        for _ in range(args.rounds)
    ]
    print(f"{args.tokens} tokens of {args.size} features, forward and backward; {args.rounds} rounds")
    for top, bottom in (("compiled", "eager"), ("compiled", "torch"), ("eager", "product"), ("compiled", "product")):
        print(f"{top} / {bottom}: {statistics.median(one[top] / one[bottom] for one in rounds):.2f}")


if __name__ == "__main__":
    main()
