"""`make demo`: tune the starter model on the shipped rows, score it, print where the report lies.

The same verbs a user types. A broken-off demo goes on where it stopped; a finished one is only scored again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN = ROOT / "runs" / "demo"


def weitiao(*arguments: str) -> None:
    """Run one verb, showing the command; leave with its exit code when it fails."""
    print(f"\n$ weitiao {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "weitiao", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    """Check, train, evaluate."""
    started = time.monotonic()
    recipe = str(HERE.relative_to(ROOT) / "recipe.yaml")
    weitiao("check", recipe)
    if (RUN / "contract.json").exists():
        print(f"\n{RUN} is trained already; delete it to train again.", flush=True)
    else:
        weitiao("train", recipe, *(["--resume"] if (RUN / "recipe.yaml").exists() else []))
    weitiao("evaluate", "runs/demo")
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"Open {RUN / 'evaluations' / 'dev' / 'report.html'} in a browser.")


if __name__ == "__main__":
    main()
