"""Code that does not depend on the training method."""
