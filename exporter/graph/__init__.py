"""ONNX graphs of ConvNeXt: tracing, simplification, conversion to a precision. Needs no runtime."""
