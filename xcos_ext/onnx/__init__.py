"""ONNX graphs read, followed, cut, joined and run; only :mod:`.tail` needs torch."""
