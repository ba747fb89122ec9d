"""convnext-export: ConvNeXt from PyTorch to what runs in production, proven to be still the same model."""

__version__ = "0.1.0"
