"""From noise to a latent, one Euler step at a time: `schedule`, `latents`, `denoise`; `generate` puts them together."""
