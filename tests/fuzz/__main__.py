"""Run the fuzzer: `python -m tests.fuzz --minutes 60`, or `--seed 5` for one seed. See README.md."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch

from tests.fuzz import kinds, table
from tests.fuzz.campaign import EXAMPLES, Campaign, Finding
from tests.fuzz.findings import known_findings

RESULTS = Path(__file__).with_name("results.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(kinds.KINDS), help=f"of {', '.join(kinds.KINDS)}")
    parser.add_argument("--minutes", type=float, default=10, help="how long; seeds follow one another meanwhile")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--first-seed", type=int, default=1, help="where to begin")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="how many trials a seed stands for")
    parser.add_argument("--from-scratch", action="store_true", help="report what is known, too")
    parser.add_argument("--write", metavar="TITLE", help="put the counts under this title into results.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(kinds.KINDS):
        parser.error(f"there is no kind {sorted(unknown)[0]!r}; there are {', '.join(kinds.KINDS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seeds = [arguments.seed] if arguments.seed is not None else range(arguments.first_seed, 10**6)
    began, limit = time.monotonic(), 60 * arguments.minutes
    known = [] if arguments.from_scratch else known_findings()
    campaign = Campaign(list(known), None if arguments.seed is not None else began + limit, show)
    for seed in seeds:
        for kind in arguments.kinds:
            if campaign.is_over():
                break
            campaign.run(kind, kinds.KINDS[kind](), seed, arguments.examples)
        if campaign.is_over():
            break
    minutes = (time.monotonic() - began) / 60
    print(table.of(campaign, minutes, seed))
    if arguments.write:
        table.write(RESULTS, arguments.write, table.of(campaign, minutes, seed))
    raise SystemExit(len(campaign.findings) > len(known))


def show(finding: Finding) -> None:
    """Print a finding with the script that shows it."""
    print(f"--- {finding.verdict.outcome} {finding.name} (seed {finding.seed})", flush=True)
    print(f"{finding.verdict.detail}\n\n{kinds.script(finding.kind, finding.trial)}", flush=True)


if __name__ == "__main__":
    main()
