"""The former name of import_teacher.py: the same command."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    print("import_edm.py is import_teacher.py now", file=sys.stderr)
    runpy.run_path(str(Path(__file__).with_name("import_teacher.py")), run_name="__main__")
