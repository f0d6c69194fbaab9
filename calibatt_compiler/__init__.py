"""calibatt: calibrated block-sparse attention for video diffusion transformers."""
