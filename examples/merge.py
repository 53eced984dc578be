"""Fold an adapter into a base from Python: plan first, then do it.

python examples/merge.py BASE ADAPTER OUT
"""

import sys

import adapterkit


def main(base: str, adapter: str, out: str) -> None:
    planned = adapterkit.plan_merge(base, [adapter])
    for note in planned.notes:
        print("note:", note)
    print(f"{len(planned.folded.touched)} tensors will change; {planned.plan.nbytes / 1e9:.2f} GB will be written")

    report = adapterkit.merge(base, [adapter], out)
    print(f"{report.out}: {report.touched} changed, {report.copied} copied, {report.seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
