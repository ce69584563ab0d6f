"""Readers of other projects' checkpoints; `import_teacher.py` calls them."""
