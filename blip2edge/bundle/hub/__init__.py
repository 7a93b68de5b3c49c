"""Bundles on the Hugging Face hub: names, downloads, uploads, model cards."""
