"""Fold two adapters with weights, and look at one merged tensor before anything is written.

python examples/several_adapters.py BASE ADAPTER_A ADAPTER_B OUT
"""

import sys

import adapterkit


def main(base: str, first: str, second: str, out: str) -> None:
    checkpoint = adapterkit.open(base)
    adapters = [adapterkit.load_adapter(first), adapterkit.load_adapter(second)]

    folded = adapterkit.fold(checkpoint, adapters, weights=[0.7, 0.3])
    name = folded.touched[0]
    values = folded.checkpoint[name].read(0, 8)  # computed here, on demand
    print(name, values.tolist())

    adapterkit.merge(checkpoint, adapters, out, weights=[0.7, 0.3], dtype="bf16")


if __name__ == "__main__":
    main(*sys.argv[1:])
