"""A page that runs an exported generator in a browser: `page.html`, the facts that it needs, and onnxruntime-web."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from support.script import UserError, writing

VERSION = "1.30.0"  # of onnxruntime-web
RUNTIME = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"  # what the page needs of its package's dist/
TEMPLATE = Path(__file__).with_name("page.html")
PUBLIC = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"


def files(folder):
    """The paths in `folder` that `write` may write."""
    return [Path(folder, name) for name in ("index.html", "generator.json", *RUNTIME)]


def find_runtime(folder=None):
    """The files of onnxruntime-web, a dict of name to content: from `folder`, or fetched by npm; None if npm fails.

    folder: npm's package, unpacked, or its dist/. Raises UserError if the folder holds no onnxruntime-web.
    """
    if folder:
        for place in (Path(folder), Path(folder, "dist")):
            if all((place / name).is_file() for name in RUNTIME):
                return {name: (place / name).read_bytes() for name in RUNTIME}
        needs = " and ".join(RUNTIME)
        raise UserError(f"--ort {folder}: needs {needs}, as npm's package onnxruntime-web has them in dist/")
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", f"onnxruntime-web@{VERSION}"]
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=300)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                return {name: archive.extractfile(f"package/dist/{name}").read() for name in RUNTIME}
        except (OSError, subprocess.SubprocessError, StopIteration, tarfile.TarError, KeyError):
            return None


def write(folder, facts, runtime):
    """Writes the page of `folder`/generator.onnx: index.html, the `facts` as generator.json, and the runtime.

    runtime: from `find_runtime`; if it is None, the page loads it from its public URL.
    """
    folder = Path(folder)
    with writing(folder):
        for name, content in (runtime or {}).items():
            (folder / name).write_bytes(content)
        facts = {**facts, "runtime": "./" if runtime else PUBLIC}
        (folder / "generator.json").write_text(json.dumps(facts))
        shutil.copyfile(TEMPLATE, folder / "index.html")
    if not runtime:
        print(f"npm could not fetch onnxruntime-web: the page loads it from {PUBLIC}; use --ort for your own copy")
    print(f"wrote {folder / 'index.html'}; to open it: python -m http.server --directory {folder}")
