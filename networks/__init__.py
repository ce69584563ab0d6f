"""Further networks: bodies of `model.Denoiser`."""
