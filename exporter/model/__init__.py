"""ConvNeXt in PyTorch: the network, the table of its variants, and the weights that fit them."""
