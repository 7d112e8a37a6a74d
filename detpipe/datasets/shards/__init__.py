"""Shards: the images of a split in a few large tar files, with an index that knows where each of them lies.

`making` writes them (`tar_files` writes one, `pool` several at a time, `journal` keeps what is done), `index` reads what is known
of them, `reading` gives the bytes of an image, `verifying` reads everything and compares.
"""
