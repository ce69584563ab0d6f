"""Results as JSON files, which are written whole or not at all."""

import json

import checkpoint


def write_results(path, results):
    """Writes the dict `results` to `path`. Raises UserError as `checkpoint.write` does."""
    content = json.dumps(results, indent=2) + "\n"
    checkpoint.write(path, lambda file: file.write(content.encode()))


def read_results(path):
    """The dict that `write_results` wrote, or None if the file is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
