"""Makes the embedded default model: renders captioned pictures of animals, then trains a tiny CLIP, VAE and UNet."""
