"""ConvNeXt in ONNX: traced, simplified, lowered to a precision. Knows no runtime."""
