"""Runs the claims of the slides, prints the table of what was found, and makes the pictures."""

import os
import re
import sys
from time import perf_counter

from tqdm import tqdm

from engine.threads import thread_pool
from lab.claims import picture_of, sentence, title

COLOUR = re.compile(r"\033\[[0-9;]*m")


def run(slides, chosen=None, seed=0):
    """Measures the claims of all slides, or of one, with all of its numbers then. Returns {claim: Finding}."""
    claims = [claim for name in slides if chosen in (None, name) for claim in slides[name].claims]
    found, seconds = {}, {}
    with thread_pool(1) as pool, tqdm(claims, disable=None, leave=False) as bar:
        for claim in bar:
            bar.set_description(title(claim)[:40])
            began = perf_counter()
            # in a thread of a pool, where small products are not shared out: so times can be compared
            found[claim] = pool.submit(claim, seed).result()
            seconds[claim] = perf_counter() - began
            if callable(found[claim].picture):
                found[claim].picture(picture_of(claim, found[claim]))
    for name, slide in slides.items():
        if chosen in (None, name):
            print(f"\n{slide.title}: {slide.files}")
            for claim in slide.claims:
                report(claim, found[claim], seconds[claim], chosen)
    held = [finding.holds for finding in found.values()]
    missing = f", {held.count(None)} not measured here" if None in held else ""
    print(f"\n{held.count(True)} claims hold, {held.count(False)} do not{missing}; pictures: figures/")
    return found


def report(claim, finding, seconds, chosen):
    verdict = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[finding.holds]
    print(f"  {title(claim):45} {verdict:13} {finding.says}")
    if chosen:
        terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"    {sentence(claim)} ({seconds:.1f} s)")
        for line in finding.lines:
            print("      " + (line if terminal else COLOUR.sub("", line)))
        if (path := picture_of(claim, finding)) and os.path.exists(path):
            print(f"      figures/{os.path.basename(path)}")
