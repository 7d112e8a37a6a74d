"""A detector as one graph in a file: ONNX, or PyTorch's own `.pt2`."""
