"""Further networks: subclasses of `model.Denoiser`."""
