"""Readers of data sets: each module has `load(name, data_dir, shape)`, which returns images, labels and class names."""
