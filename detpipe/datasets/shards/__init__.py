"""Shards: the images of a split in a few large tar files, with an index that knows where each of them lies.

`write` makes them, `index` has what is known of them, `read` gives the bytes of an image and verifies whole shards, `remote`
fetches them, `dataset` is the data module.
"""
