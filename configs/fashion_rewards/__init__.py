"""Three experts on pictures of clothes, each loaded by its name: an example of rewards of one's own.

After FashionDPO (Li et al. 2025, Sec. 3.2), which learns from three at once. Its own are large models: a multimodal
language model for quality, a network trained on outfits for compatibility, a CLIP against the wearer's history for
personalisation. These are small stand-ins, one of each kind of scorer; `vlm_judge` takes the place of the first where
there is a server.
"""
