"""Progress of long work outside the training loops."""

import sys
import time

from tqdm import tqdm

from support.processes import is_main

REPORT_AFTER, REPORT_SECONDS = 5, 30  # seconds before the first line, and between the next


def progress(numbers, what, unit):
    """Yields the `numbers`, a range, and reports the time left if it takes more than seconds; on a terminal with a bar.

    what: a description of the work; unit: what `numbers` count.
    """
    start = time.monotonic()
    due = start + REPORT_AFTER
    silent = None if is_main() else True  # None: tqdm is silent without a terminal
    with tqdm(total=numbers.stop, initial=numbers.start, unit=unit, disable=silent, delay=REPORT_AFTER) as bar:
        for turn, number in enumerate(numbers, 1):
            yield number
            done = min(number + numbers.step, numbers.stop)
            bar.update(done - number)
            now = time.monotonic()
            if now > due:
                left = (now - start) / turn * (len(numbers) - turn) / 60
                bar.write(f"{what}: {unit} {done} of {numbers.stop}, about {left:.1f} minutes left", file=sys.stdout)
                sys.stdout.flush()
                due = now + REPORT_SECONDS if bar.disable else float("inf")  # a bar tells the rest
