"""Backbones: frozen encoders of images, texts and videos, one file per library."""
