"""Runs the compiled program and says where it found itself."""

import os
import sys

from report import lines


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "world"
    for line in lines(name, os.environ.get("DEMO_VERSION", "unknown")):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
