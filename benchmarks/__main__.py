"""Run every benchmark, one after the other, in a few minutes: `python -m benchmarks [--device cuda]`."""

import subprocess
import sys

SCRIPTS = {
    "fisher": ["--rounds", "3", "--threads", "1"],
    "step": ["--rounds", "5", "--threads", "1"],
    "masks": ["--rounds", "5"],
    "deltas": ["--rounds", "5"],
    "reduction": ["--rounds", "5"],
}


def main() -> None:
    """Run them; each writes its table to benchmarks/results/."""
    for name, arguments in SCRIPTS.items():
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
