"""Write the counts of a run as Markdown."""

from __future__ import annotations

import platform
from pathlib import Path

import peft
import torch
import transformers

from .campaign import Campaign
from .verdict import OUTCOMES


def of(campaign: Campaign, minutes: float, last_seed: int) -> str:
    """Return the counts by kind of trial, and each finding with the number of trials that it explains."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    lines = [
        f"{minutes:.0f} minutes, seeds up to {last_seed}; Python {platform.python_version()}, {versions}.",
        "",
        f"| kind | trials | {' | '.join(OUTCOMES)} |",
        "|---|" + "---:|" * (len(OUTCOMES) + 1),
    ]
    for kind, counts in campaign.counts.items():
        cells = " | ".join(f"{counts[outcome]:,}" for outcome in OUTCOMES)
        lines.append(f"| {kind} | {sum(counts.values()):,} | {cells} |")
    lines += ["", "| finding | trials | smallest |", "|---|---:|---|"]
    for finding in campaign.findings:
        detail = " ".join(finding.verdict.detail.split()).replace("|", "/")[:160]
        lines.append(f"| {finding.verdict.outcome} {finding.name} | {campaign.by_finding[finding.name]} | {detail} |")
    return "\n".join(lines)


def write(path: Path, title: str, text: str) -> None:
    """Put the text under a title of the page, in the place of what stands there."""
    page = path.read_text(encoding="utf-8") if path.exists() else "# What the fuzzer found\n"
    head, _, rest = page.partition(f"## {title}\n")
    _, _, after = rest.partition("\n## ")
    after = f"\n## {after}" if after else ""
    path.write_text(f"{head.rstrip()}\n\n## {title}\n\n{text}\n{after}", encoding="utf-8")
