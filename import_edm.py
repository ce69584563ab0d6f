"""The old name of import_teacher.py. It runs the same command."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    print("import_edm.py is now import_teacher.py", file=sys.stderr)
    runpy.run_path(str(Path(__file__).with_name("import_teacher.py")), run_name="__main__")
