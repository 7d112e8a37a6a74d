"""Spatial transformers on distorted digits: the demonstration of :mod:`detpipe.spatial_transformer`."""
