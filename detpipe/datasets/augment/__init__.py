"""Augmentation of training images together with their boxes and proposals."""
